from collections.abc import Callable
from itertools import islice
from random import Random

import pytest

from chatglm_ptuning.demo.advertisements import CLOSINGS, OPENINGS, make_advertisements
from chatglm_ptuning.demo.pretraining import WRITERS, Example, make_examples

EXAMPLES = list(islice(make_examples(seed=1), 20_000))
TEXTS = ["\n".join(example.turns) for example in EXAMPLES]


def test_the_same_text_every_time_and_other_text_for_another_seed() -> None:
    assert list(islice(make_examples(seed=1), 200)) == EXAMPLES[:200]
    assert list(islice(make_examples(seed=2), 200)) != EXAMPLES[:200]


def test_user_and_model_in_turn_and_the_model_last() -> None:
    for example in EXAMPLES:
        assert len(example.turns) in (2, 4)
        assert all(example.turns[1:]), example
    assert any(example.turns[0] == "" for example in EXAMPLES)


def test_the_form_of_the_task_is_not_in_it() -> None:
    """Neither its lists (`键#值*键#值`) nor its prompts nor the sentences that only advertisements have."""
    frames = [part for table in (OPENINGS, CLOSINGS) for forms in table.values() for part in forms]
    frames = [
        max(frame.replace("{m}", "|").replace("{n}", "|").split("|"), key=len) for frame in frames
    ]
    prompts = {row["content"] for rows in make_advertisements().values() for row in rows}
    for text in TEXTS:
        assert not ("#" in text and "*" in text), text
        assert not [frame for frame in frames if frame in text], text
        assert text.split("\n")[0] not in prompts


def test_no_answer_to_a_list_praises_more_than_two_attributes() -> None:
    for example in EXAMPLES:
        if example.turns[0] and not example.turns[0].startswith("接着写"):
            plain = example.turns[-1].startswith("这是一")  # read out, not praised
            assert plain or example.turns[-1].count("，") <= 3, example


@pytest.mark.parametrize("writer", [writer for writer, _ in WRITERS], ids=lambda w: w.__name__)
def test_every_writer_writes(writer: Callable[[Random], Example]) -> None:
    texts = {writer(Random(seed)).turns for seed in range(20)}
    assert len(texts) >= 10

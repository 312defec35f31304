"""The central check: what a request is answered does not depend on who else is asking."""

import random
import threading
from collections.abc import Callable
from queue import SimpleQueue

import pytest
import torch

from chatglm_ptuning.data.conversation import Message
from chatglm_ptuning.serving.answer import Answer, Update
from chatglm_ptuning.serving.limits import Limits
from chatglm_ptuning.serving.sampling import Sampling
from chatglm_ptuning.tuners import set_adapter
from tests.serving.conftest import PREFIXES, Base

NAMES = [None, "lora", *PREFIXES]
TEXTS = [
    "你好",
    "Hello world, this is a test.",
    "它创建于哪一年？",
    "裙",
    "晚上睡不着应该怎么办" * 3,
]
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def alone(base: Base) -> Callable[[str, str | None], list[int]]:
    """What `generate` answers to a text with one adapter, each pair computed once."""
    stops = base.template.stop_token_ids(base.tokenizer)
    known: dict[tuple[str, str | None], list[int]] = {}

    def answer(text: str, name: str | None) -> list[int]:
        if (text, name) not in known:
            prompt = base.template.encode_prompt(base.tokenizer, [Message("user", text)])
            set_adapter(base.model, name)
            ids = torch.tensor([prompt])
            out = base.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=MAX_TOKENS,
                eos_token_id=stops,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
            end = next((i for i, token in enumerate(out) if token in stops), len(out))
            known[text, name] = out[:end]
        return known[text, name]

    return answer


def interleave(base: Base, alone: Callable[[str, str | None], list[int]], seeds: range) -> None:
    """Submit requests at random moments and compare every answer with `generate`'s."""
    engine = base.engine(limits=Limits(max_batch=7, max_prefill_tokens=64))
    try:
        for seed in seeds:
            dice = random.Random(seed)
            under_way: list[tuple[Answer, str, str | None, int, SimpleQueue[Update]]] = []
            for _ in range(12):
                text, name = dice.choice(TEXTS), dice.choice(NAMES)
                length = dice.randint(1, MAX_TOKENS)
                updates: SimpleQueue[Update] = SimpleQueue()
                answer = engine.submit(
                    engine.encode([Message("user", text)]),
                    updates.put,
                    Sampling(max_tokens=length),
                    name,
                )
                under_way.append((answer, text, name, length, updates))
                for _ in range(dice.choice([0, 0, 1, 5])):  # let others get ahead
                    updates.get(timeout=60)
                    if answer.finish_reason is not None:
                        break
            for answer, text, name, length, updates in under_way:
                while answer.finish_reason is None:
                    updates.get(timeout=60)
                assert answer.text.ids == alone(text, name)[:length], (seed, text, name)
    finally:
        engine.close(drain=False)


def test_answers_alone_differ_from_one_another(
    alone: Callable[[str, str | None], list[int]],
) -> None:
    answers = {tuple(alone(text, name)) for text in TEXTS for name in NAMES}
    assert len(answers) > 0.7 * len(TEXTS) * len(NAMES)


def test_crowded_answers_equal_answers_alone(
    base: Base, alone: Callable[[str, str | None], list[int]]
) -> None:
    interleave(base, alone, range(20))


@pytest.mark.slow
def test_200_interleavings(base: Base, alone: Callable[[str, str | None], list[int]]) -> None:
    interleave(base, alone, range(20, 220))


def test_many_threads_ask_at_once(
    base: Base, alone: Callable[[str, str | None], list[int]]
) -> None:
    expected = {(text, name): alone(text, name) for text in TEXTS for name in NAMES}
    engine = base.engine()
    wrong = []

    def ask(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(6):
            text, name = dice.choice(TEXTS), dice.choice(NAMES)
            prompt = engine.encode([Message("user", text)])
            *_, last = engine.stream(prompt, Sampling(max_tokens=MAX_TOKENS), name)
            if last.completion_tokens != len(expected[text, name]):
                wrong.append((text, name, last))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    assert not wrong

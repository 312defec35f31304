import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.evaluation.generation import generate_predictions
from chatglm_ptuning.evaluation.predictions import read_predictions

GREEDY = {"max_new_tokens": 8, "do_sample": False}


class Recorder:
    """A model that answers with the length of each prompt and an end token, and remembers what it was given."""

    device = torch.device("cpu")
    training = True
    generation_config = GenerationConfig(max_new_tokens=1, do_sample=True, top_p=0.7)

    def __init__(self, end: int, dies_at: int | None = None) -> None:
        self.end, self.dies_at, self.calls = end, dies_at, []

    def eval(self) -> None:
        self.training = False

    def train(self, mode: bool) -> None:
        self.training = mode

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        if len(self.calls) == self.dies_at:
            raise KeyboardInterrupt
        assert not self.training
        assert self.generation_config.do_sample is False
        self.calls.append((input_ids.tolist(), attention_mask.tolist()))
        lengths = attention_mask.sum(1, keepdim=True)
        end = torch.full_like(lengths, self.end)
        return torch.cat((input_ids, lengths, end, torch.full_like(end, 3)), dim=1)


@pytest.fixture
def recorder(tokenizer: Any) -> Recorder:
    return Recorder(tokenizer.eos_token_id)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_longest_first_left_padded_in_batches(
    recorder: Recorder, tokenizer: Any, template: Any, prompts: Any, tmp_path: Path
) -> None:
    generate_predictions(recorder, tokenizer, template, prompts, tmp_path / "p", 2, **GREEDY)
    lengths = sorted((len(prompt.input_ids) for prompt in prompts), reverse=True)
    assert [[sum(mask) for mask in masks] for _, masks in recorder.calls] == [
        lengths[:2],
        lengths[2:4],
        lengths[4:],
    ]
    by_length = {len(prompt.input_ids): prompt.input_ids for prompt in prompts}
    for batch, masks in recorder.calls:
        for ids, mask in zip(batch, masks, strict=True):
            assert ids == [3] * (len(mask) - sum(mask)) + by_length[sum(mask)]
            assert mask == sorted(mask)


def test_answers_equal_those_generated_alone(
    model: Any, tokenizer: Any, template: Any, prompts: Any, tmp_path: Path
) -> None:
    predictions = generate_predictions(
        model, tokenizer, template, prompts, tmp_path / "p", 3, **GREEDY
    )
    for prompt, row in zip(prompts, predictions, strict=True):
        ids = torch.tensor([prompt.input_ids])
        with torch.no_grad():
            alone = model.generate(
                ids, max_new_tokens=8, do_sample=False, eos_token_id=tokenizer.eos_token_id
            )
        answer = [i for i in alone[0, ids.shape[1] :].tolist() if i != tokenizer.eos_token_id]
        assert row.prediction == template.parse_response(tokenizer.decode(answer)).content
        assert (row.prompt, row.reference) == (prompt.text, prompt.reference)
    assert len({row.prediction for row in predictions}) > 1
    assert rows(tmp_path / "p") == [vars(row) for row in predictions]


def test_the_end_and_the_padding_behind_it_are_no_text(
    recorder: Recorder, tokenizer: Any, template: Any, prompts: Any
) -> None:
    predictions = generate_predictions(
        recorder, tokenizer, template, prompts, Path(os.devnull), **GREEDY
    )
    expected = [tokenizer.decode([len(prompt.input_ids)]).strip() for prompt in prompts]
    assert [row.prediction for row in predictions] == expected


def test_settings_of_the_checkpoint_stay_out_and_come_back(
    recorder: Recorder, tokenizer: Any, template: Any, prompts: Any
) -> None:
    own = recorder.generation_config
    generate_predictions(recorder, tokenizer, template, prompts, Path(os.devnull), **GREEDY)
    assert recorder.generation_config is own
    assert recorder.training


def test_what_was_answered_before_a_stop_is_kept_and_not_answered_again(
    tokenizer: Any, template: Any, prompts: Any, tmp_path: Path
) -> None:
    path = tmp_path / "p"
    dying = Recorder(tokenizer.eos_token_id, dies_at=2)
    with pytest.raises(KeyboardInterrupt):
        generate_predictions(dying, tokenizer, template, prompts, path, 2, **GREEDY)
    assert dying.training
    assert len(rows(path)) == 4
    with path.open("a", encoding="utf-8") as file:
        file.write('{"index": 4, "prom')  # cut off in the middle of a line
    second = Recorder(tokenizer.eos_token_id)
    predictions = generate_predictions(
        second, tokenizer, template, prompts, path, 2, resume=True, **GREEDY
    )
    assert [len(batch) for batch, _ in second.calls] == [1]
    whole = generate_predictions(
        Recorder(tokenizer.eos_token_id), tokenizer, template, prompts, tmp_path / "q", **GREEDY
    )
    assert predictions == whole == read_predictions(path)
    assert [row["index"] for row in rows(path)] == [0, 1, 2, 3, 4]


def test_without_resume_a_file_is_begun_anew(
    recorder: Recorder, tokenizer: Any, template: Any, prompts: Any, tmp_path: Path
) -> None:
    for _ in range(2):
        generate_predictions(recorder, tokenizer, template, prompts, tmp_path / "p", 5, **GREEDY)
    assert len(recorder.calls) == 2


def test_a_file_of_other_prompts_is_refused(
    recorder: Recorder, tokenizer: Any, template: Any, prompts: Any, tmp_path: Path
) -> None:
    path = tmp_path / "p"
    generate_predictions(recorder, tokenizer, template, prompts, path, **GREEDY)
    before = path.read_bytes()
    others = [prompts[1], *prompts[1:]]
    with pytest.raises(UserError, match="another row 0"):
        generate_predictions(recorder, tokenizer, template, others, path, resume=True, **GREEDY)
    with pytest.raises(UserError, match="another row 2"):
        generate_predictions(
            recorder, tokenizer, template, prompts[:2], path, resume=True, **GREEDY
        )
    assert path.read_bytes() == before


def test_a_batch_that_does_not_fit_says_so(
    recorder: Recorder, tokenizer: Any, template: Any, prompts: Any
) -> None:
    def generate(**_: Any) -> None:
        raise torch.OutOfMemoryError

    recorder.generate = generate
    with pytest.raises(UserError, match="batch_size=4"):
        generate_predictions(recorder, tokenizer, template, prompts, Path(os.devnull), 4, **GREEDY)

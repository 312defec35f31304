import json
import os
from pathlib import Path
from typing import Any

import pytest

from chatglm_ptuning.config import GenerationSection
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.evaluation.evaluate import evaluate
from chatglm_ptuning.evaluation.report import read_scored


def test_scores_can_be_had_again_from_the_file_alone(
    model: Any, tokenizer: Any, template: Any, prompts: Any, tmp_path: Path
) -> None:
    path = tmp_path / "predictions.jsonl"
    generation = GenerationSection(max_new_tokens=8, batch_size=2)
    scores = evaluate(model, tokenizer, template, prompts, generation, path)
    assert list(scores) == ["rouge-1", "rouge-2", "rouge-l", "bleu-4", "sacrebleu", "chrf"]
    assert read_scored(path).scores == scores


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 0.0},
        {"do_sample": True, "top_k": 5, "top_p": 0.5, "repetition_penalty": 1.3},
        {"num_beams": 2},
        {"top_p": 0.5},
    ],
)
def test_every_way_to_generate_runs_without_a_warning(
    settings: dict[str, Any],
    model: Any,
    tokenizer: Any,
    template: Any,
    prompts: Any,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    generation = GenerationSection(max_new_tokens=3, **settings)
    evaluate(model, tokenizer, template, prompts, generation, Path(os.devnull))
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_sampled_answers_differ_and_temperature_0_does_not(
    model: Any, tokenizer: Any, template: Any, prompts: Any, tmp_path: Path
) -> None:
    def answers(**settings: Any) -> list[str]:
        generation = GenerationSection(max_new_tokens=8, **settings)
        evaluate(model, tokenizer, template, prompts, generation, tmp_path / "p")
        return (tmp_path / "p").read_text(encoding="utf-8").splitlines()

    greedy = answers()
    assert answers(do_sample=True, temperature=0.0) == greedy
    assert answers(do_sample=True, temperature=5.0) != greedy


def test_texts_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "p"
    row = {"index": 0, "prompt": "a\u2028b", "reference": "好看\x85\n", "prediction": "好看\x85\n"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_scored(path).scores["rouge-1"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must hold at least one prediction"),
        ("nonsense\n", r"p:1: must be a prediction"),
        ('{"index": 0}\n', r"p:1: must be a prediction"),
        ("[1]\n", r"p:1: must be a prediction"),
        ("\udcb0\n", r"p:1: must be a prediction"),
        ('{"index": 0, "prompt": "", "reference": 1, "prediction": ""}\n', "p:1: must be a pred"),
    ],
)
def test_a_broken_file_says_where(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        read_scored(tmp_path / "p")


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_scored(tmp_path / "p")


@pytest.mark.parametrize(("end", "count"), [("\n", 2), ("", 2), ('\n{"index": 2, "pro', 2)])
def test_only_a_line_cut_off_is_left_out(tmp_path: Path, end: str, count: int) -> None:
    rows = [{"index": i, "prompt": "", "reference": "好", "prediction": "好"} for i in range(2)]
    (tmp_path / "p").write_text("\n".join(map(json.dumps, rows)) + end, encoding="utf-8")
    assert len(read_scored(tmp_path / "p").rows) == count

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from chatglm_ptuning import cli
from chatglm_ptuning.config import RunConfig
from chatglm_ptuning.evaluation.predictions import read_predictions
from chatglm_ptuning.models.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.tuners import PrefixTuningConfig, add_adapter, delete_adapter, save_adapter
from tests.evaluation.conftest import GOLDEN


@pytest.fixture
def base(model: ChatGLMForConditionalGeneration, tokenizer: Any, tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    model.save_pretrained(directory)
    for file in (GOLDEN / "tokenizer_v1").iterdir():
        shutil.copy(file, directory)
    return directory


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.json"
    lines = [json.dumps({"content": f"颜色{i}", "summary": f"第{i}件。"}) for i in range(3)]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture
def adapter(base: Path, rows: Path, model: ChatGLMForConditionalGeneration, tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    model.config.name_or_path = str(base)
    add_adapter(model, PrefixTuningConfig(num_virtual_tokens=6), "default")
    save_adapter(model, directory)
    delete_adapter(model, "default")
    config = RunConfig.load(
        None,
        [
            f"model.path={base}",
            "model.dtype=float32",
            "model.device=cpu",
            f"data.test_file={rows}",
            "generation.max_new_tokens=5",
        ],
    )
    config.save(directory)
    return directory


def test_an_adapter_is_scored_beside_its_base(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", str(adapter)]) == 0
    out = adapter / "evaluation"
    scores = json.loads((out / "scores.json").read_text())
    base = read_predictions(out / "base_predictions.jsonl")
    tuned = read_predictions(out / "predictions.jsonl")
    assert [row.prompt for row in tuned] == ["颜色0", "颜色1", "颜色2"]
    assert [row.prediction for row in tuned] != [row.prediction for row in base]
    text = capsys.readouterr().out
    assert (
        f"{'rouge-l':<10}{scores['base']['rouge-l']:>8.2f}{scores['tuned']['rouge-l']:>8.2f}"
        in text
    )
    assert text.endswith(
        f"written to {out}: base_predictions.jsonl, predictions.jsonl, report.md, scores.json\n"
    )
    assert "```\n3 rows, scores 0-100" in (out / "report.md").read_text(encoding="utf-8")


def test_a_checkpoint_without_adapter_is_scored_alone(
    base: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"data.test_file={rows}", "generation.max_new_tokens=2", "model.dtype=float32"]
    assert cli.main(["evaluate", str(base), *overrides]) == 0
    scores = json.loads((base / "evaluation" / "scores.json").read_text())
    assert scores.keys() == {"base"}
    assert "tuned" not in capsys.readouterr().out


def test_predictions_are_scored_again_without_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "predictions.jsonl"
    row = {"index": 0, "prompt": "问", "reference": "红色的裙子", "prediction": "红色的裙子"}
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert cli.main(["evaluate", str(file)]) == 0
    assert f"{'rouge-l':<10}{100:>8.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.test_file=null"], "data.test_file must be given to score on, got none"),
        (["data.test_file=nowhere.json"], "nowhere.json"),
        (["model.template=chatglm3"], "an adapter must be used with the chat format"),
        (["generation.beams=2"], "there is no key generation.beams; the nearest is"),
    ],
)
def test_one_sentence_where_the_user_is_wrong(
    adapter: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = adapter / "run_config.yaml"
    text = file.read_text(encoding="utf-8").replace("template: null", "template: chatglm")
    file.write_text(text, encoding="utf-8")
    assert cli.main(["evaluate", str(adapter), *overrides]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_something_must_be_there_to_score(
    tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", str(tmp_path / "nowhere")]) == 1
    assert "must be a directory or a predictions.jsonl" in capsys.readouterr().err
    (adapter / "run_config.yaml").unlink()
    assert cli.main(["evaluate", str(adapter)]) == 1
    assert "must hold run_config.yaml to be scored" in capsys.readouterr().err


def test_an_interrupted_run_names_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", str(tmp_path)]) == 1
    assert "without either; train one first" in capsys.readouterr().err
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert cli.main(["evaluate", str(tmp_path)]) == 1
    newest = tmp_path / "checkpoint-10"
    assert f"its training was interrupted at {newest}\n" in capsys.readouterr().err

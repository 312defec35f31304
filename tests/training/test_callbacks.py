import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib import image

from chatglm_ptuning.training.callbacks import duration, plot_losses, to_line
from chatglm_ptuning.training.trainer import AdapterTrainer
from tests.training.conftest import MODELS

Train = Callable[..., AdapterTrainer]


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_metrics_are_the_trainers_log(train: Train, tmp_path: Path) -> None:
    trainer = train(MODELS["chatglm"](), eval_strategy="steps", eval_steps=2)
    rows = rows_of(tmp_path / "out" / "metrics.jsonl")
    assert rows == trainer.state.log_history
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4]


def test_resumed_run_has_each_step_once(train: Train, tmp_path: Path) -> None:
    train(MODELS["chatglm"](), save_strategy="steps", save_steps=2)
    file = tmp_path / "out" / "metrics.jsonl"
    before = rows_of(file)
    with file.open("a") as stream:
        stream.write('{"step": 5, "los')  # killed while it wrote
    train(MODELS["chatglm"](), resume=str(tmp_path / "out" / "checkpoint-2"))
    after = rows_of(file)
    assert [row["step"] for row in after if "loss" in row] == [1, 2, 3, 4]
    assert after[:2] == before[:2]


def test_new_run_forgets_the_old_one(train: Train, tmp_path: Path) -> None:
    for _ in range(2):
        train(MODELS["chatglm"]())
    rows = rows_of(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


def test_plot_shows_both_losses(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 5 / step} for step in range(1, 9)]
    plot_losses(rows, tmp_path / "one.png")
    plot_losses([*rows, {"step": 8, "eval_loss": 2.0}], tmp_path / "both.png")
    one, both = (image.imread(tmp_path / name) for name in ("one.png", "both.png"))
    assert one.shape == both.shape == (675, 1200, 4)
    assert (one != both).any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.png", "one.png"]


def test_plot_of_nothing(tmp_path: Path) -> None:
    plot_losses([], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()


def test_progress_lines(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train(MODELS["chatglm"](), eval_strategy="steps", eval_steps=4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 5
    assert lines[0].startswith("step 1/4   loss ")
    assert "learning_rate 0.01 " in lines[0]
    assert " tokens/s   0:0" in lines[0]
    assert lines[4].startswith("step 4/4   eval_loss ")
    assert lines[4].endswith("   0:00 left")
    assert "runtime" not in "".join(lines)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_row_is_strict_json() -> None:
    assert (
        to_line({"loss": math.nan, "step": 1, "提": "示"})
        == '{"loss": null, "step": 1, "提": "示"}\n'
    )

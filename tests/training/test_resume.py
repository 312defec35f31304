"""Where a run starts: what it goes on from, and what it leaves alone."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from chatglm_ptuning.evaluation.predictions import read_predictions
from chatglm_ptuning.training.checkpoints import MANIFEST_FILE, checkpoints
from chatglm_ptuning.training.trainer import AdapterTrainer
from tests.training.conftest import Command, adapter_is, losses


@pytest.mark.parametrize(
    ("adapter", "overrides"),
    [
        ("type: ptuning_v2, num_virtual_tokens: 4, prefix_dropout: 0.3", []),
        ("type: ptuning_v2, num_virtual_tokens: 4", ["data.streaming=true"]),
        ("type: lora, r: 4, lora_dropout: 0.3", ["data.packing=true"]),
        ("type: lora, r: 4, lora_dropout: 0.3", ["training.loraplus_lr_ratio=16"]),
    ],
)
def test_resuming_equals_not_stopping(
    adapter: str,
    overrides: list[str],
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter_is(tmp_path, adapter)
    out = tmp_path / "out"
    assert command(*overrides) == 0
    whole, weights = losses(out), load_file(out / "adapter_model.safetensors")
    assert list(whole) == [1, 2, 3, 4]
    checkpoint = out / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert (checkpoint / "run_config.yaml").exists()
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) < 50_000  # no base in it
    shutil.rmtree(out / "checkpoint-4")
    assert command("training.resume_from_checkpoint=true", *overrides) == 0
    assert f"going on from {checkpoint}" in capsys.readouterr().out
    assert losses(out) == whole
    for name, tensor in load_file(out / "adapter_model.safetensors").items():
        assert_close(tensor, weights[name], atol=0, rtol=0)


def test_resuming_without_a_checkpoint_starts(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("training.resume_from_checkpoint=true", "training.max_steps=1") == 0
    assert f"no checkpoint in {tmp_path / 'out'} yet: starting at step 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "override",
    [
        "adapter.num_virtual_tokens=8",
        "data.max_source_length=32",
        "model.dtype=bfloat16",
        "training.learning_rate=1e-3",
        "training.optim=sgd",
        "generation.max_new_tokens=5",
    ],
)
def test_another_run_is_not_resumed(
    override: str, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("training.max_steps=2") == 0
    assert command("training.resume_from_checkpoint=true", override) == 1
    name = override.split("=")[0]
    error = capsys.readouterr().err
    assert f"a resumed run must have the settings of its checkpoint, got {name}=" in error


def test_a_default_that_is_written_out_is_no_change(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("training.max_steps=2") == 0
    more = ("training.weight_decay=0.0", "training.seed=42", "generation.batch_size=3")
    assert command("training.resume_from_checkpoint=true", *more) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert [note.split(" is ")[0] for note in notes] == ["note: training.max_steps"]


def test_weights_alone_are_not_resumed(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("training.save_only_model=true") == 0
    assert command("training.resume_from_checkpoint=true") == 1
    assert "must hold the optimizer's state, got " in capsys.readouterr().err


def test_a_run_can_be_made_longer(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("training.max_steps=2") == 0
    assert command("training.resume_from_checkpoint=true", "data.test_file=null") == 0
    assert "note: training.max_steps is 4 now and was 2 when" in capsys.readouterr().out
    assert list(losses(tmp_path / "out")) == [1, 2, 3, 4]


def test_a_new_run_moves_the_earlier_checkpoints(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command() == 0
    assert command("training.max_steps=2") == 0
    assert "the earlier run's checkpoints are in" in capsys.readouterr().out
    out = tmp_path / "out"
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (out / "earlier" / "checkpoint-4").is_dir()


def test_a_user_error_leaves_the_earlier_run_alone(command: Command, tmp_path: Path) -> None:
    assert command() == 0
    out = tmp_path / "out"
    before = sorted(out.rglob("*"))
    wrong = ("adapter.from=nowhere", "data.train_file=nowhere", "training.report_to=nowhere")
    for override in wrong:
        assert command(override) == 1
        assert sorted(out.rglob("*")) == before


def test_checkpoints_of_a_resumed_run_outlive_a_damaged_one(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which has a higher step than they have, and would count as the newest."""
    out = tmp_path / "out"
    assert command() == 0
    (out / "checkpoint-4" / MANIFEST_FILE).unlink()
    resume = ("training.resume_from_checkpoint=true", "training.save_total_limit=1")
    assert command(*resume, "training.max_steps=3") == 0
    assert f"the earlier run's checkpoints are in {out / 'earlier'} now" in capsys.readouterr().out
    assert checkpoints(out) == [out / "checkpoint-3"]


def test_a_run_goes_back_to_an_older_checkpoint(command: Command, tmp_path: Path) -> None:
    """And when it is stopped in its turn, what it left behind is not taken for its own."""
    out = tmp_path / "out"
    assert command() == 0
    old = f"training.resume_from_checkpoint={out / 'checkpoint-2'}"
    assert command(old, "training.max_steps=3") == 0
    assert [path.name for path in checkpoints(out)] == ["checkpoint-3", "checkpoint-2"]
    assert (out / "earlier" / "checkpoint-4").is_dir()


def test_a_checkpoint_from_elsewhere_needs_a_directory_of_its_own(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("training.max_steps=2") == 0
    resume = f"training.resume_from_checkpoint={tmp_path / 'out' / 'checkpoint-2'}"
    other = f"training.output_dir={tmp_path / 'other'}"
    assert command(resume, other) == 0
    assert set(json.loads((tmp_path / "other" / "scores.json").read_text())) == {"base", "tuned"}
    capsys.readouterr()
    assert command(resume, other) == 1
    assert "must not hold checkpoints of another run, got output_dir=" in capsys.readouterr().err


def test_the_base_is_scored_again_on_other_rows(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rows = tmp_path / "out", tmp_path / "other.json"
    rows.write_text('{"content": "颜色#紫色", "summary": "这件是紫色的。"}', encoding="utf-8")
    assert command("training.max_steps=2") == 0
    resume = ("training.resume_from_checkpoint=true", f"data.test_file={rows}")
    assert command(*resume) == 0
    for name in ("base_predictions.jsonl", "predictions.jsonl"):
        assert [row.prompt for row in read_predictions(out / name)] == ["颜色#紫色"]
    capsys.readouterr()
    assert command(*resume, "training.max_steps=5") == 0
    assert "scoring the untouched base" not in capsys.readouterr().out


def test_a_base_that_is_no_more_is_not_scored(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter_is(tmp_path, "type: full")
    assert command("training.max_steps=2") == 0
    assert command("training.resume_from_checkpoint=true", "data.max_eval_samples=2") == 1
    assert "the base must be scored before its weights change, but " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "step", "message"),
    [
        (
            signal.SIGTERM,
            3,
            "SIGTERM: step 3 is saved, training.resume_from_checkpoint=true goes on",
        ),
        (
            signal.SIGINT,
            2,
            "training.resume_from_checkpoint=true goes on from {out}/checkpoint-2\n",
        ),
    ],
)
def test_an_interrupted_run_says_how_to_go_on(
    number: signal.Signals,
    step: int,
    message: str,
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compute_loss, out = AdapterTrainer.compute_loss, tmp_path / "out"

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            os.kill(os.getpid(), number)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "compute_loss", interrupted)
    assert command() == 130
    said = capsys.readouterr()
    assert message.format(out=out) in said.out
    assert said.err.endswith("interrupted\n")
    assert max(losses(out)) == step
    assert checkpoints(out)[0] == out / f"checkpoint-{step}"

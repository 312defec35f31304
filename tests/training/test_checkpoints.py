import errno
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.training.checkpoints import (
    MANIFEST_FILE,
    checkpoints,
    damage,
    find_checkpoint,
    publish,
    require_whole,
    seal,
    set_aside,
)
from chatglm_ptuning.training.trainer import AdapterTrainer
from tests.training.conftest import MODELS

Train = Callable[..., AdapterTrainer]
SAVE = {"save_strategy": "steps", "save_steps": 1}


def make_checkpoint(directory: Path) -> Path:
    (directory / "inner").mkdir(parents=True)
    (directory / "a.bin").write_bytes(b"12345")
    (directory / "inner" / "b.bin").write_bytes(b"678")
    seal(directory)
    return directory


def truncate(directory: Path) -> None:
    (directory / "a.bin").write_bytes(b"123")


def flip(directory: Path) -> None:
    (directory / "inner" / "b.bin").write_bytes(b"679")


def lose(directory: Path) -> None:
    (directory / "a.bin").unlink()


def unseal(directory: Path) -> None:
    (directory / MANIFEST_FILE).unlink()


def scramble(directory: Path) -> None:
    (directory / MANIFEST_FILE).write_text('{"a.bin": [5')


DAMAGES = {
    truncate: "a.bin has 3 bytes, not 5",
    flip: "inner/b.bin is damaged",
    lose: "a.bin is missing",
    unseal: "it has no manifest.json",
    scramble: "its manifest.json is damaged",
}


def test_whole_checkpoint(tmp_path: Path) -> None:
    assert damage(make_checkpoint(tmp_path / "checkpoint-1")) is None


@pytest.mark.parametrize("hurt", DAMAGES)
def test_damaged_checkpoint_is_skipped(
    hurt: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = make_checkpoint(tmp_path / "checkpoint-9")
    bad = make_checkpoint(tmp_path / "checkpoint-10")
    assert find_checkpoint(tmp_path) == bad
    hurt(bad)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path) == good
    assert caplog.messages == [f"skipping {bad}: {DAMAGES[hurt]}"]
    with pytest.raises(UserError, match="the checkpoint must be whole"):
        require_whole(bad)
    assert require_whole(good) == good


def test_no_checkpoint(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match="must be true or a checkpoint directory"):
        require_whole(tmp_path / "checkpoint-1")


def test_publishing_replaces_a_damaged_one(tmp_path: Path) -> None:
    truncate(make_checkpoint(tmp_path / "checkpoint-1"))
    publish(make_checkpoint(tmp_path / ".partial" / "checkpoint-1"), tmp_path / "checkpoint-1")
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_earlier_run_is_set_aside(tmp_path: Path) -> None:
    assert set_aside(tmp_path, None) is None
    for run in range(2):
        make_checkpoint(tmp_path / f"checkpoint-{run}")
        assert set_aside(tmp_path, None) == tmp_path / "earlier"
        assert checkpoints(tmp_path) == []
        assert checkpoints(tmp_path / "earlier") == [tmp_path / "earlier" / f"checkpoint-{run}"]


def test_what_is_newer_than_the_resumed_one_is_set_aside(tmp_path: Path) -> None:
    for step in (2, 10, 9, 30):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    assert set_aside(tmp_path, tmp_path / "checkpoint-9") == tmp_path / "earlier"
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-2"]
    assert set_aside(tmp_path, tmp_path / "checkpoint-9") is None


def test_training_writes_whole_checkpoints_and_keeps_the_limit(
    train: Train, tmp_path: Path
) -> None:
    train(MODELS["chatglm"](), save_total_limit=2, **SAVE)
    out = tmp_path / "out"
    assert [path.name for path in checkpoints(out)] == ["checkpoint-4", "checkpoint-3"]
    assert [damage(path) for path in checkpoints(out)] == [None, None]
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint-3",
        "checkpoint-4",
        "loss.png",
        "metrics.jsonl",
    ]


def test_best_checkpoint_has_its_final_name(train: Train, tmp_path: Path) -> None:
    trainer = train(
        MODELS["chatglm"](),
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=1,
        **SAVE,
    )
    best = tmp_path / "out" / f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_model_checkpoint == str(best)
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(
        best
    )


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed\nat x")]
)
def test_full_disk_leaves_the_last_checkpoint(
    error: Exception, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_rng_state = Trainer._save_rng_state

    def save(self: Trainer, output_dir: str) -> None:
        if self.state.global_step == 3:
            raise error
        save_rng_state(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_rng_state", save)
    with pytest.raises(UserError) as caught:
        train(MODELS["chatglm"](), **SAVE)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'out' / 'checkpoint-3'} could not be written: ")
    assert text.endswith(
        f"{tmp_path / 'out' / 'checkpoint-2'} is whole, make room and resume from it"
    )
    assert "\n" not in text
    assert find_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-2"
    assert not (tmp_path / "out" / ".partial").exists()


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_resumed_run_equals_the_one_never_stopped(
    step: int, strategy: str, train: Train, tmp_path: Path
) -> None:
    """12 rows in batches of 2 with 2 accumulated, so 3 steps an epoch: at its end, inside the second, at the last."""
    settings = {
        "max_steps": 7,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 2,
        "train_sampling_strategy": strategy,
        "eval_strategy": "steps",
        "eval_steps": 2,
        **SAVE,
    }
    whole = train(MODELS["chatglm"](), **settings)
    rows = [row for row in whole.state.log_history if "loss" in row]
    out = tmp_path / "out"
    for later in range(step + 1, 8):
        shutil.rmtree(out / f"checkpoint-{later}")
    torch.manual_seed(99)  # another process
    resumed = train(MODELS["chatglm"](), resume=str(find_checkpoint(out)), **settings)
    again = [row for row in resumed.state.log_history if "loss" in row]
    assert [row["step"] for row in again] == [row["step"] for row in rows] == [*range(1, 8)]
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    assert [row["learning_rate"] for row in again] == [row["learning_rate"] for row in rows]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert_close(one, other, atol=0, rtol=0)

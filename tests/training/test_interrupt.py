import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close
from transformers import TrainerCallback, TrainerControl, TrainerState

from chatglm_ptuning.training.arguments import RunArguments
from chatglm_ptuning.training.checkpoints import find_checkpoint
from chatglm_ptuning.training.trainer import AdapterTrainer
from tests.training.conftest import MODELS

Train = Callable[..., AdapterTrainer]


class Terminate(TrainerCallback):
    """Sends SIGTERM in the middle of step 2."""

    def on_step_begin(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class TerminateAtTheEnd(TrainerCallback):
    """Sends SIGTERM when the last step is over."""

    def on_save(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == state.max_steps:
            os.kill(os.getpid(), signal.SIGTERM)


class TerminateWorkers(TrainerCallback):
    """Sends SIGTERM to the data loader's processes, too, as schedulers do."""

    terminated = 0

    def on_step_begin(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGTERM)
            self.terminated += 1


def test_workers_outlive_sigterm(train: Train) -> None:
    callback = TerminateWorkers()
    trainer = train(MODELS["chatglm"](), callbacks=[callback], dataloader_num_workers=1)
    assert callback.terminated
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_sigterm_saves_and_the_run_goes_on_from_there(
    save_strategy: str, train: Train, tmp_path: Path
) -> None:
    whole = train(MODELS["chatglm"]())
    before = signal.getsignal(signal.SIGTERM)
    stopped = train(MODELS["chatglm"](), save_strategy=save_strategy, callbacks=[Terminate()])
    assert stopped.stop.stopped
    assert stopped.state.global_step == 2
    assert signal.getsignal(signal.SIGTERM) is before
    check_resumed(train, tmp_path, whole)


def check_resumed(train: Train, tmp_path: Path, whole: AdapterTrainer) -> None:
    """Step 2 is saved, and the run that goes on from it ends as the one never stopped."""
    checkpoint = find_checkpoint(tmp_path / "out")
    assert checkpoint == tmp_path / "out" / "checkpoint-2"
    resumed = train(MODELS["chatglm"](), resume=str(checkpoint))
    assert resumed.state.global_step == 4
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert_close(one, other, atol=0, rtol=0)


@pytest.mark.parametrize("terminate", [True, False], ids=["in the evaluation", "in its step"])
def test_sigterm_does_not_wait_for_an_evaluation(
    terminate: bool, train: Train, tmp_path: Path
) -> None:
    """It may come while answers are scored, or in a step with an evaluation and a checkpoint after it."""
    whole, scored = train(MODELS["chatglm"]()), []

    def score() -> dict[str, float]:
        if terminate:
            os.kill(os.getpid(), signal.SIGTERM)
        scored.append(1)
        return {"rouge-l": 1.0}

    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
    callbacks = [] if terminate else [Terminate()]
    stopped = train(
        MODELS["chatglm"](), score=score, callbacks=callbacks, save_steps=2, **evaluation
    )
    assert stopped.stop.stopped
    assert stopped.state.global_step == 2
    assert not scored
    check_resumed(train, tmp_path, whole)


def test_sigterm_after_the_last_step_has_its_usual_effect(train: Train) -> None:
    received, before = [], signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        trainer = train(MODELS["chatglm"](), save_strategy="steps", callbacks=[TerminateAtTheEnd()])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
    assert not trainer.stop.stopped


def test_without_the_signal_nothing_happens(train: Train) -> None:
    trainer = train(MODELS["chatglm"]())
    assert trainer.state.global_step == 4
    assert not trainer.stop.stopped

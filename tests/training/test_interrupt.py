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
from chatglm_ptuning.training.interrupt import StopOnSigterm
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


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_sigterm_saves_and_the_run_goes_on_from_there(
    save_strategy: str, train: Train, tmp_path: Path
) -> None:
    whole = train(MODELS["chatglm"]())
    before = signal.getsignal(signal.SIGTERM)
    stop = StopOnSigterm()
    stopped = train(MODELS["chatglm"](), save_strategy=save_strategy, callbacks=[Terminate(), stop])
    assert stop.received
    assert stopped.state.global_step == 2
    assert signal.getsignal(signal.SIGTERM) is before
    checkpoint = find_checkpoint(tmp_path / "out")
    assert checkpoint == tmp_path / "out" / "checkpoint-2"
    resumed = train(MODELS["chatglm"](), resume=str(checkpoint), callbacks=[StopOnSigterm()])
    assert resumed.state.global_step == 4
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert_close(one, other, atol=0, rtol=0)


def test_without_the_signal_nothing_happens(train: Train) -> None:
    stop = StopOnSigterm()
    assert train(MODELS["chatglm"](), callbacks=[stop]).state.global_step == 4
    assert not stop.received

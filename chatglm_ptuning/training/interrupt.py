"""SIGTERM, a scheduler's warning: the run writes a checkpoint after the step it is in and stops."""

import signal
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from chatglm_ptuning.training.arguments import RunArguments


class StopOnSigterm(TrainerCallback):
    """Asks for a checkpoint and the end of training once any of the processes got SIGTERM.

    Attributes:
        received: Whether training was stopped by it.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None

    def on_train_begin(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the signal over."""

        def note(number: int, frame: Any) -> None:
            self.received = True

        self._before = signal.signal(signal.SIGTERM, note)

    def on_step_end(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop after this step, on every process alike."""
        if torch.distributed.is_initialized():
            anywhere = torch.tensor(int(self.received), device=args.device)
            torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX)
            self.received = bool(anywhere)
        if self.received:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signal back."""
        signal.signal(signal.SIGTERM, self._before)

"""SIGTERM, a scheduler's warning: the run writes a checkpoint after the step it is in and stops."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from chatglm_ptuning.training.arguments import RunArguments


class Terminated(KeyboardInterrupt):
    """SIGTERM came where nothing needs to be finished."""


def leave_sigterm_to_trainer(initialize: Callable[[int], None] | None, worker: int) -> None:
    """Start a data loader's worker: schedulers send the signal to every process, and training needs its rows yet."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if initialize is not None:
        initialize(worker)


class StopOnSigterm(TrainerCallback):
    """Asks for a checkpoint and the end of training once any of the processes got SIGTERM.

    Attributes:
        received: Whether this process got it.
        stopped: Whether training was stopped by it, with a checkpoint.
    """

    def __init__(self) -> None:
        self.received = self.stopped = False
        self._in_evaluation = False
        self._before: Any = None

    def on_train_begin(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the signal over."""

        def note(number: int, frame: Any) -> None:
            self.received = True
            if self._in_evaluation:
                raise Terminated

        self._before = signal.signal(signal.SIGTERM, note)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Within it the signal ends what is done at once: an evaluation may outlast a scheduler's patience.

        Not among several processes, which would wait for the one that left.

        Raises:
            Terminated: It came.
        """
        self._in_evaluation = not torch.distributed.is_initialized()
        try:
            if self._in_evaluation and self.received:
                raise Terminated
            yield
        finally:
            self._in_evaluation = False

    def on_step_end(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop after this step, on every process alike."""
        self.stopped = self.received
        if torch.distributed.is_initialized():
            anywhere = torch.tensor(int(self.received), device=args.device)
            torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX)
            self.stopped = bool(anywhere)
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signal back; one that came after the last step has its usual effect now."""
        signal.signal(signal.SIGTERM, self._before)
        if self.received and not self.stopped:
            signal.raise_signal(signal.SIGTERM)

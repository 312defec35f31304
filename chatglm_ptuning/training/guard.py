"""What tells a user early that a run goes wrong: exploding gradients, collapsed answers, no progress."""

import logging
import math
import re
from collections.abc import Sequence
from statistics import median
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState

from chatglm_ptuning.training.arguments import RunArguments

logger = logging.getLogger(__name__)

EXPLODED = 100  # times the median of the gradient norms logged before
NORMS_BEFORE = 5  # logs that make a median
LOOP = re.compile(r"(.{1,20}?)\1{4,}$", re.DOTALL)  # an answer that ends in five times the same
REMEDY = "lower training.learning_rate, or take an earlier checkpoint"


class GradientWatch(TrainerCallback):
    """Warns once when the gradient's norm is not finite or far over what it was."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.has_warned = False

    def on_log(
        self,
        args: RunArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Compare the norm that is logged with those before."""
        norm = logs.get("grad_norm")
        if norm is None or self.has_warned:
            return
        usual = median(self.norms) if len(self.norms) >= NORMS_BEFORE else math.inf
        is_finite = math.isfinite(norm)
        if norm > EXPLODED * usual or not (is_finite or args.fp16):  # fp16 looks for its scale
            self.has_warned = True
            before = f" where {usual:.3g} is usual" if math.isfinite(usual) else ""
            logger.warning(
                "the gradient explodes: its norm is %.3g at step %d%s; lower training.learning_rate or "
                "training.max_grad_norm (now %g), or lengthen training.warmup_steps",
                norm,
                state.global_step,
                before,
                args.max_grad_norm,
            )
        if is_finite:
            self.norms.append(norm)


class EarlyStopping(EarlyStoppingCallback):
    """transformers' own, but a resumed run counts on from where the stopped one was."""

    def on_train_begin(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the count from the checkpoint; stop at once if that run was at its end."""
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is not None:
            count = saved["attributes"]["early_stopping_patience_counter"]
            self.early_stopping_patience_counter = count
            control.should_training_stop = count >= self.early_stopping_patience


def collapse(answers: Sequence[str]) -> str | None:
    """What is wrong with answers that a training run gone wrong gives, with the remedy; None if they look sound.

    Args:
        answers: Generated ones, to several different prompts.
    """
    signs = {
        "are empty": (
            lambda answer: not answer.strip(),
            f"the answer's end token is all that was learned: {REMEDY}, and look at `data preview`",
        ),
        "hold <unk> or broken characters": (
            lambda answer: "<unk>" in answer or "\ufffd" in answer,
            f"the model or its tokenizer is of another checkpoint, or it diverged: {REMEDY}",
        ),
        "repeat one piece to their end": (
            lambda answer: LOOP.search(answer) is not None,
            f"{REMEDY}, or set generation.repetition_penalty=1.1",
        ),
    }
    for sign, (has_it, remedy) in signs.items():
        count = sum(map(has_it, answers))
        if 2 * count > len(answers):
            return f"{count} of {len(answers)} answers {sign}; {remedy}"
    if len(answers) >= 8 and len(set(answers)) == 1:
        return (
            f"all {len(answers)} answers are {answers[0][:40]!r}; the prompts are ignored: {REMEDY}"
        )
    return None

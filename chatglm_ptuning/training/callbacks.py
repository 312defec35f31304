"""What a run shows while it goes: a progress line, metrics.jsonl and loss.png."""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from chatglm_ptuning.training.arguments import RunArguments

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"


class BeforeFirstStep(TrainerCallback):
    """Calls a function when the model is where it will be trained, sharded if so, and no step is made yet."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def on_train_begin(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call it."""
        self.call()


class Progress(TrainerCallback):
    """Loss, scores, tokens per second and time left: a bar on a terminal, a line at each log elsewhere."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.started = 0.0  # seconds
        self.first_step = 0

    def on_train_begin(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock; a resumed run counts from where it goes on."""
        self.started, self.first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit=" steps")

    def on_step_end(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: RunArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Say how it goes."""
        numbers = "   ".join(
            f"{name} {value:<7.4g}" for name, value in logs.items() if is_shown(name)
        )
        if not (state.is_world_process_zero and numbers):
            return
        if "tokens_per_second" in logs:
            numbers += f"   {logs['tokens_per_second']:>6,.0f} tokens/s"
        if self.bar is not None:
            self.bar.set_postfix_str(numbers)
            return
        done = state.global_step - self.first_step
        left = (
            (time.monotonic() - self.started) * (state.max_steps - state.global_step) / max(done, 1)
        )
        step = f"{state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        print(f"step {step}   {numbers}   {duration(left)} left", flush=True)

    def on_train_end(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()


class RunLog(TrainerCallback):
    """Keeps metrics.jsonl, a row a log, and draws loss.png at checkpoints and at the end.

    A resumed run starts from the rows that its checkpoint knows of, so that each step stands once.
    """

    def on_train_begin(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the rows up to here."""
        if state.is_world_process_zero:
            file = Path(args.output_dir) / METRICS_FILE
            partial = file.with_name(f".partial-{METRICS_FILE}")
            partial.write_text("".join(map(to_line, state.log_history)), encoding="utf-8")
            os.replace(partial, file)

    def on_step_end(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log at every checkpoint, so that the mean of a row never spans what a resumed run did not see."""
        control.should_log |= control.should_save

    on_epoch_end = on_step_end

    def on_log(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Append the newest row."""
        if state.is_world_process_zero:
            with (Path(args.output_dir) / METRICS_FILE).open("a", encoding="utf-8") as stream:
                stream.write(to_line(state.log_history[-1]))

    def on_save(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw what there is."""
        if state.is_world_process_zero:
            plot_losses(state.log_history, Path(args.output_dir) / PLOT_FILE)

    on_train_end = on_save


def is_shown(name: str) -> bool:
    """Whether a logged value belongs on the progress line: losses, scores, learning rate."""
    is_evaluation = name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))
    return name in ("loss", "learning_rate") or is_evaluation


def duration(seconds: float) -> str:
    """Seconds as [hours:]minutes:seconds."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def to_line(row: dict[str, Any]) -> str:
    """One row of JSONL; JSON has no NaN, so what is not finite is null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite, ensure_ascii=False) + "\n"


def plot_losses(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw training and validation loss over optimizer steps."""
    matplotlib.use("Agg")  # before pyplot, which else looks for a screen
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="loss per target token (nats)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    partial = file.with_name(f".partial-{file.name}")
    figure.savefig(partial, dpi=150)
    plt.close(figure)
    os.replace(partial, file)

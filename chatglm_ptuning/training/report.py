"""What a run says at its end: scores of base and tuned model side by side, a few answers, cost, what to do next."""

import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from chatglm_ptuning.config import PROJECT, RunConfig
from chatglm_ptuning.data.report import plural
from chatglm_ptuning.evaluation.report import (
    REPORT_FILE,
    Scored,
    fenced,
    samples,
    score_table,
    write_scores,
)
from chatglm_ptuning.memory import peak_resident
from chatglm_ptuning.training.callbacks import duration

SERVED = ("ptuning_v2", "lora", "full")  # adalora and ia3 cannot share a batch with the base
SERVED_IF_CAUSAL = ("prompt_tuning", "ptuning_v1")  # in ChatGLM-6B they see the text behind them


@dataclass
class RunReport:
    """All that a finished run reports.

    Args:
        config: The run's.
        steps: Optimizer steps made.
        loss: Of the last training log.
        scored: "base" without the adapter and "tuned" with it; empty where nothing was scored.
        seconds: From start to end.
    """

    config: RunConfig
    steps: int
    loss: float
    scored: dict[str, Scored]
    seconds: float

    def write(self, directory: Path) -> None:
        """Write scores.json and report.md."""
        if self.scored:
            write_scores(self.scored, directory)
        (directory / REPORT_FILE).write_text(self.markdown(), encoding="utf-8")

    def text(self) -> str:
        """For the terminal."""
        return "\n".join(
            ["", *self.table(), "", *samples(self.scored), *self.outcome(), "", *self.next_steps()]
        )

    def markdown(self) -> str:
        """For report.md."""
        title = f"# {self.config.adapter.type} on {self.config.model.path}"
        parts = [
            [title],
            fenced(self.table()),
            fenced(samples(self.scored)),
            self.outcome(),
            fenced(self.next_steps()),
        ]
        return "\n\n".join("\n".join(part) for part in parts if part) + "\n"

    def table(self) -> list[str]:
        """Base and tuned scores side by side."""
        if not self.scored:
            return ["nothing was scored: data.test_file and data.validation_file are not set"]
        return score_table(self.scored)

    def outcome(self) -> list[str]:
        """Steps, loss, time, memory, files."""
        return [
            f"{plural(self.steps, 'step')}, training loss {self.loss:.4f}, {duration(self.seconds)}, {peak_memory()}",
            f"written to {self.config.output_dir}: "
            + ", ".join(sorted(p.name for p in self.config.output_dir.iterdir() if p.is_file())),
        ]

    def next_steps(self) -> list[str]:
        """Commands to type next; before them the one after which `python` is this run's, where it is another."""
        adapter = self.config.adapter
        option = "--model" if adapter.type == "full" else "--prefix"
        where = shlex.quote(str(self.config.output_dir))
        score = f"bash {from_here(PROJECT / 'scripts' / 'evaluate.sh')} {where}"
        is_causal = self.config.model.template != "chatglm"
        served = SERVED + SERVED_IF_CAUSAL if is_causal else SERVED
        is_served = adapter.type in served and not adapter.settings.get("use_dora")
        chat = f"chat with it:    python {from_here(PROJECT / 'web_demo.py')} {option} {where}"
        lines = [
            *([chat] if is_served else []),
            f"score it again:  {score}"
            if self.scored
            else f"score it:        {score} data.test_file=FILE",
        ]
        found = shutil.which("python")
        if found is None or Path(found).parent != Path(sys.executable).parent:
            activate = from_here(Path(sys.prefix, "bin", "activate"))
            lines.insert(0, f"once a shell:    source {activate}")
        return lines


def from_here(path: Path) -> str:
    """A path from the current directory, as a shell takes it."""
    return shlex.quote(os.path.relpath(path))


def trained_share(model: nn.Module, kind: str) -> str:
    """How much of a model is trained; sharded parameters count whole."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    total = sum(size for size, _ in sizes)
    trained = sum(size for size, is_trained in sizes if is_trained)
    return f"{kind}: {trained:,} of {total:,} parameters are trained ({trained / total:.2%})"


def peak_memory() -> str:
    """The most memory this process held at once."""
    text = f"peak memory {peak_resident() / 2**30:.2f} GiB"
    if torch.cuda.is_available():
        text += f", on the GPU {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    return text

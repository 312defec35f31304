"""What a run says at its end: scores of base and tuned model side by side, a few answers, cost, what to do next."""

import json
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from chatglm_ptuning.config import PROJECT, RunConfig
from chatglm_ptuning.evaluation.evaluate import score_file
from chatglm_ptuning.training.callbacks import duration

SAMPLES = 2
SCORES_FILE = "scores.json"
REPORT_FILE = "report.md"


@dataclass
class Scored:
    """Scores 0-100 by metric, and the rows they are of: prompt, reference, prediction."""

    scores: dict[str, float]
    rows: list[dict[str, str]]


@dataclass
class RunReport:
    """All that a finished run reports.

    Args:
        config: The run's.
        steps: Optimizer steps made.
        loss: Of the last training log.
        base: Of the base without the adapter; None where nothing was scored.
        tuned: Of the base with it.
        seconds: From start to end.
    """

    config: RunConfig
    steps: int
    loss: float
    base: Scored | None
    tuned: Scored | None
    seconds: float

    def write(self, directory: Path) -> None:
        """Write scores.json and report.md."""
        if self.base is not None and self.tuned is not None:
            scores = {"base": self.base.scores, "tuned": self.tuned.scores}
            (directory / SCORES_FILE).write_text(
                json.dumps(scores, indent=2) + "\n", encoding="utf-8"
            )
        (directory / REPORT_FILE).write_text(self.markdown(), encoding="utf-8")

    def text(self) -> str:
        """For the terminal."""
        return "\n".join(
            ["", *self.table(), "", *self.samples(), *self.outcome(), "", *self.next_steps()]
        )

    def markdown(self) -> str:
        """For report.md."""
        title = f"# {self.config.adapter.type} on {self.config.model.path}"
        parts = [
            [title],
            fenced(self.table()),
            fenced(self.samples()),
            self.outcome(),
            fenced(self.next_steps()),
        ]
        return "\n\n".join("\n".join(part) for part in parts if part) + "\n"

    def table(self) -> list[str]:
        """Base and tuned scores side by side."""
        if self.base is None or self.tuned is None:
            return ["nothing was scored: data.test_file and data.validation_file are not set"]
        lines = [f"{len(self.tuned.rows):,} rows, scores 0-100"]
        lines.append(f"{'':<10}{'base':>8}{'tuned':>8}{'change':>9}")
        for name, tuned in self.tuned.scores.items():
            base = self.base.scores[name]
            lines.append(f"{name:<10}{base:>8.2f}{tuned:>8.2f}{tuned - base:>+9.2f}")
        return lines

    def samples(self) -> list[str]:
        """The first few prompts with their answers."""
        lines: list[str] = []
        if self.base is not None and self.tuned is not None:
            for base, tuned in list(zip(self.base.rows, self.tuned.rows, strict=True))[:SAMPLES]:
                lines += [
                    f"prompt     {tuned['prompt']}",
                    f"reference  {tuned['reference']}",
                    f"base       {base['prediction']}",
                    f"tuned      {tuned['prediction']}",
                    "",
                ]
        return lines

    def outcome(self) -> list[str]:
        """Steps, loss, time, memory, files."""
        return [
            f"{self.steps:,} steps, training loss {self.loss:.4f}, {duration(self.seconds)}, {peak_memory()}",
            f"written to {self.config.output_dir}: "
            + ", ".join(sorted(p.name for p in self.config.output_dir.iterdir() if p.is_file())),
        ]

    def next_steps(self) -> list[str]:
        """Commands to type next."""
        option = "--model" if self.config.adapter.type == "full" else "--prefix"
        where = self.config.output_dir
        return [
            "chat with it:    "
            + f"python {os.path.relpath(PROJECT / 'web_demo.py')} {option} {where}",
            "score it again:  "
            + f"bash {os.path.relpath(PROJECT / 'scripts/evaluate.sh')} {where}",
        ]


def read_scored(file: Path) -> Scored:
    """Score a file of predictions."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return Scored(score_file(file), [json.loads(line) for line in lines])


def fenced(lines: list[str]) -> list[str]:
    """Lines as a block of code in Markdown."""
    return ["```", *lines, "```"] if lines else []


def trained_share(model: nn.Module, kind: str) -> str:
    """How much of a model is trained; sharded parameters count whole."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    total = sum(size for size, _ in sizes)
    trained = sum(size for size, is_trained in sizes if is_trained)
    return f"{kind}: {trained:,} of {total:,} parameters are trained ({trained / total:.2%})"


def peak_memory() -> str:
    """The most memory this process held at once."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    text = f"peak memory {host / 2**30:.2f} GiB"
    if torch.cuda.is_available():
        text += f", on the GPU {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    return text

"""Scores of base and tuned model side by side, and a few answers: lines for a terminal or a Markdown file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from chatglm_ptuning.data.report import plural
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.evaluation.evaluate import score_predictions
from chatglm_ptuning.evaluation.predictions import Prediction, read_predictions

BASE_PREDICTIONS = "base_predictions.jsonl"
PREDICTIONS = "predictions.jsonl"
SCORES_FILE = "scores.json"
REPORT_FILE = "report.md"
SAMPLES = 2


@dataclass
class Scored:
    """Scores 0-100 by metric, and the rows they are of."""

    scores: dict[str, float]
    rows: list[Prediction]


def read_scored(file: Path) -> Scored:
    """Score a file of predictions.

    Raises:
        UserError: It cannot be read or holds no prediction.
    """
    rows = read_predictions(file)
    if not rows:
        raise UserError(f"{file}: must hold at least one prediction, got none")
    return Scored(score_predictions(rows), rows)


def score_table(scored: Mapping[str, Scored]) -> list[str]:
    """A column for each of "base" and "tuned", and their difference where both are there."""
    first = next(iter(scored.values()))
    both = len(scored) == 2
    lines = [f"{plural(len(first.rows), 'row')}, scores 0-100"]
    lines.append(f"{'':<10}" + "".join(f"{name:>8}" for name in scored) + "   change" * both)
    for metric in first.scores:
        values = [column.scores[metric] for column in scored.values()]
        line = f"{metric:<10}" + "".join(f"{value:>8.2f}" for value in values)
        lines.append(line + (f"{values[1] - values[0]:>+9.2f}" if both else ""))
    return lines


def samples(scored: Mapping[str, Scored]) -> list[str]:
    """The first few prompts with their answers."""
    lines: list[str] = []
    for rows in list(zip(*(column.rows for column in scored.values()), strict=True))[:SAMPLES]:
        lines += [f"prompt     {rows[0].prompt}", f"reference  {rows[0].reference}"]
        lines += [f"{name:<11}{row.prediction}" for name, row in zip(scored, rows, strict=True)]
        lines.append("")
    return lines


def write_scores(scored: Mapping[str, Scored], directory: Path) -> None:
    """Write scores.json."""
    content = {name: column.scores for name, column in scored.items()}
    (directory / SCORES_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def fenced(lines: list[str]) -> list[str]:
    """Lines as a block of code in Markdown."""
    return ["```", *lines, "```"] if lines else []

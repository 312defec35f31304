"""The account of what became of every row, and of how long they are."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_TALLIES = ("skipped", "changed")


@dataclass
class Tally:
    """What one rule touched: rows, tokens that went, and the first place."""

    rows: int = 0
    tokens: int = 0
    first: str = ""


@dataclass
class DataReport:
    """Rows read, used and skipped, and what was cut; `str()` has one line a rule.

    rows == used + sum of the skipped rows, always. `source_lengths` and `target_lengths` count, for each number of
    tokens, the rows whose prompt or answer has that many before anything is cut.
    """

    rows: int = 0
    used: int = 0
    target_tokens: int = 0
    skipped: dict[str, Tally] = field(default_factory=dict)
    changed: dict[str, Tally] = field(default_factory=dict)
    source_lengths: Counter[int] = field(default_factory=Counter)
    target_lengths: Counter[int] = field(default_factory=Counter)

    def skip(self, rule: str, source: str) -> None:
        """Count a row that is not used."""
        count(self.skipped, rule, source, 0)

    def change(self, rule: str, source: str, tokens: int) -> None:
        """Count a row of which so many tokens went."""
        count(self.changed, rule, source, tokens)

    def __str__(self) -> str:
        lines = [f"{self.used:,} of {plural(self.rows, 'row')} used"]
        for rule, tally in self.skipped.items():
            lines.append(f"  skipped, {rule}: {plural(tally.rows, 'row')} (first: {tally.first})")
        for rule, tally in self.changed.items():
            share = tally.rows / max(self.used, 1)
            lines.append(
                f"  {rule}: {plural(tally.rows, 'row')} ({share:.1%}), {plural(tally.tokens, 'token')}"
                f" (first: {tally.first})"
            )
        return "\n".join(lines)

    def advice(self, max_source_length: int, max_target_length: int) -> str | None:
        """The limits that would fit 99 % of the rows; None where these do."""
        wanted = [
            f"data.{name}={suggested_limit(counts)}"
            for name, counts, limit in (
                ("max_source_length", self.source_lengths, max_source_length),
                ("max_target_length", self.target_lengths, max_target_length),
            )
            if counts and suggested_limit(counts) > limit
        ]
        return f"99 % of the rows would fit whole into {' '.join(wanted)}" if wanted else None

    def lengths(self, max_source_length: int, max_target_length: int) -> str:
        """Histograms of the lengths in tokens, each with the rows over the limit and a limit that fits 99 %."""
        parts = []
        for name, counts, limit in (
            ("max_source_length", self.source_lengths, max_source_length),
            ("max_target_length", self.target_lengths, max_target_length),
        ):
            if counts:
                over = sum(rows for length, rows in counts.items() if length > limit)
                parts.append(
                    f"tokens against data.{name}={limit}: {over:,} of {counts.total():,} rows are over it,"
                    f" {suggested_limit(counts)} would fit 99 %\n{histogram(counts)}"
                )
        return "\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        tallies = {
            name: {rule: vars(tally) for rule, tally in getattr(self, name).items()}
            for name in _TALLIES
        }
        return vars(self) | tallies

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataReport":
        """The report that `to_dict` made."""
        for name in _TALLIES:
            values[name] = {rule: Tally(**tally) for rule, tally in values[name].items()}
        for name in ("source_lengths", "target_lengths"):
            values[name] = Counter({int(length): rows for length, rows in values[name].items()})
        return cls(**values)


def plural(count: int, noun: str) -> str:
    """A count and what is counted: 1 row, 2,000 rows."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def count(tallies: dict[str, Tally], rule: str, source: str, tokens: int) -> None:
    """Add a row to the tally of a rule."""
    tally = tallies.setdefault(rule, Tally(first=source))
    tally.rows += 1
    tally.tokens += tokens


def suggested_limit(counts: Counter[int]) -> int:
    """The smallest multiple of 8 tokens that 99 % of the rows fit into."""
    fitting = 0
    for length in sorted(counts):
        fitting += counts[length]
        if fitting >= 0.99 * counts.total():
            return max(8, math.ceil(length / 8) * 8)
    raise ValueError("no rows were counted")


def histogram(counts: Counter[int], width: int = 40) -> str:
    """Rows by length in lines of bars, each line's lengths up to twice those of the line before."""
    bars: Counter[int] = Counter()
    for length, rows in counts.items():
        bars[max(8, 1 << (length - 1).bit_length())] += rows
    lines = []
    for top in (1 << power for power in range(3, max(bars).bit_length())):
        bar = "#" * math.ceil(width * bars[top] / max(bars.values()))
        lines.append(
            f"  {top // 2 + 1 if top > 8 else 0:>6}-{top:<6} {bars[top]:>9,} {bar}".rstrip()
        )
    return "\n".join(lines)

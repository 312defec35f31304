"""The account of what became of every row."""

from dataclasses import dataclass, field


@dataclass
class Tally:
    """What one rule touched: rows, tokens that went, and the first place."""

    rows: int = 0
    tokens: int = 0
    first: str = ""


@dataclass
class DataReport:
    """Rows read, used and skipped, and what was cut; `str()` has one line a rule.

    rows == used + sum of the skipped rows, always.
    """

    rows: int = 0
    used: int = 0
    target_tokens: int = 0
    skipped: dict[str, Tally] = field(default_factory=dict)
    changed: dict[str, Tally] = field(default_factory=dict)

    def skip(self, rule: str, source: str) -> None:
        """Count a row that is not used."""
        count(self.skipped, rule, source, 0)

    def change(self, rule: str, source: str, tokens: int) -> None:
        """Count a row of which so many tokens went."""
        count(self.changed, rule, source, tokens)

    def __str__(self) -> str:
        lines = [f"{self.used:,} of {self.rows:,} rows used"]
        for rule, tally in self.skipped.items():
            lines.append(f"  skipped, {rule}: {tally.rows:,} rows (first: {tally.first})")
        for rule, tally in self.changed.items():
            share = tally.rows / max(self.used, 1)
            lines.append(
                f"  {rule}: {tally.rows:,} rows ({share:.1%}), {tally.tokens:,} tokens (first: {tally.first})"
            )
        return "\n".join(lines)


def count(tallies: dict[str, Tally], rule: str, source: str, tokens: int) -> None:
    """Add a row to the tally of a rule."""
    tally = tallies.setdefault(rule, Tally(first=source))
    tally.rows += 1
    tally.tokens += tokens

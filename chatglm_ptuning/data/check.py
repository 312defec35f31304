"""Every row of some files looked at before a run: what cannot be used, what stands twice, what looks damaged."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from chatglm_ptuning.data.config import DataConfig
from chatglm_ptuning.data.conversation import Conversation
from chatglm_ptuning.data.encoding import encode_example, end_with_answer
from chatglm_ptuning.data.formats import conversation_from_row
from chatglm_ptuning.data.messages import shown
from chatglm_ptuning.data.reading import data_files, read_rows
from chatglm_ptuning.data.report import DataReport, plural
from chatglm_ptuning.data.rows import BadRow, Row
from chatglm_ptuning.data.template import Template, Tokenizer
from chatglm_ptuning.errors import UserError

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_LATIN_RUN = re.compile(r"[\u00a1-\u00ff]{4,}")
_CJK = re.compile(r"[\u4e00-\u9fff]")


class Finding(NamedTuple):
    """Something about a row: printed as `source: reason`, counted under `kind`.

    Args:
        source: "file:line".
        kind: Name of the rule.
        reason: What is wrong with this row.
        is_usable: Whether training takes the row all the same.
    """

    source: str
    kind: str
    reason: str
    is_usable: bool = False

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


@dataclass
class CheckResult:
    """What a check found.

    Args:
        rows: Places that hold a row or should.
        good: Rows without any finding.
        written: Rows written to the file of good ones.
        findings: Findings by kind.
        report: Lengths and, with a tokenizer, what training would cut.
    """

    rows: int = 0
    good: int = 0
    written: int = 0
    findings: Counter[str] = field(default_factory=Counter)
    report: DataReport = field(default_factory=DataReport)

    @property
    def is_clean(self) -> bool:
        """Nothing was found."""
        return not self.findings

    def summary(self, config: DataConfig) -> str:
        """The counts, one line a kind, and the histograms of lengths where a tokenizer was given."""
        lines = [f"{self.good:,} of {plural(self.rows, 'row')} without a finding"]
        lines += [f"  {kind}: {count:,}" for kind, count in self.findings.most_common()]
        lengths = self.report.lengths(config.max_source_length, config.max_target_length)
        return "\n".join([*lines, lengths] if lengths else lines)


def check_files(
    paths: Sequence[str],
    config: DataConfig,
    on_finding: Callable[[Finding], None],
    held_out: Sequence[str] = (),
    template: Template | None = None,
    tokenizer: Tokenizer | None = None,
    fix: str | None = None,
    on_row: Callable[[], object] = lambda: None,
) -> CheckResult:
    """Check every row; a broken one never stops the check.

    Args:
        paths: Files and folders to train on.
        config: Columns, limits and encoding.
        on_finding: Called with each finding as it comes.
        held_out: Files for evaluation; checked too, and each question that also stands in `paths` is a finding.
        template: The chat format; with `tokenizer` the limits are checked.
        tokenizer: The model's tokenizer.
        fix: Write the usable rows of `paths` here, one JSON line each. A row that training would only cut is usable,
            unless `data.truncation` is "drop".
        on_row: Called after each row.

    Raises:
        UserError: A file that does not exist; or `fix` is one of the files, or cannot be written.
    """
    files, others = data_files(paths), data_files(held_out)
    if fix is not None and Path(fix).resolve() in {Path(file).resolve() for file in files + others}:
        raise UserError(f"--fix must name a new file, got {fix!r}, which is being checked")
    result, seen = CheckResult(), Seen()
    with open_output(fix) if fix is not None else nullcontext() as output:
        for file, is_held_out in [*((f, False) for f in files), *((f, True) for f in others)]:
            for row in rows_of(file, config.encoding):
                findings, conversation = check_row(row, config, template, tokenizer, result.report)
                if conversation is not None:
                    findings += seen.check(conversation, is_held_out)
                result.rows += 1
                result.good += not findings
                for finding in findings:
                    result.findings[finding.kind] += 1
                    on_finding(finding)
                is_usable = all(finding.is_usable for finding in findings)
                if output is not None and is_usable and not is_held_out and isinstance(row, Row):
                    # a Parquet file may have columns that JSON has no form for; no text of a usable row is among them
                    output.write(json.dumps(row.value, ensure_ascii=False, default=str) + "\n")
                    result.written += 1
                on_row()
    return result


def open_output(file: str) -> IO[str]:
    """Open a file of JSON lines for writing; half a character, which UTF-8 cannot hold, becomes its JSON escape.

    Raises:
        UserError: It would be read back as another form than JSON lines, or cannot be written.
    """
    if Path(file).suffix.lower() in (".csv", ".tsv", ".parquet", ".gz"):
        raise UserError(f"--fix must name a file of JSON lines, got {file!r}; call it .jsonl")
    try:
        return open(file, "w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(
            f"--fix must name a file that can be written, got {file!r}: {error.strerror}"
        ) from error


class Seen:
    """Where each question and each row stood first."""

    def __init__(self) -> None:
        self.rows: dict[bytes, str] = {}
        self.questions: dict[bytes, str] = {}

    def check(self, conversation: Conversation, is_held_out: bool) -> list[Finding]:
        """What was there before; the conversation is remembered."""
        source = conversation.source
        texts = [
            [m.role, m.content, [[c.name, c.arguments] for c in m.tool_calls]]
            for m in conversation.messages
        ]
        question, whole = digest(texts[:-1]), digest(texts)
        if is_held_out and question in self.questions:
            reason = f"a row to evaluate on must not stand in train, got the question of {self.questions[question]}"
            return [Finding(source, "question of train", reason)]
        if not is_held_out:
            self.questions.setdefault(question, source)
        if whole in self.rows:
            reason = f"a row must stand once, got the row of {self.rows[whole]}"
            return [Finding(source, "duplicate", reason)]
        self.rows[whole] = source
        return []


def digest(value: Any) -> bytes:
    """16 bytes that stand for a value."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).digest()


def rows_of(file: str, encoding: str) -> Iterator[Row | BadRow]:
    """The rows of a file; one that cannot be read further ends with a bad row instead of an error."""
    rows = read_rows(file, encoding)
    while True:
        try:
            row = next(rows, None)
        except UserError as error:
            source, _, reason = str(error).partition(": ")
            yield BadRow(source, reason)
            return
        if row is None:
            return
        yield row


def check_row(
    row: Row | BadRow,
    config: DataConfig,
    template: Template | None,
    tokenizer: Tokenizer | None,
    report: DataReport,
) -> tuple[list[Finding], Conversation | None]:
    """The findings on one row alone, and its conversation where it has one."""
    if isinstance(row, BadRow):
        return [Finding(row.source, "unreadable", row.reason)], None
    try:
        conversation = conversation_from_row(row, config)
    except UserError as error:
        return [Finding(row.source, "wrong columns", reason_of(error, row))], None
    findings = []
    for number, message in enumerate(conversation.messages, 1):
        damage = encoding_damage(message.content)
        if damage is not None:
            reason = f"message {number} ({message.role}) must be undamaged text, got {damage}"
            findings.append(Finding(row.source, "suspected encoding damage", reason))
    own = DataReport(source_lengths=report.source_lengths, target_lengths=report.target_lengths)
    try:
        if template is not None and tokenizer is not None:
            encode_example(conversation, template, tokenizer, config, own)
        else:
            end_with_answer(conversation, own)
    except UserError as error:
        findings.append(Finding(row.source, "wrong for the template", reason_of(error, row)))
    for rule in own.skipped:
        findings.append(Finding(row.source, rule, f"training skips this row: {rule}"))
    for rule, tally in own.changed.items():
        reason = f"training takes {plural(tally.tokens, 'token')} of this row away: {rule}"
        findings.append(Finding(row.source, rule, reason, is_usable=True))
    return findings, conversation


def reason_of(error: UserError, row: Row) -> str:
    """The error without the place, which the finding names."""
    return str(error).removeprefix(f"{row.source}: ")


def encoding_damage(text: str) -> str | None:
    """What in a text looks like a wrong encoding somewhere on its way here; None where nothing does."""
    control = _CONTROL.search(text)
    if control is not None:
        return f"control character {control[0]!r}"
    if text.isascii():
        return None
    for sign in ("\ufffd", "锟斤拷"):
        if sign in text:
            return f"{sign!r}, which stands where bytes were no text"
    for read_as in ("cp1252", "gb18030"):
        meant = recoded(text, read_as, "utf-8")
        if meant is not None and (read_as == "cp1252" or _CJK.search(meant)):
            return f"{shown(text)}, which is {shown(meant)} in UTF-8 read as {read_as}"
    run = _LATIN_RUN.search(text)
    meant = recoded(run[0], "latin-1", "gb18030") if run is not None else None
    if run is not None and meant is not None:
        return f"{run[0]!r}, which is {meant!r} in GBK read as latin-1"
    return None


def recoded(text: str, read_as: str, meant: str) -> str | None:
    """What a text was if it was read in the wrong encoding; None where that is impossible."""
    try:
        return text.encode(read_as).decode(meant)
    except UnicodeError:
        return None

"""Files to rows: every row with its file and line, and every row that cannot be read with the reason.

A file holds JSON lines, one array, or objects one after another on several lines each; its content tells which.
Nothing is dropped in silence: what is not a `Row` is a `BadRow`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from chatglm_ptuning.errors import UserError

_BLANKS = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


class Row(NamedTuple):
    """One value of a file; `source` is "file:line"."""

    source: str
    value: Any


class BadRow(NamedTuple):
    """A place of a file that holds no row; `reason` follows "file:line: "."""

    source: str
    reason: str


def read_rows(path: str | Path, encoding: str = "utf-8") -> Iterator[Row | BadRow]:
    """The rows of a file in order; JSON lines are read line by line, the other forms whole.

    Raises:
        UserError: No such file, or nothing in it.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"a data file must exist, got path={str(path)!r}; check the data section")
    first = first_line(file).decode(encoding, errors="replace")
    if first.lstrip().startswith("[") or not is_complete_json(first):
        yield from read_document(file, encoding)
    else:
        yield from read_lines(file, encoding)


def first_line(file: Path) -> bytes:
    """The first line with anything on it, without a byte order mark."""
    with file.open("rb") as lines:
        for line in lines:
            line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                return line
    raise UserError(f"{file}: a data file must hold at least one row, got an empty file")


def is_complete_json(line: str) -> bool:
    """Whether a line is a JSON value of its own."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def read_lines(file: Path, encoding: str) -> Iterator[Row | BadRow]:
    """One JSON value a line; blank lines are no rows."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            source = f"{file}:{number}"
            try:
                yield Row(source, json.loads(line.decode(encoding)))
            except UnicodeDecodeError as error:
                yield BadRow(source, wrong_encoding(line, encoding, error))
            except (ValueError, RecursionError) as error:
                yield BadRow(source, wrong_json(error, on_one_line=True))


def read_document(file: Path, encoding: str) -> Iterator[Row | BadRow]:
    """The values of a JSON array, or of values one after another, each at the line on which it begins.

    After a value that cannot be read, reading goes on at the next line that begins an object no deeper than the first.
    """
    content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        broken = content.split(b"\n")[line - 1]
        raise UserError(f"{file}:{line}: {wrong_encoding(broken, encoding, error)}") from error
    position = skip_blanks(text, 0)
    in_array = text[position] == "["
    position = skip_blanks(text, position + in_array)
    indent = position - (text.rfind("\n", 0, position) + 1)
    next_row = re.compile(rf"^[ \t]{{0,{indent}}}(?=\{{)", re.MULTILINE)
    line, counted, rows = 1, 0, 0
    while position < len(text):
        if in_array and text[position] == "]" and not rows:
            break
        line += text.count("\n", counted, position)
        counted = position
        source = f"{file}:{line}"
        rows += 1
        try:
            value, end = _DECODER.raw_decode(text, position)
            position = end_of_row(text, end) if in_array else skip_blanks(text, end)
            yield Row(source, value)
        except (ValueError, RecursionError) as error:
            yield BadRow(source, wrong_json(error, on_one_line=False))
            resume = next_row.search(text, position + 1)
            if resume is None:
                return
            position = resume.end()
            continue
        if in_array and text[position - 1] == "]":
            rest = skip_blanks(text, position)
            if rest < len(text):
                line += text.count("\n", counted, rest)
                yield BadRow(f"{file}:{line}", "a JSON array must be the whole file, got more text")
            return
        if in_array:
            position = skip_blanks(text, position)
    if not rows:
        raise UserError(f"{file}: a data file must hold at least one row, got an empty array")
    if in_array:
        yield BadRow(f"{file}:{line}", "a JSON array must end with ']', got the end of the file")


def skip_blanks(text: str, position: int) -> int:
    """The first position from here on that holds no JSON white space."""
    match = _BLANKS.match(text, position)
    return match.end() if match is not None else position


def end_of_row(text: str, position: int) -> int:
    """The position behind the ',' or ']' that closes a value of an array."""
    position = skip_blanks(text, position)
    if text[position : position + 1] not in (",", "]"):
        raise json.JSONDecodeError("Expecting ',' or ']' after a row", text, position)
    return position + 1


def wrong_json(error: Exception, on_one_line: bool) -> str:
    """What to say of text that is not JSON; a row of several lines also needs the line of the file."""
    if isinstance(error, json.JSONDecodeError):
        place = (
            f"column {error.colno}" if on_one_line else f"line {error.lineno}, column {error.colno}"
        )
        return f"a row must be valid JSON, got {error.msg!r} at {place}"
    return f"a row must be valid JSON, got {type(error).__name__}: {error}"


def wrong_encoding(line: bytes, encoding: str, error: UnicodeDecodeError) -> str:
    """What to say of bytes that are not text in this encoding, naming GB18030 where it fits."""
    say = f"text must be {encoding}, got byte 0x{error.object[error.start]:02x}"
    try:
        line.decode("gb18030")
    except UnicodeDecodeError:
        return f"{say}; save the file again as UTF-8"
    return f"{say} that looks like GBK/GB18030; set data.encoding=gb18030 or save the file as UTF-8"

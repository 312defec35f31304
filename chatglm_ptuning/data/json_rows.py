"""Rows of a JSON file: lines, one array, or objects one after another on several lines each.

The content tells which of the three it is.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from chatglm_ptuning.data.rows import BadRow, Row, wrong_encoding
from chatglm_ptuning.errors import UserError

_BLANKS = re.compile(r"[ \t\r\n]*")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of these pairs, none of which may hide another."""
    value = dict(pairs)
    if len(value) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {name!r} more than once in an object")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def read_json(file: Path, stream: IO[bytes], encoding: str) -> Iterator[Row | BadRow]:
    """The rows of a JSON file; lines are read one by one, the other forms whole.

    Raises:
        UserError: A file that is no lines is not in this encoding.
    """
    first = first_line(stream).decode(encoding, errors="replace")
    stream.seek(0)
    if first.lstrip().startswith("[") or not is_complete_json(first):
        yield from read_document(file, stream, encoding)
    else:
        yield from read_lines(file, stream, encoding)


def first_line(stream: IO[bytes]) -> bytes:
    """The first line with anything on it, without a byte order mark; nothing where there is none."""
    lines = (line.removeprefix(b"\xef\xbb\xbf") for line in stream)
    return next((line for line in lines if line.strip()), b"")


def is_complete_json(line: str) -> bool:
    """Whether a line is a JSON value of its own."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def read_lines(file: Path, stream: IO[bytes], encoding: str) -> Iterator[Row | BadRow]:
    """One JSON value a line; blank lines are no rows."""
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        source = f"{file}:{number}"
        try:
            yield Row(source, _DECODER.decode(line.decode(encoding).rstrip("\r\n")))
        except UnicodeDecodeError as error:
            yield BadRow(source, wrong_encoding(line, encoding, error))
        except (ValueError, RecursionError) as error:
            yield BadRow(source, wrong_json(error, on_one_line=True))


def read_document(file: Path, stream: IO[bytes], encoding: str) -> Iterator[Row | BadRow]:
    """The values of a JSON array, or of values one after another, each at the line on which it begins.

    After a value that cannot be read, reading goes on at the next line that begins an object no deeper than the first.
    """
    content = stream.read().removeprefix(b"\xef\xbb\xbf")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        broken = content.split(b"\n")[line - 1]
        raise UserError(f"{file}:{line}: {wrong_encoding(broken, encoding, error)}") from error
    position = skip_blanks(text, 0)
    in_array = text.startswith("[", position)
    position = skip_blanks(text, position + in_array)
    is_closed = in_array and text.startswith("]", position)
    position = skip_blanks(text, position + is_closed)
    indent = position - (text.rfind("\n", 0, position) + 1)
    next_row = re.compile(rf"^[ \t]{{0,{indent}}}(?=\{{)", re.MULTILINE)
    line, counted = 1, 0
    while position < len(text):
        line += text.count("\n", counted, position)
        counted = position
        source = f"{file}:{line}"
        try:
            if is_closed:
                raise json.JSONDecodeError("Extra text after the array", text, position)
            value, end = _DECODER.raw_decode(text, position)
            position = skip_blanks(text, end)
            if in_array:
                is_closed = text.startswith("]", position)
                if not is_closed and not text.startswith(",", position):
                    raise json.JSONDecodeError("Expecting ',' or ']' after a row", text, position)
                position = skip_blanks(text, position + 1)
        except (ValueError, RecursionError) as error:
            yield BadRow(source, wrong_json(error, on_one_line=False))
            resume = next_row.search(text, counted + 1)
            if resume is None:
                return
            position, is_closed = resume.end(), False
        else:
            yield Row(source, value)
    if in_array and not is_closed:
        yield BadRow(f"{file}:{line}", "a JSON array must end with ']', got the end of the file")


def skip_blanks(text: str, position: int) -> int:
    """The first position from here on that holds no JSON white space."""
    match = _BLANKS.match(text, position)
    return match.end() if match is not None else position


def wrong_json(error: Exception, on_one_line: bool) -> str:
    """What to say of text that is not JSON; a row of several lines also needs the line of the file."""
    if isinstance(error, json.JSONDecodeError):
        place = (
            f"column {error.colno}" if on_one_line else f"line {error.lineno}, column {error.colno}"
        )
        return f"a row must be valid JSON, got {error.msg!r} at {place}"
    return f"a row must be valid JSON, got {error}"

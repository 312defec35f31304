"""What reading gives: a row, or a place where there should be one."""

from typing import Any, NamedTuple


class Row(NamedTuple):
    """One value of a file; `source` is "file:line"."""

    source: str
    value: Any


class BadRow(NamedTuple):
    """A place of a file that holds no row; `reason` follows "file:line: "."""

    source: str
    reason: str


def wrong_encoding(line: bytes, encoding: str, error: UnicodeDecodeError) -> str:
    """What to say of bytes that are not text in this encoding, naming UTF-16 or GB18030 where it fits."""
    say = f"text must be {encoding}, got byte 0x{error.object[error.start]:02x}"
    if b"\0" in line:
        return f"{say} in what looks like UTF-16; save the file again as UTF-8"
    try:
        line.decode("gb18030")
    except UnicodeDecodeError:
        return f"{say}; save the file again as UTF-8"
    return f"{say} that looks like GBK/GB18030; set data.encoding=gb18030 or save the file as UTF-8"

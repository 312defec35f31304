"""Files to rows: every row with its file and line, and every row that cannot be read with the reason.

JSON in any form (`data.json_rows`), CSV, TSV, Parquet (`data.tables`), each but Parquet also as .gz; folders; and data
sets on the Hugging Face hub as "hf:owner/name". Nothing is dropped in silence: what is not a `Row` is a `BadRow`.
"""

import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

from chatglm_ptuning.data.json_rows import read_json
from chatglm_ptuning.data.rows import BadRow, Row
from chatglm_ptuning.data.tables import read_csv, read_hub, read_parquet
from chatglm_ptuning.errors import UserError

HUB = "hf:"
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")


def data_files(paths: str | Sequence[str]) -> list[str]:
    """The files that paths stand for; of a folder those in it with a known suffix, sorted by name.

    Raises:
        UserError: A path that does not exist, or a folder without data files.
    """
    files: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        path = os.path.expanduser(path)
        if path.startswith(HUB) or Path(path).is_file():
            files.append(path)
        elif Path(path).is_dir():
            found = [
                file
                for file in sorted(Path(path).iterdir())
                if kind(file) in SUFFIXES and file.is_file()
            ]
            if not found:
                raise UserError(
                    f"{path}: a data folder must hold {', '.join(SUFFIXES)} files, got none"
                )
            files += map(str, found)
        else:
            raise UserError(f"a data file must exist, got path={path!r}; check the data section")
    return files


def kind(file: Path) -> str:
    """The suffix that tells the form: ".csv" for both rows.csv and rows.csv.gz."""
    return Path(file.stem if file.suffix == ".gz" else file.name).suffix.lower()


def read_rows(path: str, encoding: str = "utf-8") -> Iterator[Row | BadRow]:
    """The rows of a file or data set in order.

    Raises:
        UserError: Nothing in it, or it cannot be read at all.
    """
    empty = True
    for row in hub_or_file(path, encoding):
        empty = False
        yield row
    if empty:
        raise UserError(f"{path}: a data file must hold at least one row, got an empty one")


def hub_or_file(path: str, encoding: str) -> Iterator[Row | BadRow]:
    """See `read_rows`."""
    if path.startswith(HUB):
        yield from read_hub(path.removeprefix(HUB))
        return
    (name,) = data_files([path])
    file = Path(name)
    if kind(file) == ".parquet":
        yield from read_parquet(file)
        return
    read = read_csv if kind(file) in (".csv", ".tsv") else read_json
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            yield from read(file, cast(IO[bytes], stream), encoding)
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(
            f"{path}: a data file must be whole and readable, got {error}; copy it again"
        ) from error

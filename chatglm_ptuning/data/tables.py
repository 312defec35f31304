"""Rows of CSV, TSV and Parquet files, and of data sets on the Hugging Face hub."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from chatglm_ptuning.data.rows import BadRow, Row, wrong_encoding
from chatglm_ptuning.errors import UserError

LONGEST_FIELD = 2**31 - 1  # characters; the csv module stops at 131072 unless told


def read_csv(file: Path, stream: IO[bytes], encoding: str) -> Iterator[Row | BadRow]:
    """Rows of a CSV or TSV file by the names in its first line; a row stands at the line on which it begins.

    Raises:
        UserError: The header or the text encoding is wrong.
    """
    csv.field_size_limit(LONGEST_FIELD)
    delimiter = "\t" if ".tsv" in [suffix.lower() for suffix in file.suffixes] else ","
    reader = csv.reader(decoded_lines(file, stream, encoding), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    while True:
        source = f"{file}:{line}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield BadRow(
                source, f"a row must be valid CSV, got {str(error)!r} at line {reader.line_num}"
            )
            line = reader.line_num + 1
            continue
        line = reader.line_num + 1
        if fields is None:
            return
        if not fields:  # a blank line
            continue
        if not header:
            header = fields
            if len(set(header)) < len(header):
                raise UserError(f"{source}: the columns must have different names, got {header}")
        elif len(fields) != len(header):
            yield BadRow(
                source, f"a row must have {len(header)} fields as the header has, got {len(fields)}"
            )
        else:
            yield Row(source, dict(zip(header, fields, strict=True)))


def decoded_lines(file: Path, stream: IO[bytes], encoding: str) -> Iterator[str]:
    """The lines of a text file, without a byte order mark.

    Raises:
        UserError: A line is not in this encoding.
    """
    for number, line in enumerate(stream, 1):
        try:
            yield (
                line.removeprefix(b"\xef\xbb\xbf").decode(encoding)
                if number == 1
                else line.decode(encoding)
            )
        except UnicodeDecodeError as error:
            raise UserError(f"{file}:{number}: {wrong_encoding(line, encoding, error)}") from error


def read_parquet(file: Path) -> Iterator[Row]:
    """Rows of a Parquet file, some hundreds in memory at a time; its "lines" are row numbers from 1.

    Raises:
        UserError: pyarrow is missing, or the file is no Parquet.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"{file}: Parquet must be read with pyarrow, got none; pip install pyarrow"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=512):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(f"{file}:{number}", value)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{file}: a .parquet file must be Parquet, got {str(error).rstrip('.')}; copy it again"
        ) from error


def read_hub(name: str) -> Iterator[Row]:
    """Rows of a data set on the hub, streamed.

    Args:
        name: "owner/name" for its train split, "owner/name/split" for another.

    Raises:
        UserError: The `datasets` package is missing, the name has no owner, or the data set cannot be opened.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"hf:{name} must be read with the datasets package, got none; pip install datasets"
        ) from error
    owner, _, rest = name.partition("/")
    dataset, _, split = rest.partition("/")
    if not dataset:
        raise UserError(f"a data set on the hub must be named hf:owner/name, got 'hf:{name}'")
    try:
        rows = datasets.load_dataset(
            f"{owner}/{dataset}", split=split if split else "train", streaming=True
        )
        for number, value in enumerate(rows, 1):
            yield Row(f"hf:{name}:{number}", value)
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # among them: no network, no such name, no such split
        first = str(error).strip().split("\n")[0]
        raise UserError(
            f"hf:{name} must be a data set that can be opened from here, got {first}"
        ) from error

"""Encoded data on disk: a directory per content, found by a key over everything that its tokens depend on."""

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from chatglm_ptuning.data.config import DataConfig
from chatglm_ptuning.data.conversation import Conversation, Message
from chatglm_ptuning.data.dataset import TokenDataset, encode_into
from chatglm_ptuning.data.reading import HUB, data_files
from chatglm_ptuning.data.report import DataReport
from chatglm_ptuning.data.template import Template
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.version import __version__

_UNRELATED = (  # settings that no token depends on; the files themselves are a part of the key
    "train_file", "validation_file", "test_file",
    "cache_dir", "packing", "packing_length", "streaming", "shuffle_buffer_size",
)  # fmt: skip
_FILES = {"input_ids": "int32", "labels": "int32", "ends": "int64"}
_REPORT = "report.json"  # written last: a directory that has it is whole


def cached_dataset(
    directory: str,
    paths: Sequence[str],
    read: Callable[[DataReport], Iterable[Conversation]],
    template: Template,
    tokenizer: Any,
    config: DataConfig,
    split: str,
) -> tuple[TokenDataset, DataReport]:
    """The encoded data set from its cache, encoding it first where there is none; it stays on disk, mapped.

    Args:
        directory: Where caches are.
        paths: The files; their content is part of the key.
        read: Gives the conversations.
        template: The chat format.
        tokenizer: The model's tokenizer.
        config: The `data` section.
        split: "train", "validation" or "test".

    Raises:
        UserError: A data set on the hub, whose content is not known before it is read; or no directory can be made.
    """
    directory = os.path.expanduser(directory)
    folder = Path(directory, cache_key(paths, template, tokenizer, config, split))
    if not (folder / _REPORT).is_file():
        try:
            work = Path(directory, f"writing-{uuid4().hex}")  # mkdtemp's nobody else may read
            work.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"data.cache_dir must be a directory that can be written, got {directory!r}: {error.strerror}"
            ) from error
        try:
            write(work, read, template, tokenizer, config)
            os.rename(work, folder)
        except OSError:
            if not (folder / _REPORT).is_file():  # else another process was first
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    report = DataReport.from_dict(json.loads((folder / _REPORT).read_text(encoding="utf-8")))
    stored = [
        np.memmap(folder / name, dtype=dtype, mode="r")
        if (folder / name).stat().st_size
        else array("i")
        for name, dtype in _FILES.items()
    ]
    return TokenDataset(*stored), report


def write(
    folder: Path,
    read: Callable[[DataReport], Iterable[Conversation]],
    template: Template,
    tokenizer: Any,
    config: DataConfig,
) -> None:
    """Encode into files, holding one example at a time."""
    report = DataReport()
    with (
        (folder / "input_ids").open("wb") as ids_file,
        (folder / "labels").open("wb") as labels_file,
        (folder / "ends").open("wb") as ends_file,
    ):
        ends_file.write(array("q", [0]).tobytes())
        end = 0

        def append(input_ids: Sequence[int], labels: Sequence[int]) -> None:
            nonlocal end
            end += len(input_ids)
            ids_file.write(array("i", input_ids).tobytes())
            labels_file.write(array("i", labels).tobytes())
            ends_file.write(array("q", [end]).tobytes())

        encode_into(append, read(report), template, tokenizer, config, report)
    (folder / _REPORT).write_text(
        json.dumps(report.to_dict(), ensure_ascii=False), encoding="utf-8"
    )


def cache_key(
    paths: Sequence[str], template: Template, tokenizer: Any, config: DataConfig, split: str
) -> str:
    """A name for encoded data: equal exactly where files, settings, template and tokenizer are.

    Raises:
        UserError: A data set on the hub is among the files.
    """
    probe = (Message("user", "问 Q"), Message("assistant", "答 A"))  # a changed program shows here
    settings = {name: value for name, value in asdict(config).items() if name not in _UNRELATED}
    parts = {
        "version": __version__,
        "split": split,
        "settings": settings,
        "template": template.name,
        "probe": template.encode_conversation(tokenizer, Conversation(probe)),
        "tokenizer": tokenizer_digest(tokenizer),
        "files": [[file, file_digest(file)] for path in paths for file in data_files(path)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of what `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
        return " ".join(f"{file.name} {file_digest(str(file))}" for file in files)


def file_digest(file: str) -> str:
    """SHA-256 of a file.

    Raises:
        UserError: A data set on the hub.
    """
    if file.startswith(HUB):
        raise UserError(
            f"data.cache_dir must be used with files, got {file!r}; leave it out or download the data set"
        )
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()

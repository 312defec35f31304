"""The rows of a run's train, validation and test files, ready for the Trainer: in memory, from a cache, or streamed."""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

from chatglm_ptuning.data.cache import cached_dataset
from chatglm_ptuning.data.config import DataConfig
from chatglm_ptuning.data.conversation import Conversation
from chatglm_ptuning.data.dataset import TokenDataset, encode_into, require_rows
from chatglm_ptuning.data.formats import conversation_from_row
from chatglm_ptuning.data.packing import PackedDataset
from chatglm_ptuning.data.reading import data_files, read_rows
from chatglm_ptuning.data.report import DataReport
from chatglm_ptuning.data.rows import BadRow
from chatglm_ptuning.data.streaming import StreamingDataset
from chatglm_ptuning.data.template import Template
from chatglm_ptuning.errors import UserError

SPLITS = ("train", "validation", "test")


def build_dataset(
    config: DataConfig, split: str, template: Template, tokenizer: Any
) -> tuple[TokenDataset | PackedDataset | StreamingDataset, DataReport]:
    """Make the data set of a split as the `data` section says: weighted, cached, packed or streamed (train only).

    Args:
        config: The `data` section.
        split: "train", "validation" or "test".
        template: The chat format.
        tokenizer: The model's tokenizer.

    Returns:
        The data set and the account of its rows; a streamed one goes on filling its account.

    Raises:
        UserError: No file is named for the split, or its rows are wrong, with `file:line:`.
    """
    if split == "train" and config.streaming:
        report = DataReport()
        data_files(split_paths(config, split))  # a path that is not there shows now
        read = partial(read_split, config, split, report)
        return StreamingDataset(read, template, tokenizer, config, report), report
    if config.cache_dir is not None:
        dataset, report = cached_dataset(
            config.cache_dir,
            split_paths(config, split),
            lambda report: read_split(config, split, report),
            template,
            tokenizer,
            config,
            split,
        )
    else:
        dataset, report = TokenDataset(), DataReport()
        encode_into(
            dataset.append, read_split(config, split, report), template, tokenizer, config, report
        )
    require_rows(report)
    if split == "train" and config.packing:
        return PackedDataset(dataset, config.packed_length), report
    return dataset, report


def split_paths(config: DataConfig, split: str) -> list[str]:
    """The paths that the `data` section names for a split.

    Raises:
        UserError: None.
    """
    paths = getattr(config, f"{split}_file")
    if not paths:
        raise UserError(f"data.{split}_file must be given, got {paths!r}")
    return [paths] if isinstance(paths, str) else list(paths)


def read_split(
    config: DataConfig, split: str, report: DataReport, epoch: int = 0
) -> Iterator[Conversation]:
    """The conversations of a split in the order of its files; training rows as often as `train_weights` says.

    Which rows a weight below 1 draws depends on `config.seed` and the epoch alone.

    Raises:
        UserError: A row that cannot be read, with `file:line:`.
    """
    paths, weights = split_paths(config, split), config.train_weights
    is_train = split == "train"
    if weights is None or not is_train:
        weights = [1.0] * len(paths)
    limit = config.max_train_samples if is_train else config.max_eval_samples
    return islice(draw_rows(config, paths, weights, report, epoch), limit)


def draw_rows(
    config: DataConfig,
    paths: Sequence[str],
    weights: Sequence[float],
    report: DataReport,
    epoch: int,
) -> Iterator[Conversation]:
    """The conversations of files, each as often as the weight of its path says; see `read_split`."""
    draw = random.Random(f"{config.seed} {epoch}")
    for path, weight in zip(paths, weights, strict=True):
        for file in data_files(path):
            for row in read_rows(file, config.encoding):
                if isinstance(row, BadRow):
                    raise UserError(f"{row.source}: {row.reason}")
                times = int(weight) + (draw.random() < weight % 1)
                if not times:
                    report.rows += 1
                    report.skip("not drawn by data.train_weights", row.source)
                    continue
                conversation = conversation_from_row(row, config)
                for _ in range(times):
                    yield conversation

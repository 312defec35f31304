"""Several examples in one row, so that no token of a batch is padding.

A packed row has one more key, `attention_mask`: 1 at the tokens of its first example, 2 at those of the second, and so
on. The model sees to it that a token attends to its own example only and that positions start anew in each.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch

from chatglm_ptuning.data.dataset import TokenDataset


class PackedDataset(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Rows of at most `length` tokens, each of one or more whole examples.

    Args:
        examples: What is packed.
        length: Longest row in tokens; an example that is longer has a row of its own.
    """

    def __init__(self, examples: TokenDataset, length: int) -> None:
        self.examples = examples
        self.bins = pack(examples.lengths, length)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "attention_mask": []}
        for segment, example in enumerate((self.examples[i] for i in self.bins[index]), 1):
            row["input_ids"] += example["input_ids"]
            row["labels"] += example["labels"]
            row["attention_mask"] += [segment] * len(example["input_ids"])
        return row


def pack(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Put examples into as few rows as best-fit decreasing finds: longest first, into the row that they fill up most.

    Deterministic; takes n log n steps for n examples.

    Args:
        lengths: Tokens of each example.
        length: Tokens that a row has room for.

    Returns:
        The examples of each row by number, in rising order; the rows in the order of their first example.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            left, row = length, len(bins)
            bins.append([])
        else:
            left, row = room.pop(place)
        bins[row].append(index)
        insort(room, (left - lengths[index], row))
    return sorted(sorted(row) for row in bins)

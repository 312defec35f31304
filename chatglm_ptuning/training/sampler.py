"""Batches of like length in random order, the same order again in a resumed run."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class LengthGroupedSampler(Sampler[int]):
    """Shuffles rows, then sorts each run of a few batches by length, longest first.

    transformers' own draws from the global random state when an epoch begins, which a run resumed in mid-epoch no
    longer has; this one depends on seed and epoch alone. The longest row of an epoch comes first, so that a run that
    does not fit in memory fails at once.

    Args:
        lengths: Tokens of every row.
        group_size: Rows sorted together, a multiple of the rows of an optimizer step.
        seed: Of the order.
    """

    def __init__(self, lengths: Sequence[int], group_size: int, seed: int) -> None:
        self.lengths = torch.tensor(lengths)
        self.group_size = group_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        groups = torch.randperm(len(self), generator=generator).split(self.group_size)
        order = [g[self.lengths[g].argsort(descending=True, stable=True)] for g in groups]
        # The longest row of all leads its group: that group goes first.
        order.insert(0, order.pop(max(range(len(order)), key=lambda i: self.lengths[order[i][0]])))
        return iter(torch.cat(order).tolist())

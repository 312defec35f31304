"""Keys and values of a batch whose rows come and go.

All rows end at the same column, so that one forward pass writes the next token of every row into one column; what lies
to the left of a shorter row is masked. A row that joins is copied in before that column, one that leaves is overwritten
by the last row: nobody else moves. The buffer is larger than what it holds and grows in steps, so a token costs no copy
of the whole, as it does with transformers' DynamicCache.

Shapes: L layers, R rows of the buffer, K key-value heads, C columns of the buffer, D channels of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

SLACK = 128  # columns: a new buffer is made after so many tokens


class BatchCache(Cache):
    """Keys and values of the running rows, and the mask that tells each row what is its own.

    Args:
        num_layers: L.
        num_key_value_heads: K.
        head_dim: D.
        dtype: Of keys and values.
        device: Where they are.
    """

    def __init__(
        self,
        num_layers: int,
        num_key_value_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Zeros where a row has nothing, never what was left there: a masked NaN is still NaN.
        self.buffer = torch.zeros(
            num_layers, 2, 0, num_key_value_heads, 0, head_dim, dtype=dtype, device=device
        )
        self.lengths: list[int] = []
        self.end = 0
        super().__init__(layers=[_Layer(self, index) for index in range(num_layers)])

    @property
    def width(self) -> int:
        """Columns in use: the length of the longest row, in tokens."""
        return max(self.lengths, default=0)

    def add_rows(self, rows: Sequence[Sequence[Tensor]]) -> None:
        """Let rows join.

        Args:
            rows: Of each its parts one after another, each [L, 2, K, tokens, D].
        """
        lengths = [sum(part.shape[3] for part in parts) for parts in rows]
        self._make_room(len(self.lengths) + len(rows), max([self.width, *lengths]), 1)
        for parts, length in zip(rows, lengths, strict=True):
            row, column = len(self.lengths), self.end - length
            self.buffer[:, :, row, :, :column] = 0
            for part in parts:
                self.buffer[:, :, row, :, column : column + part.shape[3]] = part
                column += part.shape[3]
            self.lengths.append(length)

    def remove_row(self, row: int) -> None:
        """Let a row leave; the last row takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            self.buffer[:, :, row] = self.buffer[:, :, last]
            self.lengths[row] = self.lengths[last]
        del self.lengths[last]

    def next_token(self) -> Tensor:
        """Open the column of the next token; the forward pass that follows fills it.

        Returns:
            Attention mask [rows, width]: 1 where a row has a token, the new one included.
        """
        self._make_room(len(self.lengths), self.width, 1)
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]
        return tokens_mask(self.lengths, self.width, self.buffer.device)

    def _make_room(self, rows: int, before: int, after: int) -> None:
        """See to it that there are so many rows, and so many columns before `end` and after it.

        A new buffer is as large as is needed now and SLACK columns larger, however large the old one was. It takes the
        old one's place once it is filled: where memory is full, the rows stay as they were.
        """
        old, taken, width = self.buffer, len(self.lengths), self.width
        layers, parts, has_rows, heads, has_columns, channels = old.shape
        if rows <= has_rows and before <= self.end and self.end + after <= has_columns:
            return
        new = old.new_zeros(layers, parts, rows, heads, before + after + SLACK, channels)
        new[:, :, :taken, :, before - width : before] = old[
            :, :, :taken, :, self.end - width : self.end
        ]
        self.buffer, self.end = new, before


class _Layer(DynamicLayer):
    """One layer of a `BatchCache`, as the models of transformers expect it."""

    def __init__(self, cache: BatchCache, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Fill the open column with [rows, K, 1, D]; all columns in use [rows, K, width, D], as views."""
        cache = self.cache
        columns = slice(cache.end - cache.width, cache.end)
        keys, values = cache.buffer[self.index, :, : len(cache.lengths), :, columns]
        keys[:, :, -1:] = key_states
        values[:, :, -1:] = value_states
        return keys, values

    def get_seq_length(self) -> int:
        """Columns in use before the open one."""
        return self.cache.width - 1


def tokens_mask(lengths: Sequence[int], width: int, device: torch.device) -> Tensor:
    """1 at the last `lengths` of `width` columns, 0 before: [rows, width]."""
    columns = torch.arange(width, device=device)
    return (columns >= width - torch.tensor(lengths, device=device)[:, None]).long()

"""Where soft prompts and tokens stand in a lengthened batch, packed rows included: columns, masks, positions.

Shapes: B batch, S tokens of the call, P virtual tokens (of the longest prompt in the batch), T tokens that the decoder
gets.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def apart(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask [B, T] as it is; if it numbers the examples of a packed row, as added scores [B, 1, T, T] that part them.

    transformers' own decoders know 0 and 1 only. Every token sees its example up to itself; padding sees itself.
    """
    if mask.max() <= 1:
        return mask
    same = (mask[:, None] == mask[..., None]) & (mask[:, None] > 0)
    itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    hidden = ~(same.tril() | itself)[:, None]
    return hidden.to(dtype).masked_fill(hidden, torch.finfo(dtype).min)


def count_tokens(mask: Tensor) -> Tensor:
    """Number the real tokens of each example 0, 1, 2, ...: [B, S]; padding has any number.

    Args:
        mask: [B, S], 0 for padding, 1 for a real token; 1, 2, 3, ... for the examples of a packed row.
    """
    real = mask > 0
    before = real.cumsum(-1) - real.long()
    starts = F.pad(mask[:, 1:] != mask[:, :-1], (1, 0), value=True) & real
    return before - torch.where(starts, before, 0).cummax(-1).values


def shift(positions: Tensor, lengths: Tensor) -> Tensor:
    """Move positions [1 or B, S] or [1 or B, axes, S] by every row's prompt, on the first axis."""
    if positions.ndim == 2:
        return positions + lengths[:, None]
    first = positions[:, :1] + lengths[:, None, None]
    return torch.cat((first, positions[:, 1:].expand(len(first), -1, -1)), dim=1)


@dataclass
class Layout:
    """Where prompts and tokens of a call go: in front of each example of a row P columns, then its tokens.

    Args:
        columns: [B, S], the new column of every token.
        source: [B, T], what is in a new column: 0 to P - 1 for vectors of the prompt, P and more for tokens.
        mask: [B, T], as the caller's; 0 also where a row's prompt is shorter or absent.
    """

    columns: Tensor
    source: Tensor
    mask: Tensor

    @classmethod
    def of(cls, mask: Tensor, lengths: Tensor, longest: int) -> "Layout":
        """Lay out rows by the caller's mask [B, S] and the lengths [B] of their prompts, of which P is the longest."""
        segments = mask.long()
        # Padding belongs to the example before it, on the left to the first.
        example = segments.cummax(-1).values.clamp(min=1)
        tokens = torch.arange(mask.shape[1], device=mask.device)
        columns = tokens + longest * example
        total = mask.shape[1] + longest * int(example.max())
        place = segments.new_full((len(mask), total), -1).scatter(
            1, columns, tokens.expand_as(columns)
        )
        # The columns that no token has: the prompts, in order of the examples; after the last one a shorter row's end.
        free = (place < 0).cumsum(-1) - 1
        # A shorter prompt's vectors stand right before the tokens: where positions alone part the examples of a packed
        # row, what is in front of them is apart as well.
        vector = free % longest - (longest - lengths[:, None])
        owner = free.div(longest, rounding_mode="floor") + 1
        seen = (vector >= 0) & (owner <= example[:, -1:])
        own = segments.gather(1, place.clamp(min=0))
        return cls(
            columns,
            source=torch.where(place < 0, vector.clamp(min=0), longest + place),
            mask=torch.where(place < 0, owner * seen, own).to(mask.dtype),
        )

    def number(self, positions: Tensor) -> Tensor:
        """Positions of the new columns, [B, T] or [B, axes, T], from those of the tokens."""
        if positions.ndim == 2:
            return self.source.scatter(1, self.columns, positions)
        whole = torch.stack([self.source, *[0 * self.source] * (positions.shape[1] - 1)], dim=1)
        return whole.scatter(2, self.columns[:, None].expand_as(positions), positions)

"""Packed rows for every model: each example in a row attends to itself alone and counts its positions from 0."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel


def separate_examples(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """Say in a model's own words which tokens of a row belong together.

    ChatGLM-6B reads the numbers of the examples off `attention_mask` itself, its 2D positions and bidirectional
    contexts need them. The decoders of transformers take positions that start anew instead, from which they make the
    block-diagonal causal mask of whatever implementation of attention they use: only without a mask and without a
    cache. A prefix in front stays visible to every example.

    Args:
        model: The model itself, not what wraps it.
        inputs: Of its forward; `attention_mask` [batch, seq_len] is 1, 2, 3, ... at the tokens of the first, second,
            third example of a row, 0 at pads.

    Returns:
        The inputs themselves where no row is packed, or the model understands them.
    """
    examples = inputs["attention_mask"]
    if hasattr(model.get_decoder(), "get_position_ids") or int(examples.max()) <= 1:
        return inputs
    return {
        **inputs,
        "attention_mask": None,
        "position_ids": restarting_positions(examples),
        "use_cache": False,
    }


def restarting_positions(examples: Tensor) -> Tensor:
    """Positions 0, 1, 2, ... of the tokens in their examples.

    Args:
        examples: [batch, seq_len], the number of each token's example, 0 at pads.

    Returns:
        [batch, seq_len], 0 at pads: each pad is an example of its own.
    """
    index = torch.arange(examples.shape[1], device=examples.device).expand_as(examples)
    is_start = F.pad(examples[:, 1:] != examples[:, :-1], (1, 0), value=True)
    start = torch.where(is_start, index, 0).cummax(dim=-1).values
    return (index - start) * (examples > 0)

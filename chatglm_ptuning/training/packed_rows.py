"""Packed rows for every model: each example in a row attends to itself alone and counts its positions from 0."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel


@contextmanager
def examples_apart(model: PreTrainedModel, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Within it, a model run on what this gives keeps the examples of a packed row apart.

    ChatGLM-6B reads the numbers of the examples off `attention_mask` itself; its 2D positions and bidirectional
    contexts need them. The decoders of transformers are given positions that start anew instead. From those they make
    the block-diagonal causal mask of whatever implementation of attention they use, but only without a mask and a
    cache, so both are taken away at the last moment: soft prompts need the numbers to give every example its own.
    A prefix in front stays visible to all.

    Args:
        model: The model itself, not what wraps it.
        inputs: Of its forward; `attention_mask` [batch, seq_len] is 1, 2, 3, ... at the tokens of the first, second,
            third example of a row, 0 at pads.
    """
    decoder, examples = model.get_decoder(), inputs["attention_mask"]
    if hasattr(decoder, "get_position_ids") or int(examples.max()) <= 1:
        yield inputs
        return

    def leave_to_positions(
        decoder: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"attention_mask": None, "use_cache": False}

    handle = decoder.register_forward_pre_hook(leave_to_positions, with_kwargs=True)
    try:
        yield inputs | {"position_ids": restarting_positions(examples)}
    finally:
        handle.remove()


def restarting_positions(examples: Tensor) -> Tensor:
    """Positions 0, 1, 2, ... of the tokens in their examples.

    Args:
        examples: [batch, seq_len], the number of each token's example, 0 at pads.

    Returns:
        [batch, seq_len], 0 at pads, which makes each pad an example of its own.
    """
    index = torch.arange(examples.shape[1], device=examples.device).expand_as(examples)
    is_start = F.pad(examples[:, 1:] != examples[:, :-1], (1, 0), value=True)
    start = torch.where(is_start, index, 0).cummax(dim=-1).values
    return (index - start) * (examples > 0)

"""Attention with a prefix: registered beside transformers' own implementations, around which it is.

Shapes: B batch, S new tokens, T cached and new tokens, P virtual tokens, L layers, H heads, K key-value heads,
D channels of a head.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chatglm_ptuning.errors import UserError

TAKING = "prefix_"  # in front of the name of an implementation of attention that takes a prefix


@dataclass
class PrefixKeyValues:
    """The prefix of one forward pass, as it travels down to the attention function.

    Args:
        key_values: [L, 2, 1 or B, K, P, D].
        visible: Boolean [B, P], False where a row's prefix is shorter or absent; None if all see all.
        dropout: Probability for every entry of every row, 0 outside training.
    """

    key_values: Tensor
    visible: Tensor | None
    dropout: float

    def of_layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of one layer: [B, K, P, D] each, in dtype and batch size of `like`."""
        rows = self.key_values[index].to(like.dtype).expand(-1, like.shape[0], -1, -1, -1)
        key, value = F.dropout(rows, self.dropout) if self.dropout else rows
        return key, value


def extend_mask(mask: Tensor, prefix: PrefixKeyValues, length: int) -> Tensor:
    """Put P columns before a mask [1 or B, 1 or H, S, T], boolean (True visible) or added to the scores."""
    batch = mask.shape[0] if prefix.visible is None else prefix.visible.shape[0]
    mask = mask.expand(batch, -1, -1, -1)
    columns = mask.new_ones(()) if mask.dtype == torch.bool else mask.new_zeros(())
    columns = columns.expand(*mask.shape[:-1], length)
    if prefix.visible is not None:
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        columns = columns.masked_fill(~prefix.visible[:, None, None], hidden)
    return torch.cat((columns, mask), dim=-1)


def attend_with_prefix(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    implementation: str,
    prefix: PrefixKeyValues | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers that puts the prefix first and leaves the rest to another one.

    Args:
        module: The attention layer; tells its index.
        query: [B, H, S, D].
        key: [B, K, T, D], as the cache returned it.
        value: [B, K, T, D].
        attention_mask: [B, 1, S, T]; None where the mask is exactly causal.
        implementation: The one wrapped: "sdpa" or "eager".
        prefix: What the hook handed in; None to run the wrapped one alone.
        kwargs: Handed on.

    Returns:
        Context [B, S, H, D], and attention weights where the wrapped function gives them.
    """
    # A modeling file calls its own eager attention by this name; the registry does not hold it.
    own_eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    wrapped: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, own_eager)
    if prefix is None:
        return wrapped(module, query, key, value, attention_mask, **kwargs)
    length = query.shape[2]
    if attention_mask is None and length > 1:
        # Nothing is padded and the cache was empty. A static cache is longer than the tokens it holds: the rest of it
        # lies in the future of all of them.
        key, value = key[:, :, :length], value[:, :, :length]
    prefix_key, prefix_value = prefix.of_layer(module.layer_idx, key)
    virtual = prefix_key.shape[2]
    key, value = torch.cat((prefix_key, key), dim=2), torch.cat((prefix_value, value), dim=2)
    if attention_mask is not None:
        attention_mask = extend_mask(attention_mask, prefix, virtual)
    elif prefix.visible is not None:
        causal = torch.ones(length, key.shape[2] - virtual, dtype=torch.bool, device=key.device)
        if length > 1:
            causal = causal.tril()
        attention_mask = extend_mask(causal[None, None], prefix, virtual)
    elif length > 1:
        attention_mask = causal_lower_right(length, key.shape[2])
    return wrapped(module, query, key, value, attention_mask, **kwargs)


WRAPPED: dict[str, Callable] = {"sdpa": sdpa_mask, "eager": eager_mask}
for name, mask_function in WRAPPED.items():
    AttentionInterface.register(TAKING + name, partial(attend_with_prefix, implementation=name))
    AttentionMaskInterface.register(TAKING + name, mask_function)


def wrap_attention(decoder: PreTrainedModel) -> None:
    """Choose, in place of a decoder's implementation of attention, the one around it that takes a prefix.

    Raises:
        UserError: It is none of those wrapped here.
    """
    implementation = decoder.config._attn_implementation
    if implementation.startswith(TAKING):
        return
    if implementation not in WRAPPED:
        raise UserError(
            f"attn_implementation must be one of {sorted(WRAPPED)} for a prefix, got {implementation!r};"
            " sdpa runs the fused kernels"
        )
    decoder.set_attn_implementation(TAKING + implementation)


def unwrap_attention(decoder: PreTrainedModel) -> None:
    """Give a decoder its own attention back."""
    decoder.set_attn_implementation(decoder.config._attn_implementation.removeprefix(TAKING))

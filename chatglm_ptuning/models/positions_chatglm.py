"""Where a token of ChatGLM-6B stands and what it sees, from ids and padding mask, on the device.

GLM (Du et al., arXiv 2103.10360, section 2.3) numbers tokens on two axes. The context is 0, 1, 2, ... on the first and
0 on the second. From `<sop>` on, every token has the place of the blank it fills, `[gMASK]` (or, without one, the first
`[MASK]`), on the first axis and 1, 2, 3, ... on the second. The context is visible to all; the answer is causal.

A row may hold several examples (packing): `attention_mask` is then 1, 2, 3, ... instead of 1, and 0 for padding.
Everything below is counted within such a segment.

Shapes: B batch, S new tokens, T tokens seen so far (cache and new ones).
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

from chatglm_ptuning.models.configuration_chatglm import ChatGLMConfig


def segment_starts(segments: Tensor) -> Tensor:
    """True where a segment begins: [B, S] bool."""
    return F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)


def count_in_segment(flags: Tensor, starts: Tensor) -> Tensor:
    """Running count of the True flags since the segment began: [B, S] long."""
    total = flags.long().cumsum(-1)
    before = torch.where(starts, total - flags.long(), 0).cummax(-1).values
    return total - before


def make_position_ids(
    config: ChatGLMConfig, input_ids: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Number the tokens of whole sequences.

    With `position_encoding_2d` False there is no second axis: after `[gMASK]` the positions run on, after `[MASK]`
    they stay at its place.

    Args:
        config: Gives the ids of `<sop>`, `[gMASK]` and `[MASK]`.
        input_ids: [B, S].
        attention_mask: [B, S], 0 for padding; None if there is none.

    Returns:
        [B, 2, S], or [B, S] for one axis; 0 on padding.
    """
    segments = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    starts = segment_starts(segments)
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    start = torch.where(starts, index, 0).cummax(-1).values

    def first_place(token_id: int) -> Tensor:
        """Where the token stood first in the segment read so far; -1 if it has not come."""
        is_token = input_ids == token_id
        is_first = is_token & (count_in_segment(is_token, starts) == 1)
        place = torch.where(is_first, index, -1).cummax(-1).values
        return torch.where(place >= start, place - start, -1)

    position = index - start
    gmask, mask = first_place(config.gmask_token_id), first_place(config.mask_token_id)
    is_answer = count_in_segment(input_ids == config.bos_token_id, starts) > 0
    if not config.position_encoding_2d:
        return torch.where(is_answer & (gmask < 0), mask, position) * (segments > 0)
    position = torch.where(is_answer, torch.where(gmask >= 0, gmask, mask), position)
    block_position = count_in_segment(is_answer, starts)
    return torch.stack((position, block_position), dim=1) * (segments > 0)[:, None]


def make_mask(
    config: ChatGLMConfig,
    input_ids: Tensor | None,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
) -> Tensor:
    """Who sees whom: every token what came before it, and all of the context.

    Args:
        config: Gives the id of `<sop>`.
        input_ids: [B, S] new tokens; needed where there is no second position axis to tell the context.
        position_ids: [B, 2, S] or [B, S].
        attention_mask: [B, T], 0 for padding; None if there is none.
        past_key_values: The cache before this step; all it holds is visible to the new tokens.

    Returns:
        Boolean [B, 1, S, T], True where visible. Padding sees itself: a row that sees nothing would be NaN.

    Raises:
        ValueError: One position axis and no ids.
    """
    batch, length, device = position_ids.shape[0], position_ids.shape[-1], position_ids.device
    past: int | Tensor = 0
    total = length
    if past_key_values is not None:
        past = past_key_values.get_seq_length()
        total = past_key_values.get_mask_sizes(length, 0)[0]
    segments = position_ids.new_ones(batch, total)
    if attention_mask is not None:
        segments = F.pad(attention_mask.long(), (0, total - attention_mask.shape[-1]))
    key_index = torch.arange(total, device=device)
    query_index = torch.arange(length, device=device) + past
    query_segments = segments.gather(1, query_index.expand(batch, -1))
    if config.position_encoding_2d:
        is_context = position_ids[:, 1] == 0
    else:
        if input_ids is None:
            raise ValueError(
                "input_ids must be given where one position axis does not tell the context"
            )
        answers = count_in_segment(input_ids == config.bos_token_id, segment_starts(query_segments))
        is_context = answers == 0
    place = key_index - past  # of a key among the new tokens
    is_new = (place >= 0) & (place < length)
    is_context = is_context[:, place.clamp(0, length - 1)] & is_new
    visible = (key_index <= query_index[:, None]) | is_context[:, None]
    visible = visible & (segments[:, None] == query_segments[..., None]) & (segments[:, None] > 0)
    return (visible | (key_index == query_index[:, None]))[:, None]

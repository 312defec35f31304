"""Fitting a conversation into its limits: oldest turns go first, then the last message is cut; never an end token."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from chatglm_ptuning.data.conversation import Message, split_turns
from chatglm_ptuning.data.template import Template, Tokenizer


class Fit(NamedTuple):
    """How a prompt is made short enough.

    Args:
        messages: The messages that stay.
        removed: Tokens `[start, stop)` of their prompt that go; None where nothing is cut.
        dropped_tokens: Tokens that went with whole turns.
        fits: False where the prompt must not be cut or its frame alone is too long.
    """

    messages: Sequence[Message]
    removed: slice | None
    dropped_tokens: int
    fits: bool


def fit_prompt(
    template: Template,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Any,
    max_length: int,
    truncation: str,
) -> Fit:
    """Find what has to go so that a prompt has at most `max_length` tokens (those that are learned not counted).

    Args:
        template: The chat format.
        tokenizer: The model's tokenizer.
        messages: The prompt, its last message being the one to answer.
        tools: Tools on offer.
        max_length: Limit in tokens.
        truncation: "left", "right" or "middle" of the last message, or "drop".
    """

    def length(kept: Sequence[Message]) -> int:
        return len(template.encode_prompt(tokenizer, kept, tools)) - template.prompt_targets

    before = now = length(messages)
    system, turns = split_turns(messages)
    while now > max_length and len(turns) > 1:
        del turns[0]
        messages = [*system, *(message for turn in turns for message in turn)]
        now = length(messages)
    dropped = before - now
    if now <= max_length:
        return Fit(messages, None, dropped, True)
    if truncation == "drop":
        return Fit(messages, None, dropped, False)
    # what the prompt keeps when the last message is empty is its frame; between head and tail lies that message
    last = messages[-1]
    frame = template.encode_prompt(
        tokenizer, [*messages[:-1], Message(last.role, "", None, last.metadata)], tools
    )
    whole = template.encode_prompt(tokenizer, messages, tools)
    head = common_prefix(frame, whole)
    tail = common_prefix(frame[head:][::-1], whole[head:][::-1])
    surplus = now - max_length
    room = len(whole) - head - tail - surplus
    if room < 1:
        return Fit(messages, None, dropped, False)
    start = head + {"left": 0, "right": room, "middle": room // 2}[truncation]
    return Fit(messages, slice(start, start + surplus), dropped, True)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences share from the beginning."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def without(ids: list[int], removed: slice | None) -> list[int]:
    """The ids without a part of them."""
    return ids if removed is None else ids[: removed.start] + ids[removed.stop :]

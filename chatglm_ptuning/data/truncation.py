"""Fitting a conversation into its limits: oldest turns go first, then the last message is cut; never an end token."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from chatglm_ptuning.data.conversation import Message, split_turns
from chatglm_ptuning.data.template import Template, Tokenizer, common_prefix


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
    prompt: list[int],
    max_length: int,
    truncation: str,
) -> Fit:
    """Find what has to go so that a prompt has at most `max_length` tokens (those that are learned not counted).

    Args:
        template: The chat format.
        tokenizer: The model's tokenizer.
        messages: The messages of the prompt, the last one being the one to answer.
        tools: Tools on offer.
        prompt: Their ids, as `template.encode_prompt` gives them.
        max_length: Limit in tokens.
        truncation: "left", "right" or "middle" of the last message, or "drop".
    """
    max_length += template.prompt_targets
    whole = prompt
    system, turns = split_turns(messages)

    def newest(turn: int) -> list[Message]:
        return [*system, *(message for messages in turns[turn:] for message in messages)]

    def fits(turn: int) -> bool:
        return len(template.encode_prompt(tokenizer, newest(turn), tools)) <= max_length

    if len(whole) > max_length and len(turns) > 1:  # by bisection: a row may have hundreds of turns
        messages = newest(bisect_left(range(len(turns) - 1), True, lo=1, key=fits))
        whole = template.encode_prompt(tokenizer, messages, tools)
    dropped = len(prompt) - len(whole)
    surplus = len(whole) - max_length
    if surplus <= 0 or truncation == "drop":
        return Fit(messages, None, dropped, surplus <= 0)
    # what the prompt keeps when the last message is empty is its frame; between head and tail lies that message
    empty = replace(messages[-1], content="", tool_calls=())
    frame = template.encode_prompt(tokenizer, [*messages[:-1], empty], tools)
    head = common_prefix(frame, whole)
    tail = common_prefix(frame[head:][::-1], whole[head:][::-1])
    room = len(whole) - head - tail - surplus
    if room < 1:
        return Fit(messages, None, dropped, False)
    start = head + {"left": 0, "right": room, "middle": room // 2}[truncation]
    return Fit(messages, slice(start, start + surplus), dropped, True)


def without(ids: list[int], removed: slice | None) -> list[int]:
    """The ids without a part of them."""
    return ids if removed is None else ids[: removed.start] + ids[removed.stop :]

"""The neutral form of one example: messages, whatever file they came from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "observation")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the assistant wants called.

    Args:
        name: Name of the function.
        arguments: Its arguments by name; a string where the call is not of that form (code for an interpreter).
    """

    name: str
    arguments: dict[str, Any] | str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of one speaker.

    Args:
        role: One of `ROLES`; "observation" is what a called tool gave back.
        content: The text.
        loss: Whether training learns this message; None leaves it to the run (assistant messages, see `data.loss_on`).
        metadata: First line of a ChatGLM3 or GLM-4 message, as its data has it (a tool's name).
        tool_calls: Calls that follow the text of an assistant message.
    """

    role: str
    content: str
    loss: bool | None = None
    metadata: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Nothing is said and nothing called."""
        return not self.content.strip() and not self.tool_calls


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, the tools on offer, and the place they were read from ("file:line")."""

    messages: tuple[Message, ...]
    tools: Sequence[Any] | dict[str, Any] | None = None
    source: str = ""


def split_turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system messages in front, and the turns: each a user message with all that follows it up to the next."""
    system = 0
    while system < len(messages) and messages[system].role == "system":
        system += 1
    turns: list[list[Message]] = []
    for message in messages[system:]:
        if message.role == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return list(messages[:system]), turns

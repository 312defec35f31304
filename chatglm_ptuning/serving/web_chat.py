"""A conversation in the web page, apart from the page: turns, what is sent to the model, what is shown."""

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from chatglm_ptuning.data.conversation import Message
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.serving.answer import Update
from chatglm_ptuning.serving.engine import BusyError, Engine
from chatglm_ptuning.serving.sampling import Sampling
from chatglm_ptuning.serving.web_text import TEXTS

PAUSE = 0.04  # seconds between two updates of the page
CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
MARKS = re.compile(r"[\\`*_\[\]<&~$|]|(?<!\S)[#>+-]|(?<=\d)[.)](?=\s)")


# ---- turns


@dataclass
class Chat:
    """What a visitor's page holds.

    Args:
        sides: The conversation, and the one beside it; empty where nothing is compared.
        turn: Counts what the visitor did; an answer under way ends when it changes.
        lines: What was last said beneath each answer.
    """

    sides: list[list[Message]] = field(default_factory=lambda: [[], []])
    turn: int = 0
    lines: list[str] = field(default_factory=list)


def ask(messages: Sequence[Message], text: str) -> list[Message]:
    """The conversation with a next message: a tool's result where the model has called one, else the user's."""
    calls = messages[-1].tool_calls if messages else ()
    return [*messages, Message("observation" if calls else "user", text)]


def question_at(messages: Sequence[Message], index: int) -> int:
    """Place of the message that the one at `index` answers, or of itself where it is no answer."""
    return max(i for i in range(index + 1) if messages[i].role != "assistant")


def to_encode(messages: Sequence[Message], system: str, remember: bool) -> list[Message]:
    """What the template gets: the system message, and all turns or those since the last user message."""
    start = 0
    if not remember:
        start = max(i for i, message in enumerate(messages) if message.role == "user")
    first = [Message("system", system.strip())] if system.strip() else []
    return [*first, *messages[start:]]


def read_tools(text: str) -> list[dict[str, Any]] | None:
    """The tools of a JSON text; None where it is empty.

    Raises:
        BadToolsError: It is not a list of functions.
    """
    if not text.strip():
        return None
    try:
        tools = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadToolsError(f"tools must be JSON, got {text[:40]!r}") from error
    if not isinstance(tools, list) or not all(map(has_name, tools)):
        raise BadToolsError(f"tools must be a list of functions with names, got {text[:40]!r}")
    return tools


def read_seed(text: str) -> int | None:
    """The seed of a text; None where it is empty.

    Raises:
        UserError: It is no whole number.
    """
    if not text.strip():
        return None
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"seed must be a whole number, got {text[:40]!r}") from error


def has_name(tool: Any) -> bool:
    """Whether a tool is a function with a name, wrapped as the OpenAI API has it or not."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


# ---- what is shown


def shown(messages: Sequence[Message], language: str) -> list[dict[str, Any]]:
    """The messages for gradio's chatbot, one for one."""
    return [
        {"role": "assistant", "content": answer_markdown(message, language)}
        if message.role == "assistant"
        else {"role": "user", "content": escape_markdown(message.content)}
        for message in messages
    ]


def answer_markdown(message: Message, language: str) -> str:
    """An answer as Markdown in which HTML is text; tool calls follow it."""
    parts = [
        part
        if part.startswith("`")
        else part.replace("&", "&amp;").replace("<", "&lt;")  # in code, Markdown does it
        for part in CODE.split(message.content)
    ]
    calls = [
        f"**{TEXTS[language]['called']}** `{call.name}`\n```json\n"
        + json.dumps(call.arguments, ensure_ascii=False, indent=2)
        + "\n```"
        for call in message.tool_calls
    ]
    return "\n\n".join(filter(None, ["".join(parts), *calls])) or f"*{TEXTS[language]['nothing']}*"


def escape_markdown(text: str) -> str:
    """A user's text that Markdown shows as it is (AdvertiseGen's `a#b*c#d*e` would be half in italics)."""
    return MARKS.sub(r"\\\g<0>", text)


def raw_prompt(tokenizer: Any, ids: Sequence[int]) -> str:
    """A prompt as text, with its control tokens by name."""
    parts = []
    for is_control, run in groupby(ids, key=lambda index: index in tokenizer.control_ids):
        if is_control:
            parts += tokenizer.convert_ids_to_tokens(list(run))
        else:
            parts.append(tokenizer.decode(list(run)))
    return "".join(parts)


# ---- answers


def hear(messages: list[Message], update: Update) -> None:
    """Write news of an answer into a conversation."""
    if messages[-1].role != "assistant":
        messages.append(Message("assistant", ""))
    said = Message("assistant", messages[-1].content + update.text)
    messages[-1] = update.message if update.message is not None else said


@dataclass
class Progress:
    """How far an answer is, and what is said beneath it.

    Args:
        prompt_tokens: Length of its prompt.
        tokens: Tokens generated.
        reason: Why it ended; None while it goes on.
        started: When it was asked for, in seconds.
        first: When its first token came.
        last: When its last token came.
        error: What broke.
    """

    prompt_tokens: int
    tokens: int = 0
    reason: str | None = None
    started: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float | None = None
    error: str | None = None

    def add(self, update: Update) -> None:
        """Take news in."""
        self.last = time.monotonic()
        if self.first is None and update.completion_tokens:
            self.first = self.last
        self.tokens, self.reason = update.completion_tokens, update.finish_reason
        self.error = update.error

    def text(self, language: str) -> str:
        """Counts, speed, and why it ended where that is not usual."""
        texts = TEXTS[language]
        if self.error is not None:
            return texts["broken"].format(error=self.error)
        if self.first is None or self.last is None:
            return texts.get(self.reason or "", texts["working"])
        seconds = self.last - self.first
        speed = f"{(self.tokens - 1) / seconds:.1f}" if seconds > 0 and self.tokens > 1 else "–"
        stats = texts["stats"].format(
            tokens=self.tokens,
            speed=speed,
            prompt=self.prompt_tokens,
            first=f"{self.first - self.started:.2f}",
        )
        return " · ".join([stats, *filter(None, [texts.get(self.reason or "")])])


class BadToolsError(UserError):
    """The text of the tools is not what it must be."""


def explain(error: Exception, language: str) -> str:
    """Why a message was not sent, in the page's language."""
    texts = TEXTS[language]
    if isinstance(error, PromptTooLongError):
        return texts["too_long"].format(got=error.got, limit=error.limit)
    if isinstance(error, BusyError):
        return texts["busy"]
    if isinstance(error, BadToolsError):
        return texts["bad_tools"]
    return texts["refused"].format(error=error)


def room(engine: Engine, prompt_ids: list[int], adapter: str | None, max_tokens: int) -> int:
    """The longest answer that a prompt leaves room for, at most `max_tokens`.

    Raises:
        PromptTooLongError: None.
        UserError: No such adapter.
    """
    tokens, longest = len(prompt_ids), engine.longest_answer(prompt_ids, adapter)
    if longest < 1:
        limit = min(engine.limits.max_prompt_tokens, tokens + longest - 1)
        raise PromptTooLongError(tokens, limit)
    return min(max_tokens, longest)


class PromptTooLongError(UserError):
    """The conversation does not fit.

    Args:
        got: Its length in tokens.
        limit: The longest one.
    """

    def __init__(self, got: int, limit: int) -> None:
        super().__init__(f"a prompt must be at most {limit} tokens, got {got}; shorten it")
        self.got, self.limit = got, limit


@dataclass(frozen=True)
class Request:
    """What `answers` asks the engine for."""

    prompt_ids: list[int]
    sampling: Sampling
    adapter: str | None = None
    tools: Any = None


async def answers(
    engine: Engine, requests: Sequence[Request]
) -> AsyncGenerator[list[tuple[int, Update]], None]:
    """News of several answers at once, each with the place of its request; closing it gives all up.

    Raises:
        UserError: The engine refuses one.
        BusyError: It takes no more now.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
    running = []

    def emitter(place: int) -> Any:
        return lambda update: loop.call_soon_threadsafe(queue.put_nowait, (place, update))

    try:
        for place, asked in enumerate(requests):
            emit = emitter(place)
            running.append(
                engine.submit(asked.prompt_ids, emit, asked.sampling, asked.adapter, asked.tools)
            )
        left = len(running)
        while left:
            news = [await queue.get()]
            while not queue.empty():
                news.append(queue.get_nowait())
            left -= sum(update.finish_reason is not None for _, update in news)
            yield news
            await asyncio.sleep(PAUSE)
    finally:
        for answer in running:
            answer.cancel()

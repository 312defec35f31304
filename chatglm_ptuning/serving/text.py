"""From token ids to what a reader sees, piece by piece, none of which is ever taken back."""

import re
from collections.abc import Callable, Sequence
from os.path import commonprefix

from chatglm_ptuning.data.conversation import Message

UNFINISHED = "\ufffd"  # what a tokenizer makes of bytes that are no whole character (yet)
# The templates replace the whole of "[[训练时间]]".
HALF_STAND_IN = re.compile(r"\[(\[[训练时间]*\]?)?$")


class AnswerText:
    """The text of one answer while its tokens come.

    Only what later tokens cannot change is handed out: no half characters, no punctuation that its right neighbour may
    widen, no blank that may be the last, nothing that may be the beginning of a stop text or a tool call. What was
    handed out is, at the end, the content of `message`.

    Args:
        decode: Ids to raw text (the tokenizer's).
        parse: Raw text to the message it stands for (the template's).
        stop: Texts that end the answer where they would begin.
        tools: Names of the tools on offer; a text becomes a call only if there are any.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        parse: Callable[[str], Message],
        stop: Sequence[str] = (),
        tools: Sequence[str] = (),
    ) -> None:
        self.decode, self.parse, self.stop, self.tools = decode, parse, stop, tools
        self.ids: list[int] = []
        self.raw = ""
        self.shown = ""
        self.is_stopped = False
        self._window, self._read = 0, 0  # `raw` is the text of ids[:_read]

    def push(self, token: int) -> str:
        """Add a token; what can be shown now beyond what was shown."""
        self.ids.append(token)
        before = self.decode(self.ids[self._window : self._read])
        text = self.decode(self.ids[self._window :])
        if len(text) <= len(before) or text.endswith(UNFINISHED):
            return ""
        self.raw += text[len(before) :]
        self._window, self._read = self._read, len(self.ids)
        return "" if self._may_be_call() else self._show(self._settled())

    def close(self) -> str:
        """End the answer; the rest of what is to be shown. Bytes of a character that was never finished are dropped."""
        before = self.decode(self.ids[self._window : self._read])
        text = self.decode(self.ids[self._window :])
        self.raw += text[len(before) :].rstrip(UNFINISHED)
        return self._show(self.message.content, is_last=True)

    @property
    def message(self) -> Message:
        """What the text so far stands for; a call is one only where its tool is on offer."""
        message = self.parse(self.raw)
        if any(call.name not in self.tools for call in message.tool_calls):
            return Message("assistant", self.raw.strip())
        return message

    def _settled(self) -> str:
        """The part of the message's text that no continuation changes."""
        raw = HALF_STAND_IN.sub("", self.raw)
        futures = (raw, raw + "中", raw + "a")
        texts = [self.parse(future).content for future in futures]
        return commonprefix(texts)  # noqa: RUF071 - of texts, not of paths

    def _may_be_call(self) -> bool:
        """Whether what comes after the last complete message may be the call of a tool."""
        name, newline, _ = self.raw.rpartition("<|assistant|>")[2].partition("\n")
        name = name.strip()
        return any(tool == name if newline else tool.startswith(name) for tool in self.tools)

    def _show(self, text: str, is_last: bool = False) -> str:
        """Cut a text at the first stop text, or keep what may become one; what of it was not shown before."""
        if self.is_stopped:
            return ""
        found = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if found:
            text, self.is_stopped = text[: min(found)], True
        elif not is_last:
            text = text[: len(text) - max((overlap(text, stop) for stop in self.stop), default=0)]
        new = text[len(self.shown) :]
        self.shown += new
        return new


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that is a beginning of a stop text."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))

"""`python -m chatglm_ptuning chat`: a conversation in the terminal, or over a pipe."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from chatglm_ptuning.data.conversation import Message, split_turns
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.serving.engine import Engine
from chatglm_ptuning.serving.sampling import Sampling

HELP = """\
/adapter NAME   another adapter answers from now on; none is the base, no NAME lists them
/system TEXT    set the system message; no TEXT removes it
/clear          forget the conversation
/save FILE      write the conversation as JSON, as training reads it
/help           these lines
/exit           leave, as Ctrl-D; Ctrl-C stops an answer"""
LEAST_ROOM = 64  # tokens: older turns are left out until an answer has as many


class Terminal:
    """A conversation and who answers it.

    Args:
        engine: Answers.
        sampling: How tokens are chosen; its `max_tokens` is the longest answer.
        adapter: Who answers at first; None for the base.
        system: The system message; empty for none.
        write: Shows a piece of text at once.
        note: Tells the user something that is no part of an answer.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        adapter: str | None = None,
        system: str = "",
        write: Callable[[str], None] | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.engine, self.sampling, self.adapter, self.system = engine, sampling, adapter, system
        self.write = write if write is not None else lambda text: print(text, end="", flush=True)
        self.note = note if note is not None else lambda text: print(text, file=sys.stderr)
        self.messages: list[Message] = []

    @property
    def label(self) -> str:
        """What stands before the user's line."""
        return f"{self.adapter if self.adapter is not None else 'base'}> "

    def run(self, lines: Iterable[str]) -> None:
        """Answer line after line, until there are no more or one says /exit."""
        for line in lines:
            text = line.strip()
            if text == "/exit":
                return
            try:
                if text.startswith("/"):
                    self.command(*text.partition(" ")[::2])
                elif text:
                    self.answer(text)
            except UserError as error:
                self.note(f"error: {error}")

    def command(self, name: str, argument: str) -> None:
        """Carry out one of the commands of `HELP`.

        Raises:
            UserError: No such command, or its argument is wrong.
        """
        argument = argument.strip()
        if name == "/adapter":
            self.choose(argument)
        elif name == "/system":
            self.system = argument
        elif name == "/clear":
            self.messages.clear()
        elif name == "/save":
            self.save(argument)
        elif name == "/help":
            self.note(HELP)
        else:
            raise UserError(f"a command must be one that /help lists, got {name!r}")

    def choose(self, name: str) -> None:
        """Let another adapter answer.

        Raises:
            UserError: There is none of this name.
        """
        known = ["none", *self.engine.adapters]
        if not name:
            self.note(", ".join(known))
        elif name in known:
            self.adapter = name if name != "none" else None
        else:
            raise UserError(f"adapter must be one of {', '.join(known)}, got {name!r}")

    def save(self, file: str) -> None:
        """Write the conversation.

        Raises:
            UserError: No file name, or it cannot be written.
        """
        if not file:
            raise UserError("/save must be given a file name, got none")
        rows = [{"role": m.role, "content": m.content} for m in self.conversation]
        try:
            text = json.dumps({"messages": rows}, ensure_ascii=False, indent=2)
            Path(os.path.expanduser(file)).write_text(text + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:  # a path with a NUL is no OSError
            raise UserError(f"the file must be writable, got {file!r}: {error}") from None
        self.note(f"{len(rows)} messages are in {file}")

    @property
    def conversation(self) -> list[Message]:
        """All messages, the system's first."""
        return [*([Message("system", self.system)] if self.system else []), *self.messages]

    def answer(self, text: str) -> None:
        """Show the answer to a message as it comes; Ctrl-C ends it where it is.

        Raises:
            UserError: The message is too long, or the chat format cannot hold the conversation.
        """
        self.messages.append(Message("user", text))
        shown = ""
        try:
            prompt = self.fit()
            room = max(self.engine.longest_answer(prompt, self.adapter), 1)
            sampling = replace(self.sampling, max_tokens=min(self.sampling.max_tokens, room))
            for update in self.engine.stream(prompt, sampling, self.adapter):
                self.write(update.text)
                shown += update.text
                if update.error is not None:
                    self.note(f"error: {update.error}")
                elif update.finish_reason == "length":
                    self.note(f"\n(stopped after {update.completion_tokens} tokens)")
            self.write("\n")
        except KeyboardInterrupt:
            self.write("\n")
            self.note("(stopped)")
        finally:
            if shown:
                self.messages.append(Message("assistant", shown))
            else:  # no turn without an answer: some formats know none
                self.messages.pop()

    def fit(self) -> list[int]:
        """The prompt; the oldest turns are forgotten where they leave no room for an answer."""
        wanted = min(LEAST_ROOM, self.sampling.max_tokens)
        forgotten = 0
        while True:
            prompt = self.engine.encode(self.conversation)
            turns = split_turns(self.messages)[1]
            if len(turns) == 1 or self.engine.longest_answer(prompt, self.adapter) >= wanted:
                break
            forgotten += 1
            self.messages = self.messages[len(turns[0]) :]
        if forgotten:
            self.note(f"(no room any more for the oldest {forgotten} turns, they are forgotten)")
        return prompt


def typed_lines(terminal: Terminal) -> Iterator[str]:
    """Lines typed at the prompt until Ctrl-D, with the line editor where there is one."""
    with suppress(ImportError):
        import readline  # noqa: F401 - `input` edits lines and remembers them once it is imported
    while True:
        try:
            yield input(terminal.label)
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")
        except EOFError:
            print()
            return


def chat(engine: Engine, sampling: Sampling, adapter: str | None, system: str) -> None:
    """Talk to the user at the terminal, or answer the lines of a pipe with answers alone."""
    terminal = Terminal(engine, sampling, adapter, system)
    # Bytes that are no text are then the error of their line.
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    if sys.stdin.isatty():
        names = ", ".join(["base", *engine.adapters])
        terminal.note(f"{names}; /help lists the commands, Ctrl-D leaves")
        terminal.run(typed_lines(terminal))
    else:
        terminal.run(sys.stdin)
    engine.close(drain=False)

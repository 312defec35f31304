import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatglm_ptuning.serving.engine import Engine
from chatglm_ptuning.serving.limits import Limits
from chatglm_ptuning.serving.sampling import Sampling
from chatglm_ptuning.serving.terminal import HELP, Terminal
from tests.serving.conftest import Base


class Talk:
    """A terminal whose output is kept."""

    def __init__(self, engine: Engine, max_tokens: int = 6) -> None:
        self.shown = ""
        self.notes: list[str] = []
        sampling = Sampling(max_tokens=max_tokens)
        self.terminal = Terminal(engine, sampling, "p5", write=self.write, note=self.notes.append)

    def write(self, text: str) -> None:
        self.shown += text

    def say(self, *lines: str) -> str:
        self.shown = ""
        self.terminal.run(lines)
        return self.shown


@pytest.fixture(scope="module")
def engine(bases: dict[str, Base]) -> Iterator[Engine]:
    engine = bases["glm"].engine()
    yield engine
    engine.close()


def test_the_conversation_is_remembered_saved_and_forgotten(engine: Engine, tmp_path: Path) -> None:
    talk, file = Talk(engine), tmp_path / "chat.json"
    first = talk.say("/system 你好", "裙")
    second = talk.say("裙", f"/save {file}")
    assert first != second  # the same line, other history
    rows = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert [row["role"] for row in rows] == ["system", *["user", "assistant"] * 2]
    assert [rows[2]["content"] + "\n", rows[4]["content"] + "\n"] == [first, second]
    assert talk.say("/clear", "裙") == first
    assert talk.say("/clear", "/system", "裙") != first


def test_adapters_are_switched(engine: Engine) -> None:
    talk = Talk(engine)
    tuned = talk.say("裙")
    assert talk.terminal.label == "p5> "
    base = talk.say("/clear", "/adapter none", "裙")
    assert talk.terminal.label == "base> "
    assert base != tuned
    talk.say("/adapter", "/adapter nobody")
    assert talk.notes[-2] == "none, lora, p1, p13, p5, p8"
    assert talk.notes[-1].startswith("error: adapter must be one of none, lora")
    assert talk.say("/clear", "/adapter p5", "裙") == tuned


def test_errors_do_not_end_the_conversation(engine: Engine, tmp_path: Path) -> None:
    talk = Talk(engine)
    wrong = ["/save", f"/save {tmp_path}", "/save ~no.body/a", "/save a\0b", "/nothing", "\udcff"]
    talk.say(*wrong, "你好" * 2000, "/help", "  ")
    assert [note.startswith("error: ") for note in talk.notes] == [True] * 7 + [False]
    assert talk.notes[-1] == HELP
    assert talk.terminal.messages == []
    assert talk.say("裙") == Talk(engine).say("裙")
    assert talk.say("/exit", "裙") == ""


def test_interrupt_stops_the_answer_only(engine: Engine) -> None:
    talk = Talk(engine, max_tokens=200)
    whole = talk.say("裙")

    def write(text: str) -> None:
        talk.shown += text
        if text.strip() and not talk.notes:
            raise KeyboardInterrupt

    talk = Talk(engine, max_tokens=200)
    talk.terminal.write = write
    shown = talk.say("裙")
    assert talk.notes == ["(stopped)"]
    assert whole.startswith(shown.strip())
    assert len(shown) < len(whole) / 2
    assert talk.say("/clear", "裙") == whole


def test_oldest_turns_are_forgotten_where_the_prompt_is_bounded(bases: dict[str, Base]) -> None:
    engine = bases["glm"].engine(limits=Limits(max_prompt_tokens=300))
    talk = Talk(engine)
    talk.say(*["你好" * 60] * 4)
    engine.close()
    assert any("no room any more" in note for note in talk.notes)
    assert not any(note.startswith("error") for note in talk.notes)


def test_oldest_turns_are_forgotten_when_it_is_full(engine: Engine) -> None:
    talk = Talk(engine)
    talk.say(*["你好" * 150] * 12)
    assert any("no room any more" in note for note in talk.notes)
    assert not any(note.startswith("error") for note in talk.notes)
    assert 1 < len(talk.terminal.messages) < 24

import pytest

from chatglm_ptuning.data.conversation import Message
from chatglm_ptuning.data.template import TEMPLATES
from chatglm_ptuning.serving.text import AnswerText


def decode(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def pieces(text: str | bytes, template: str = "chatglm", **kwargs: tuple[str, ...]) -> list[str]:
    """What is shown after each byte, and at the end."""
    answer = AnswerText(decode, TEMPLATES[template].parse_response, **kwargs)
    shown = []
    for byte in text.encode() if isinstance(text, str) else text:
        shown.append(answer.push(byte))
        if answer.is_stopped:
            break
    shown.append(answer.close())
    assert "".join(shown) == answer.shown
    return shown


@pytest.mark.parametrize("text", ["好的👍🏽再见", "a, b", "你好，世界", "[[训练时间]]到了"])
def test_no_half_characters_and_nothing_taken_back(text: str) -> None:
    shown = pieces(text)
    assert not any("\ufffd" in piece for piece in shown)
    assert "".join(shown) == TEMPLATES["chatglm"].parse_response(text).content
    assert sum(bool(piece) for piece in shown) > 1


def test_unfinished_character_is_dropped() -> None:
    assert "".join(pieces("好👍".encode()[:-1])) == "好"


def test_stop_text_over_several_tokens() -> None:
    assert "".join(pieces("one END two", stop=("END",))) == "one "
    assert "".join(pieces("one EN", stop=("END",))) == "one EN"
    assert not any("E" in piece for piece in pieces("one END", stop=("END", "ENDE")))


@pytest.mark.parametrize("template", ["chatglm3", "glm4"])
def test_calls_are_withheld(template: str) -> None:
    arguments = '{"city": "x"}' if template == "glm4" else "```python\ntool_call(city='x')\n```"
    text = f"weather\n{arguments}"
    assert "".join(pieces(text, template, tools=("weather",))) == ""
    assert "".join(pieces(text, template, tools=("other",))) == text
    assert "".join(pieces("weather is fine", template, tools=("weather",))) == "weather is fine"


def test_message_holds_the_call() -> None:
    answer = AnswerText(decode, TEMPLATES["glm4"].parse_response, tools=("weather",))
    for byte in b'weather\n{"city": "x"}':
        answer.push(byte)
    assert answer.message.tool_calls[0].arguments == {"city": "x"}
    assert answer.message == Message("assistant", "", tool_calls=answer.message.tool_calls)

"""Rows to conversations. The layout of a row is recognised by its columns, or named by the `data` section.

| columns | layout |
|---|---|
| content, summary | AdvertiseGen, the released ChatGLM example |
| prompt, response, history | the released ChatGLM scripts |
| instruction, input, output, history, system | Alpaca; `input` follows `instruction` on a line of its own |
"""

from collections.abc import Iterator, Mapping
from typing import Any

from chatglm_ptuning.data.config import DataConfig
from chatglm_ptuning.data.conversation import Conversation, Message
from chatglm_ptuning.data.reading import Row
from chatglm_ptuning.errors import UserError

# prompt column -> response column
_PAIRS = {"content": "summary", "prompt": "response", "instruction": "output"}


def conversation_from_row(row: Row, config: DataConfig) -> Conversation:
    """Make the one neutral form of a row.

    Raises:
        UserError: `file:line:` and what is wrong: not an object, an unknown layout, a missing column, a wrong type.
    """
    if not isinstance(row.value, dict):
        raise UserError(f"{row.source}: a row must be a JSON object, got {shown(row.value)}")
    prompt_column, response_column = pair_columns(row, config)
    prompt = text_of(row, prompt_column)
    system = ""
    if config.prompt_column is None and prompt_column == "instruction":
        extra = text_of(row, "input") if "input" in row.value else ""
        prompt = f"{prompt}\n{extra}" if prompt and extra else prompt + extra
        system = text_of(row, "system") if "system" in row.value else ""
    messages = [Message("system", system)] if system else []
    for question, answer in history_of(row, config):
        messages += [Message("user", question), Message("assistant", answer)]
    messages += [Message("user", prompt), Message("assistant", text_of(row, response_column))]
    return Conversation(tuple(messages), source=row.source)


def pair_columns(row: Row, config: DataConfig) -> tuple[str, str]:
    """The columns of question and answer."""
    if config.prompt_column is not None or config.response_column is not None:
        prompt, response = config.prompt_column, config.response_column
        if prompt is None or response is None:
            raise UserError(
                "data.prompt_column and data.response_column must be given together,"
                f" got prompt_column={prompt!r}, response_column={response!r}"
            )
        return prompt, response
    for prompt, response in _PAIRS.items():
        if prompt in row.value and response in row.value:
            return prompt, response
    for prompt, response in _PAIRS.items():
        if prompt in row.value or response in row.value:
            missing = response if prompt in row.value else prompt
            raise UserError(
                f"{row.source}: a row must have column {missing!r}, got columns {shown_columns(row.value)};"
                " add it or set data.prompt_column and data.response_column"
            )
    raise UserError(
        f"{row.source}: a row must have columns of a known layout, got columns {shown_columns(row.value)};"
        " set data.prompt_column and data.response_column"
    )


def text_of(row: Row, column: str) -> str:
    """The text of a column; null is an empty text."""
    if column not in row.value:
        raise UserError(
            f"{row.source}: a row must have column {column!r}, got columns {shown_columns(row.value)}"
        )
    return checked_text(row.source, f"column {column!r}", row.value[column])


def checked_text(source: str, name: str, value: Any) -> str:
    """A text that has a UTF-8 form; null is an empty one."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{source}: {name} must be a text, got {shown(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{source}: {name} must be valid Unicode, got half a character"
                f" ({value[error.start]!r}) at position {error.start}; remove the broken \\u escape"
            ) from error
    return value


def history_of(row: Row, config: DataConfig) -> Iterator[tuple[str, str]]:
    """Earlier turns: pairs of question and answer."""
    column = config.history_column
    if column is None:
        column = "history"
    elif column not in row.value:
        raise UserError(
            f"{row.source}: a row must have column {column!r}, got columns {shown_columns(row.value)}"
        )
    turns = row.value.get(column)
    if turns is None:
        return
    if not isinstance(turns, list):
        raise UserError(
            f"{row.source}: column {column!r} must be a list of turns, got {shown(turns)}"
        )
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise UserError(
                f"{row.source}: turn {number} of column {column!r} must be [question, answer], got {shown(turn)}"
            )
        name = f"turn {number} of column {column!r}"
        yield checked_text(row.source, name, turn[0]), checked_text(row.source, name, turn[1])


def shown_columns(row: Mapping[str, Any]) -> str:
    """The column names of a row, for an error."""
    return shown(sorted(row))


def shown(value: Any) -> str:
    """A value for an error, cut to a length that fits a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

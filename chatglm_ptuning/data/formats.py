"""Rows to conversations. The layout of a row is recognised by its columns, or named by the `data` section.

| columns | layout |
|---|---|
| messages or conversations | lists of messages, see `data.messages` |
| content, summary | AdvertiseGen, the released ChatGLM example |
| prompt, response, history | the released ChatGLM scripts |
| instruction, input, output, history | Alpaca; `input` follows `instruction` on a line of its own |

Beside any of them: `system` (a text) and `tools` (a list). Lists may also stand as JSON in a text, as CSV needs it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from chatglm_ptuning.data.config import DataConfig
from chatglm_ptuning.data.conversation import Conversation, Message
from chatglm_ptuning.data.messages import checked_text, messages_from_list, read_json_text, shown
from chatglm_ptuning.data.rows import Row
from chatglm_ptuning.errors import UserError

_LISTS = ("messages", "conversations")
_PAIRS = {"content": "summary", "prompt": "response", "instruction": "output"}  # question -> answer


def conversation_from_row(row: Row, config: DataConfig) -> Conversation:
    """Make the one neutral form of a row.

    Raises:
        UserError: `file:line:` and what is wrong: not an object, an unknown layout, a missing column, a wrong type.
    """
    columns = row.value
    if not isinstance(columns, dict):
        raise UserError(f"{row.source}: a row must be a JSON object, got {shown(columns)}")
    column = messages_column(row, config)
    if column is not None:
        messages = messages_from_list(row.source, f"column {column!r}", value_of(row, column))
    else:
        messages = messages_from_pair(row, config)
    if columns.get("system"):
        messages.insert(0, Message("system", text_of(row, "system")))
    tools = columns.get("tools")
    if tools:
        tools = read_json_text(row.source, "column 'tools'", tools)
        if not isinstance(tools, list | dict):
            raise UserError(f"{row.source}: column 'tools' must be a list, got {shown(tools)}")
    return Conversation(tuple(messages), tools or None, row.source)


def messages_column(row: Row, config: DataConfig) -> str | None:
    """The column that holds a list of messages; None where question and answer have columns of their own."""
    if config.messages_column is not None or config.prompt_column is not None:
        return config.messages_column
    return next((column for column in _LISTS if column in row.value), None)


def messages_from_pair(row: Row, config: DataConfig) -> list[Message]:
    """Earlier turns, the question and the answer."""
    prompt_column, response_column = pair_columns(row, config)
    prompt = text_of(row, prompt_column)
    if config.prompt_column is None and prompt_column == "instruction" and "input" in row.value:
        prompt = "\n".join(filter(None, [prompt, text_of(row, "input")]))
    answer = Message("assistant", text_of(row, response_column))
    return [*history_of(row, config), Message("user", prompt), answer]


def pair_columns(row: Row, config: DataConfig) -> tuple[str, str]:
    """The columns of question and answer."""
    if config.prompt_column is not None and config.response_column is not None:
        return config.prompt_column, config.response_column
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


def history_of(row: Row, config: DataConfig) -> Iterator[Message]:
    """Earlier turns: pairs [question, answer], or messages."""
    column = config.history_column
    turns = row.value.get("history") if column is None else value_of(row, column)
    if not turns:
        return
    name = f"column {'history' if column is None else column!r}"
    turns = read_json_text(row.source, name, turns)
    if not isinstance(turns, list):
        raise UserError(f"{row.source}: {name} must be a list of turns, got {shown(turns)}")
    if all(isinstance(turn, dict) for turn in turns):
        yield from messages_from_list(row.source, name, turns)
        return
    for number, turn in enumerate(turns, 1):
        place = f"turn {number} of {name}"
        if not isinstance(turn, list) or len(turn) != 2:
            raise UserError(f"{row.source}: {place} must be [question, answer], got {shown(turn)}")
        yield Message("user", checked_text(row.source, place, turn[0]))
        yield Message("assistant", checked_text(row.source, place, turn[1]))


def value_of(row: Row, column: str) -> Any:
    """The value of a column that must be there."""
    if column not in row.value:
        columns = shown_columns(row.value)
        raise UserError(f"{row.source}: a row must have column {column!r}, got columns {columns}")
    return row.value[column]


def text_of(row: Row, column: str) -> str:
    """The text of a column; null is an empty text."""
    return checked_text(row.source, f"column {column!r}", value_of(row, column))


def shown_columns(row: Mapping[str, Any]) -> str:
    """The column names of a row, for an error."""
    return shown(sorted(row))

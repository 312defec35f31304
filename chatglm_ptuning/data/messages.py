"""Lists of messages as data sets have them: ShareGPT, ChatGLM3, OpenAI.

| layout | message |
|---|---|
| ShareGPT | from: system, human, gpt, function_call, observation; value |
| ChatGLM3 | role: system, user, assistant, observation; content; metadata; loss |
| ChatGLM3, a call | role: tool; name; parameters; observation |
| OpenAI | role: system, developer, user, assistant, tool; content (a text or text parts); tool_calls; weight |
"""

import json
from collections.abc import Mapping
from typing import Any

from chatglm_ptuning.data.conversation import Message, ToolCall
from chatglm_ptuning.errors import UserError

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "observation",
    "tool": "observation",
    "function": "observation",
}


def messages_from_list(source: str, name: str, values: Any) -> list[Message]:
    """Read a list of messages, each in any of the layouts.

    Args:
        source: "file:line" of the row.
        name: What holds the list, for errors.
        values: The list, or its JSON.

    Raises:
        UserError: `file:line:` and which message has what wrong.
    """
    values = read_json_text(source, name, values)
    if not isinstance(values, list):
        raise UserError(f"{source}: {name} must be a list of messages, got {shown(values)}")
    messages = []
    for number, value in enumerate(values, 1):
        messages += messages_from_value(source, f"message {number} of {name}", value)
    return messages


def messages_from_value(source: str, name: str, value: Any) -> list[Message]:
    """The message of one entry; ChatGLM3's tool entry is two, the call and what it gave back."""
    if not isinstance(value, dict):
        raise UserError(f"{source}: {name} must be an object, got {shown(value)}")
    role = first_of(value, "from", "role")
    if not isinstance(role, str) or role not in _ROLES:
        raise UserError(
            f"{source}: the role of {name} must be one of {', '.join(_ROLES)}, got {shown(role)}"
        )
    loss = loss_of(source, name, value)
    if role == "tool" and "observation" in value:
        call = ToolCall(
            checked_name(source, name, value.get("name")),
            checked_arguments(source, name, value.get("parameters")),
        )
        observation = checked_text(source, f"the observation of {name}", value["observation"])
        return [
            Message("assistant", "", loss, tool_calls=(call,)),
            Message("observation", observation),
        ]
    if not {"value", "content"} & set(value) and not value.get("tool_calls"):
        raise UserError(
            f"{source}: {name} must have 'content' or 'value', got columns {shown(sorted(value))}"
        )
    content = content_of(source, name, first_of(value, "value", "content"))
    if role == "function_call":  # its value is the call, as JSON
        return [Message("assistant", "", loss, tool_calls=tuple(read_calls(source, name, content)))]
    calls = [
        tool_call(source, name, call)
        for call in checked_list(source, name, value.get("tool_calls"))
    ]
    metadata = checked_text(source, f"the metadata of {name}", value.get("metadata"))
    return [Message(_ROLES[role], content, loss, metadata, tuple(calls))]


def first_of(value: Mapping[str, Any], *keys: str) -> Any:
    """The first of these that is there and not null, as Parquet has the keys that another row needs; else null."""
    return next((value[key] for key in keys if value.get(key) is not None), None)


def content_of(source: str, name: str, content: Any) -> str:
    """A text, or OpenAI's list of text parts."""
    if not isinstance(content, list):
        return checked_text(source, name, content)
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise UserError(f"{source}: {name} must hold text parts only, got {shown(part)}")
        texts.append(checked_text(source, name, part.get("text")))
    return "".join(texts)


def loss_of(source: str, name: str, value: Mapping[str, Any]) -> bool | None:
    """ChatGLM3's `loss` flag, or OpenAI's `weight` of 0 or 1."""
    flag = first_of(value, "loss", "weight")
    if flag is not None and flag not in (0, 1):
        raise UserError(f"{source}: the loss of {name} must be true or false, got {shown(flag)}")
    return None if flag is None else bool(flag)


def tool_call(source: str, name: str, call: Any) -> ToolCall:
    """A call in OpenAI's form, with or without the `function` around it."""
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise UserError(f"{source}: a tool call of {name} must be an object, got {shown(call)}")
    arguments = first_of(function, "arguments", "parameters")
    return ToolCall(
        checked_name(source, name, function.get("name")), checked_arguments(source, name, arguments)
    )


def read_calls(source: str, name: str, text: str) -> list[ToolCall]:
    """ShareGPT's function_call: one call or a list of them, as JSON."""
    value = read_json_text(source, name, text)
    return [
        tool_call(source, name, call) for call in (value if isinstance(value, list) else [value])
    ]


def checked_name(source: str, name: str, value: Any) -> str:
    """The name of a called tool."""
    if not isinstance(value, str) or not value or "\n" in value:
        raise UserError(f"{source}: a tool call of {name} must have a name, got {shown(value)}")
    return checked_text(source, f"the tool's name in {name}", value)


def checked_arguments(source: str, name: str, value: Any) -> dict[str, Any]:
    """The arguments of a call: an object, or its JSON."""
    arguments = {} if value is None else read_json_text(source, f"the arguments in {name}", value)
    if not isinstance(arguments, dict):
        raise UserError(
            f"{source}: the arguments of a tool call in {name} must be an object, got {shown(value)}"
        )
    return arguments


def checked_list(source: str, name: str, value: Any) -> list[Any]:
    """A list; null is an empty one."""
    if value is not None and not isinstance(value, list):
        raise UserError(f"{source}: the tool calls of {name} must be a list, got {shown(value)}")
    return [] if value is None else value


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


def read_json_text(source: str, name: str, value: Any) -> Any:
    """The value itself, or what a text holds as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{source}: {name} must be valid JSON where it is a text, got {shown(value)}"
        ) from error


def shown(value: Any) -> str:
    """A value for an error, cut to a length that fits a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

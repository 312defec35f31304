"""Tools in text: how the released models are told of them, and how they call them.

A call is data; nothing in it is ever evaluated.
"""

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from chatglm_ptuning.data.conversation import ToolCall
from chatglm_ptuning.errors import UserError

CHATGLM3_SYSTEM = (
    "Answer the following questions as best as you can. You have access to the following tools:"
)
GLM4_SYSTEM = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。"
)
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PYTHON_BLOCK = re.compile(r"```python[ \t]*\n(.*)```", re.DOTALL)


def chatglm3_tools(tools: Any) -> str:
    """What follows the system text of ChatGLM3 where there are tools: their JSON."""
    if isinstance(tools, Sequence):
        tools = [plain_function(tool) for tool in tools]
    return "\n" + json.dumps(tools, indent=4, ensure_ascii=False)


def glm4_tools(tools: Any) -> str:
    """The system text of GLM-4 where there are tools.

    Raises:
        UserError: A tool is no function (the released built-in tools are not offered here).
    """
    text = f"{GLM4_SYSTEM}\n\n# 可用工具"
    for tool in map(plain_function, tools):
        if not isinstance(tool, dict) or "name" not in tool:
            raise UserError(f"a tool must be a function with a name, got {tool!r}")
        text += f"\n\n## {tool['name']}\n\n{json.dumps(tool, indent=4, ensure_ascii=False)}"
        text += "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
    return text


def plain_function(tool: Any) -> Any:
    """The function itself where it comes wrapped as the OpenAI API has it."""
    return tool["function"] if isinstance(tool, dict) and "function" in tool else tool


def python_call(call: ToolCall) -> str:
    """A call as ChatGLM3 writes it; code for its interpreter goes as it is."""
    if isinstance(call.arguments, str):
        return call.arguments
    arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
    return f"```python\ntool_call({arguments})\n```"


def json_call(call: ToolCall) -> str:
    """A call as GLM-4 writes it."""
    if isinstance(call.arguments, str):
        return call.arguments
    return json.dumps(call.arguments, ensure_ascii=False)


def parse_python_call(metadata: str, content: str) -> ToolCall | None:
    """The call in a ChatGLM3 message: `tool_call(...)` with literal keyword arguments, or code for the interpreter.

    Args:
        metadata: First line of the message, where the model names the tool.
        content: The rest.
    """
    name = metadata.strip()
    if _NAME.fullmatch(name) is None:
        return None
    block = _PYTHON_BLOCK.search(content)
    try:
        call = ast.parse(block[1] if block is not None else content, mode="eval").body
        if (
            not isinstance(call, ast.Call)
            or call.args
            or getattr(call.func, "id", "") != "tool_call"
        ):
            raise ValueError("another expression")
        # ** has no name, and is no literal
        arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        if None not in (keyword.arg for keyword in call.keywords) and is_json(arguments):
            return ToolCall(name, arguments)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        pass
    return ToolCall(name, content) if name == "interpreter" else None


def parse_json_call(metadata: str, content: str) -> ToolCall | None:
    """The call in a GLM-4 message: the name on its first line, then a JSON object of arguments."""
    name = metadata.strip()
    try:
        arguments = json.loads(content) if _NAME.fullmatch(name) is not None else None
    except (ValueError, RecursionError):
        return None
    return ToolCall(name, arguments) if isinstance(arguments, dict) and is_json(arguments) else None


def is_json(arguments: dict[str, Any]) -> bool:
    """Whether arguments can be handed on as JSON: no bytes, no sets, no infinity, no half of a surrogate pair."""
    try:
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True

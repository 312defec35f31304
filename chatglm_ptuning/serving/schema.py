"""What clients of the API send, in the OpenAI API's terms, and the errors they get."""

import difflib
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chatglm_ptuning.data.conversation import Message, ToolCall
from chatglm_ptuning.serving.sampling import Sampling

# Fields that are not built, with the values that ask for nothing
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "functions": (None, []),
    "function_call": (None, "none"),
    "echo": (None, False),
    "suffix": (None, ""),
}
# Fields that change nothing in an answer
IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "parallel_tool_calls",
    "prompt_cache_key",
)


class ApiError(Exception):
    """An error in OpenAI's form.

    Args:
        status: HTTP status.
        message: One sentence.
        code: A word for programs.
        param: The field that is wrong.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class TextPart(BaseModel):
    """A piece of a message; only text."""

    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    """Name and arguments (JSON text) of a call."""

    name: str
    arguments: str = "{}"


class Call(BaseModel):
    """A call that the assistant made."""

    function: CalledFunction

    def to_call(self) -> ToolCall:
        """The call in our own form; arguments that are no JSON object stay text."""
        try:
            arguments = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            arguments = None
        is_object = isinstance(arguments, dict)
        return ToolCall(self.function.name, arguments if is_object else self.function.arguments)


class ChatMessage(BaseModel):
    """One message; what else clients send back with it is left out."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[Call] | None = None

    def to_message(self) -> Message:
        """The message in our own form."""
        content = self.content if self.content is not None else ""
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        role = {"developer": "system", "tool": "observation"}.get(self.role, self.role)
        calls = tuple(call.to_call() for call in self.tool_calls or ())
        return Message(role, content, tool_calls=calls)


class Function(BaseModel):
    """A function on offer; its fields go into the prompt as they are."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Tool(BaseModel):
    """A tool on offer."""

    type: Literal["function"]
    function: Function


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool = False


class SamplingRequest(BaseModel):
    """What both kinds of request have; top_k and repetition_penalty are additions to OpenAI's fields."""

    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def longest(self) -> int | None:
        """The longest answer asked for, in tokens; None for as long as fits."""
        return self.max_tokens

    def sampling(self, longest: int) -> Sampling:
        """The settings of the answer.

        Args:
            longest: `max_tokens` where the client says nothing.

        Raises:
            UserError: A value that cannot be.
        """
        given = {
            name: getattr(self, name)
            for name in ("top_p", "top_k", "repetition_penalty", "seed")
            if getattr(self, name) is not None
        }
        return Sampling(
            max_tokens=self.longest if self.longest is not None else max(longest, 1),
            temperature=self.temperature if self.temperature is not None else 1.0,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            **given,
        )


class ChatRequest(SamplingRequest):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None

    @property
    def longest(self) -> int | None:
        """The newer name comes first."""
        newer = self.max_completion_tokens
        return newer if newer is not None else self.max_tokens

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The functions that may be called."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [{"function": tool.function.model_dump(exclude_unset=True)} for tool in self.tools]


class CompletionRequest(SamplingRequest):
    """Body of /v1/completions."""

    prompt: str


class LoadRequest(BaseModel):
    """Body of /v1/load_adapter."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=64)]
    directory: Annotated[str, Field(min_length=1)]


Body = TypeVar("Body", bound=BaseModel)


def parse(body: bytes, kind: type[Body]) -> Body:
    """Read a request; nothing that the client sent stands in the error.

    Raises:
        ApiError: No JSON, a wrong type, an unknown field, or something that is not built.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body must be valid JSON; {first['msg']}") from None
        param = ".".join(str(part) for part in first["loc"])
        place = param if param else "the body"
        raise ApiError(400, f"{place}: {first['msg']}", "invalid_value", param or None) from None
    for name, value in (request.model_extra or {}).items():
        if name in UNSUPPORTED:
            if value not in UNSUPPORTED[name]:
                raise ApiError(
                    400,
                    f"{name} is not supported here; leave it out",
                    "unsupported_parameter",
                    name,
                )
        elif name not in IGNORED:
            near = difflib.get_close_matches(name, kind.model_fields, n=1, cutoff=0)[0]
            raise ApiError(
                400,
                f"there is no field {name[:64]!a}; the nearest is {near}",
                "unknown_parameter",
                name[:64],
            )
    return request

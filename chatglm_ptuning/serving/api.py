"""The OpenAI API over HTTP: the base and every adapter are models of their own name.

Prompts, answers and keys are never logged.
"""

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.serving.answer import Answer, Update
from chatglm_ptuning.serving.engine import Engine
from chatglm_ptuning.serving.limits import BusyError, TooLongError
from chatglm_ptuning.serving.schema import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    LoadRequest,
    SamplingRequest,
    parse,
)

MAX_BODY = 2 * 2**20  # bytes; no context is that long
HEADERS = {
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}  # a proxy must not hold tokens back


@dataclass(frozen=True)
class Keys:
    """Who may do what; None asks for no key, and without an admin key nobody loads adapters.

    Args:
        api: For answers.
        admin: For loading and unloading adapters, and for all that `api` opens.
    """

    api: str | None = None
    admin: str | None = None


class Running:
    """An answer under way, as the event loop sees it."""

    def __init__(self, engine: Engine, prompt_ids: list[int], *args: Any) -> None:
        loop, self.updates = asyncio.get_running_loop(), asyncio.Queue[Update]()
        self.prompt_tokens = len(prompt_ids)

        def emit(update: Update) -> None:
            loop.call_soon_threadsafe(self.updates.put_nowait, update)

        self.answer: Answer = engine.submit(prompt_ids, emit, *args)

    async def __aiter__(self) -> AsyncIterator[Update]:
        """The updates until the last.

        Raises:
            ApiError: Something broke.
        """
        while True:
            update = await self.updates.get()
            if update.finish_reason == "error":
                raise ApiError(500, f"the answer had to be given up: {update.error}")
            if update.finish_reason == "cancelled":  # not by the client, which would be gone
                raise ApiError(503, "the server is shutting down", "overloaded")
            yield update
            if update.finish_reason is not None:
                return

    async def last(self, request: Request) -> Update:
        """Wait for the end; a client that goes away ends it."""
        gone = asyncio.ensure_future(until_gone(request))
        try:
            gone.add_done_callback(lambda _: self.answer.cancel())
            return [update async for update in self][-1]
        finally:
            gone.cancel()

    def usage(self, update: Update) -> dict[str, int]:
        """Tokens in and out."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": update.completion_tokens,
            "total_tokens": self.prompt_tokens + update.completion_tokens,
        }


async def until_gone(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events of an answer, which is given up when the client goes away."""

    def __init__(self, running: Running, chunks: AsyncIterator[dict[str, Any]]) -> None:
        super().__init__(events(chunks), media_type="text/event-stream", headers=HEADERS)
        self.running = running

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send all."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.running.answer.cancel()


async def events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """One event a chunk; what breaks under way is the last."""
    try:
        async for chunk in chunks:
            yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body, ensure_ascii=False)}\n\n"
    yield "data: [DONE]\n\n"


def tool_calls(update: Update) -> list[dict[str, Any]]:
    """The calls of a finished answer, in OpenAI's form."""
    calls = update.message.tool_calls if update.message is not None else ()
    return [
        {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": call.arguments
                if isinstance(call.arguments, str)
                else json.dumps(call.arguments, ensure_ascii=False),
            },
        }
        for call in calls
    ]


async def read_body(request: Request) -> bytes:
    """The whole body.

    Raises:
        ApiError: It is too long, or the client goes away before its end.
    """
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                raise ApiError(413, f"the body must be at most {MAX_BODY} bytes; send less")
    except ClientDisconnect:
        raise ApiError(400, "the body must come whole, the connection was closed") from None
    return bytes(body)


class Api:
    """The routes.

    Args:
        engine: Answers.
        base: The name of the base model.
        keys: Who may do what.
    """

    def __init__(self, engine: Engine, base: str, keys: Keys) -> None:
        self.engine, self.base, self.keys = engine, base, keys
        self.created = int(time.time())

    def check_key(self, request: Request) -> None:
        """Let in whoever has a key.

        Raises:
            ApiError: No key, or a wrong one.
        """
        if self.keys.api is not None and not holds(request, self.keys.api, self.keys.admin):
            raise ApiError(401, "a valid API key must be sent as bearer token", "invalid_api_key")

    def check_admin(self, request: Request) -> None:
        """Let in the administrator.

        Raises:
            ApiError: Somebody else.
        """
        if self.keys.admin is None:
            raise ApiError(403, "adapters can be changed only where the server has an admin key")
        if not holds(request, self.keys.admin):
            raise ApiError(401, "the admin key must be sent as bearer token", "invalid_api_key")

    def names(self) -> list[str]:
        """All models, the base first."""
        return [self.base, *self.engine.adapters]

    def adapter(self, model: str) -> str | None:
        """The adapter that a model name stands for; None for the base.

        Raises:
            ApiError: No such model.
        """
        if model not in self.names():
            raise ApiError(
                404,
                f"the model must be one of {', '.join(self.names())}, got {model[:64]!a}",
                "model_not_found",
                "model",
            )
        return None if model == self.base else model

    def start(
        self, body: SamplingRequest, prompt_ids: list[int], tools: list[dict[str, Any]] | None
    ) -> Running:
        """Submit a request."""
        adapter = self.adapter(body.model)
        sampling = body.sampling(self.engine.longest_answer(prompt_ids, adapter))
        return Running(self.engine, prompt_ids, sampling, adapter, tools)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = parse(await read_body(request), ChatRequest)
        self.adapter(body.model)
        messages = [message.to_message() for message in body.messages]
        # Long prompts take their time; other answers go on meanwhile.
        prompt = await asyncio.to_thread(self.engine.encode, messages, body.offered_tools)
        running = self.start(body, prompt, body.offered_tools)
        head = self.head("chatcmpl", body)
        if body.stream:
            return EventStream(running, self.chat_chunks(running, head, body))
        update = await running.last(request)
        text = update.message.content if update.message is not None else ""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls := tool_calls(update):
            message |= {"tool_calls": calls, "content": text or None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": update.finish_reason,
        }
        head["object"] = "chat.completion"
        return JSONResponse(head | {"choices": [choice], "usage": running.usage(update)})

    async def chat_chunks(
        self, running: Running, head: dict[str, Any], body: ChatRequest
    ) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a streamed chat answer."""
        head["object"] = "chat.completion.chunk"

        def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            return head | {"choices": [choice]}

        yield chunk({"role": "assistant", "content": ""})
        async for update in running:
            if update.text:
                yield chunk({"content": update.text})
        if calls := tool_calls(update):
            yield chunk({"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]})
        yield chunk({}, update.finish_reason)
        if body.stream_options is not None and body.stream_options.include_usage:
            yield head | {"choices": [], "usage": running.usage(update)}

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = parse(await read_body(request), CompletionRequest)
        self.adapter(body.model)
        prompt = await asyncio.to_thread(self.engine.encode_text, body.prompt)
        running = self.start(body, prompt, None)
        head = self.head("cmpl", body) | {"object": "text_completion"}
        if body.stream:
            return EventStream(running, self.completion_chunks(running, head, body))
        update = await running.last(request)
        text = update.message.content if update.message is not None else ""
        choice = {
            "index": 0,
            "text": text,
            "logprobs": None,
            "finish_reason": update.finish_reason,
        }
        return JSONResponse(head | {"choices": [choice], "usage": running.usage(update)})

    async def completion_chunks(
        self, running: Running, head: dict[str, Any], body: CompletionRequest
    ) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a streamed completion."""
        async for update in running:
            choice = {
                "index": 0,
                "text": update.text,
                "logprobs": None,
                "finish_reason": update.finish_reason,
            }
            if update.text or update.finish_reason is not None:
                yield head | {"choices": [choice]}
        if body.stream_options is not None and body.stream_options.include_usage:
            yield head | {"choices": [], "usage": running.usage(update)}

    def head(self, kind: str, body: SamplingRequest) -> dict[str, Any]:
        """What every object of an answer begins with."""
        created = int(time.time())
        return {"id": f"{kind}-{secrets.token_hex(12)}", "created": created, "model": body.model}

    def model(self, name: str) -> dict[str, Any]:
        """GET /v1/models/NAME."""
        adapter = self.adapter(name)
        entry = {"id": name, "object": "model", "created": self.created}
        return entry | {
            "owned_by": "chatglm_ptuning",
            "parent": self.base if adapter is not None else None,
        }

    def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [self.model(name) for name in self.names()]}

    async def load_adapter(self, request: Request) -> dict[str, Any]:
        """POST /v1/load_adapter."""
        body = parse(await read_body(request), LoadRequest)
        if body.name == self.base:
            raise UserError(
                f"an adapter's name must not be the base's, got {body.name!r}; choose another"
            )
        await asyncio.to_thread(self.engine.add_adapter, body.name, Path(body.directory))
        return self.model(body.name)

    async def unload_adapter(self, name: str) -> dict[str, Any]:
        """DELETE /v1/models/NAME."""
        if self.adapter(name) is None:
            raise UserError(f"the base must stay, got {name!r}; name an adapter")
        await asyncio.to_thread(self.engine.remove_adapter, name)
        return {"id": name, "object": "model", "deleted": True}

    def health(self) -> JSONResponse:
        """GET /health: 200 while requests are taken, else 503."""
        is_open = self.engine.is_open
        content = {"status": "ok" if is_open else "closed", "models": len(self.names())}
        return JSONResponse(content, 200 if is_open else 503)

    def metrics(self) -> PlainTextResponse:
        """GET /metrics, in Prometheus' text format."""
        running, waiting = self.engine.load
        prefix = "chatglm_ptuning"
        lines = [f"# TYPE {prefix}_answers_total counter"]
        for reason, count in dict(self.engine.finished).items():
            lines.append(f'{prefix}_answers_total{{finish_reason="{reason}"}} {count}')
        lines.append(f"# TYPE {prefix}_tokens_total counter")
        for kind, count in dict(self.engine.tokens).items():
            lines.append(f'{prefix}_tokens_total{{kind="{kind}"}} {count}')
        gauges = {"running": running, "waiting": waiting, "adapters": len(self.engine.adapters)}
        for name, value in gauges.items():
            lines += [f"# TYPE {prefix}_{name} gauge", f"{prefix}_{name} {value}"]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


def holds(request: Request, *keys: str | None) -> bool:
    """Whether a request carries one of the keys; takes the same time for every wrong one."""
    kind, _, sent = request.headers.get("authorization", "").partition(" ")
    sent_bytes = sent.strip().encode("latin-1", "replace")
    matches = [hmac.compare_digest(sent_bytes, key.encode()) for key in keys if key is not None]
    return kind.lower() == "bearer" and any(matches)


def error_response(error: ApiError) -> JSONResponse:
    """An error as the client gets it."""
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    headers |= {"Retry-After": "1"} if error.status == 503 else {}
    return JSONResponse(error.body, error.status, headers)


def as_api_error(error: Exception) -> ApiError:
    """Any error in OpenAI's form; the words of a bug stay in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TooLongError):
        return ApiError(400, str(error), "context_length_exceeded", "messages")
    if isinstance(error, UserError):
        field = str(error).split(" ", 1)[0]
        fields = SamplingRequest.model_fields
        return ApiError(400, str(error), "invalid_value", field if field in fields else None)
    if isinstance(error, BusyError):
        return ApiError(503, str(error), "overloaded")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    return ApiError(500, "the server met a bug; its log says more")


def create_app(engine: Engine, base: str, keys: Keys | None = None) -> FastAPI:
    """The ASGI application; closing it lets answers under way finish and closes the engine.

    Args:
        engine: Answers.
        base: The name of the base model.
        keys: Who may do what; None lets everybody ask and nobody load.

    Raises:
        UserError: An adapter has the base's name.
    """
    if base in engine.adapters:
        raise UserError(
            f"an adapter's name must not be the base's, got {base!r}; give it another name"
        )
    api = Api(engine, base, keys if keys is not None else Keys())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="chatglm_ptuning", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
    )

    async def answer_error(_: Request, error: Exception) -> JSONResponse:
        return error_response(as_api_error(error))

    for kind in (ApiError, UserError, BusyError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
    users = APIRouter(prefix="/v1", dependencies=[Depends(api.check_key)])
    users.add_api_route("/chat/completions", api.chat, methods=["POST"])
    users.add_api_route("/completions", api.complete, methods=["POST"])
    users.add_api_route("/models", api.models)
    users.add_api_route("/models/{name:path}", api.model)
    admin = APIRouter(prefix="/v1", dependencies=[Depends(api.check_admin)])
    admin.add_api_route("/load_adapter", api.load_adapter, methods=["POST"])
    admin.add_api_route("/models/{name:path}", api.unload_adapter, methods=["DELETE"])
    app.include_router(users)
    app.include_router(admin)
    app.add_api_route("/health", api.health)
    app.add_api_route("/metrics", api.metrics)
    return app

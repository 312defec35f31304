"""The API as clients see it: the official OpenAI client against a real server on loopback."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import httpx
import openai
import pytest
import uvicorn

from chatglm_ptuning.serving import batch
from chatglm_ptuning.serving.api import MAX_BODY, Api, Keys, create_app
from chatglm_ptuning.serving.sampling import Chooser
from tests.serving.conftest import Base

USER = [{"role": "user", "content": "你好"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def url(bases: dict[str, Base]) -> Iterator[str]:
    engine = bases["glm"].engine()
    app = create_app(engine, "tiny", Keys("a-key", "an-admin-key"))
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5)
    socket = uvicorn.Config(app, port=0, log_level="error").bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    assert not engine._thread.is_alive()


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="a-key", max_retries=0)


@pytest.fixture(scope="module")
def admin(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="an-admin-key", max_retries=0)


@pytest.fixture
def say(bases: dict[str, Base], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the model write a given text, and end."""
    tokenizer = bases["glm"].tokenizer
    places: dict[int, int] = {}
    script: list[int] = []

    def choose(_: object, choosers: Sequence[Chooser]) -> list[int]:
        tokens = []
        for chooser in choosers:
            place = places.get(id(chooser), 0)
            places[id(chooser)] = place + 1
            tokens.append(script[min(place, len(script) - 1)])
        return tokens

    def set_script(text: str) -> None:
        places.clear()
        script[:] = [*tokenizer.encode_ordinary(text), 2]
        monkeypatch.setattr(batch, "choose_tokens", choose)

    return set_script


def post(url: str, body: bytes | dict, path: str = "chat/completions") -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": "Bearer a-key"}
    return httpx.post(f"{url}/v1/{path}", content=content, headers=headers)


def test_models_are_the_base_and_the_adapters(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", "lora", "p1", "p13", "p5", "p8"]
    assert client.models.retrieve("p5").id == "p5"


def test_chat_counts_and_repeats(client: openai.OpenAI) -> None:
    def ask(model: str, **options: object) -> object:
        return client.chat.completions.create(model=model, messages=USER, max_tokens=5, **options)

    greedy = ask("tiny", temperature=0)
    assert greedy.choices[0].finish_reason == "length"
    assert greedy.usage.completion_tokens == 5
    assert greedy.usage.total_tokens == greedy.usage.prompt_tokens + 5
    texts = [ask(name, temperature=0).choices[0].message.content for name in ("tiny", "p5", "lora")]
    assert texts[0] == greedy.choices[0].message.content
    assert len(set(texts)) == 3
    drawn = [ask("p5", seed=seed).choices[0].message.content for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_stream_is_the_answer_in_pieces(client: openai.OpenAI, say: Callable[[str], None]) -> None:
    say("晚上好，世界。")
    stream = client.chat.completions.create(
        model="p5", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == "晚上好，世界。"
    assert len([piece for piece in pieces if piece]) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 3


def test_stop_text_ends_the_answer(client: openai.OpenAI, say: Callable[[str], None]) -> None:
    say("晚上好，世界。")
    answer = client.chat.completions.create(model="tiny", messages=USER, stop="世界")
    assert answer.choices[0].message.content == "晚上好，"
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_tool_is_called(client: openai.OpenAI, say: Callable[[str], None], stream: bool) -> None:
    say("weather\n```python\ntool_call(city='北京')\n```")
    answer = client.chat.completions.create(
        model="tiny", messages=USER, tools=[TOOL], stream=stream
    )
    if stream:
        chunks = list(answer)
        assert not any(chunk.choices[0].delta.content for chunk in chunks)
        calls = next(c.choices[0].delta.tool_calls for c in chunks if c.choices[0].delta.tool_calls)
        reason = chunks[-1].choices[0].finish_reason
    else:
        calls, reason = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
    assert reason == "tool_calls"
    assert calls[0].function.name == "weather"
    assert json.loads(calls[0].function.arguments) == {"city": "北京"}


@pytest.mark.parametrize("argument", ["{1, 2}", "b'a'", "1e999", "'\\ud83d'", "..."])
def test_call_that_is_no_json_is_text(
    client: openai.OpenAI, say: Callable[[str], None], argument: str
) -> None:
    text = f"weather\n```python\ntool_call(city={argument})\n```"
    say(text)
    answer = client.chat.completions.create(model="tiny", messages=USER, tools=[TOOL]).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("stop", text)


def test_function_may_have_a_field_of_any_name(client: openai.OpenAI) -> None:
    tool = TOOL | {"function": TOOL["function"] | {"function": "x"}}
    client.chat.completions.create(model="tiny", messages=USER, tools=[tool], max_tokens=1)


def test_tool_result_is_part_of_the_prompt(
    client: openai.OpenAI, say: Callable[[str], None]
) -> None:
    call = {"name": "weather", "arguments": '{"city": "北京"}'}
    messages = [
        *USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "晴"},
    ]
    say("晴。")
    answers = [
        client.chat.completions.create(model="tiny", messages=messages[:n], tools=[TOOL])
        for n in (1, 3)
    ]
    assert answers[1].choices[0].message.content == "晴。"
    assert answers[1].usage.prompt_tokens > answers[0].usage.prompt_tokens + 10


@pytest.mark.parametrize("stream", [False, True])
def test_completion(
    bases: dict[str, Base], client: openai.OpenAI, say: Callable[[str], None], stream: bool
) -> None:
    say("世界")
    ids = bases["glm"].tokenizer("你好")["input_ids"]
    answer = client.completions.create(model="tiny", prompt="你好", stream=stream)
    if stream:
        assert "".join(chunk.choices[0].text for chunk in answer) == "世界"
    else:
        assert answer.choices[0].text == "世界"
        assert answer.usage.prompt_tokens == len(ids)


def test_errors_that_the_client_knows(client: openai.OpenAI, url: str) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="model must be one of tiny") as unknown:
        create(model="gpt-4", messages=USER)
    assert unknown.value.code == "model_not_found"
    wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.chat.completions.create(model="tiny", messages=USER)
    with pytest.raises(openai.BadRequestError, match="n is not supported"):
        create(model="tiny", messages=USER, n=2)
    with pytest.raises(openai.BadRequestError, match="max_tokens must be at least 1") as negative:
        create(model="tiny", messages=USER, max_tokens=-1)
    assert negative.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError, match="at most 512 tokens") as long:
        create(model="tiny", messages=[{"role": "user", "content": "你好" * 1000}])
    assert long.value.code == "context_length_exceeded"
    create(model="tiny", messages=USER, max_tokens=1, presence_penalty=0, user="me")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "valid JSON"),
        (b"[]", 400, "the body: "),
        ({"model": "tiny"}, 400, "messages: Field required"),
        ({"model": "tiny", "messages": []}, 400, "messages: List should have"),
        ({"model": "tiny", "messages": USER, "tempreature": 0}, 400, "nearest is temperature"),
        ({"model": "tiny", "messages": USER, "temperature": 9}, 400, "from 0 to 2"),
        ({"model": "tiny", "messages": [{"role": "me"}]}, 400, "messages.0.role"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "JSON"),
        (b'{"model": "\\u0000\\u001b", "messages": [{"role": "user"}]}', 404, "must be one of"),
        (b" " * (MAX_BODY + 1), 413, "at most"),
    ],
)
def test_what_is_refused(url: str, body: bytes | dict, status: int, message: str) -> None:
    response = post(url, body)
    assert response.status_code == status
    error = response.json()["error"]
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_unknown_paths_have_the_same_form(url: str) -> None:
    headers = {"Authorization": "Bearer a-key"}
    assert httpx.get(f"{url}/v1/nothing", headers=headers).json()["error"]["message"] == "Not Found"
    assert httpx.get(f"{url}/v1/completions", headers=headers).status_code == 405


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_cancels(url: str, stream: bool) -> None:
    def cancelled() -> int:
        text = httpx.get(f"{url}/metrics").text
        return int(text.split('finish_reason="cancelled"} ')[1].split("\n")[0])

    before = cancelled()
    body = {"model": "tiny", "messages": USER, "temperature": 0, "stream": stream}
    with httpx.Client(headers={"Authorization": "Bearer a-key"}) as http:
        if stream:
            with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post(f"{url}/v1/chat/completions", json=body, timeout=0.2)
    for _ in range(500):
        if cancelled() == before + 1:
            return
        time.sleep(0.02)
    pytest.fail("the answer goes on without its client")


def test_adapters_come_and_go(
    admin: openai.OpenAI, client: openai.OpenAI, saved: dict, tmp_path: object
) -> None:
    def load(name: str, directory: object, by: openai.OpenAI = admin) -> object:
        body = {"name": name, "directory": str(directory)}
        return by.post("/load_adapter", body=body, cast_to=object)

    def ask(model: str) -> str:
        answer = client.chat.completions.create(
            model=model, messages=USER, temperature=0, max_tokens=8
        )
        return answer.choices[0].message.content

    with pytest.raises(openai.AuthenticationError):
        load("new", saved["p5"], by=client)
    for name, twin in (("new", "p5"), ("team/new", "lora")):
        load(name, saved[twin])
        assert ask(name) == ask(twin) != ask("tiny")
        assert admin.models.retrieve(name).id == name
        assert admin.models.delete(name).deleted
        with pytest.raises(openai.NotFoundError):
            ask(name)
    for name, directory in (("p5", saved["p5"]), ("tiny", saved["p5"]), ("new", tmp_path)):
        with pytest.raises(openai.BadRequestError):
            load(name, directory)
    assert "new" not in [model.id for model in client.models.list()]
    with pytest.raises(openai.BadRequestError, match="base must stay"):
        admin.models.delete("tiny")


def test_health_ends_with_the_engine(bases: dict[str, Base]) -> None:
    engine = bases["glm"].engine()
    api = Api(engine, "tiny", Keys())
    assert api.health().status_code == 200
    engine.close()
    assert api.health().status_code == 503


def test_health_and_metrics_need_no_key(url: str) -> None:
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "models": 6}
    assert "chatglm_ptuning_waiting 0" in httpx.get(f"{url}/metrics").text
    assert httpx.get(f"{url}/v1/models").status_code == 401

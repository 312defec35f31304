"""What clients do wrong, on purpose or not: the server says so, stays up, and answers the next one as before."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from chatglm_ptuning.data.conversation import Message
from chatglm_ptuning.serving.api import Keys, Running, create_app
from chatglm_ptuning.serving.sampling import Sampling
from chatglm_ptuning.serving.schema import ApiError
from chatglm_ptuning.serving.server import Server
from tests.serving.conftest import Base

NORMAL = {"messages": [{"role": "user", "content": "你好"}], "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def http(bases: dict[str, Base]) -> Iterator[httpx.Client]:
    """A client of a real server, with the administrator's key."""
    engine = bases["glm"].engine()
    app = create_app(engine, "tiny", Keys("a-key", "an-admin-key"))
    config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5)
    socket = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{socket.getsockname()[1]}"
    headers = {"Authorization": "Bearer an-admin-key"}
    with httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as client:
        yield client
    server.should_exit = True
    thread.join()


def answers(http: httpx.Client) -> list[str]:
    """What a base, a prefix and LoRA say to the same message."""
    texts = []
    for model in ("tiny", "p5", "lora"):
        response = http.post("/v1/chat/completions", json=NORMAL | {"model": model})
        assert response.status_code == 200, response.text
        texts.append(response.json()["choices"][0]["message"]["content"])
    return texts


@pytest.fixture(scope="module")
def known(http: httpx.Client) -> list[str]:
    texts = answers(http)
    assert len(set(texts)) == 3
    return texts


@pytest.fixture(autouse=True)
def nothing_leaks(http: httpx.Client, known: list[str]) -> Iterator[None]:
    """After each test the server is idle, and answers as before."""
    yield
    assert answers(http) == known
    for _ in range(500):
        lines = http.get("/metrics").text.splitlines()
        if {"chatglm_ptuning_running 0", "chatglm_ptuning_waiting 0"} <= set(lines):
            return
        time.sleep(0.02)
    pytest.fail("something goes on without a client")


def refused(response: httpx.Response, status: int, *words: str) -> None:
    """The response is an error in OpenAI's form that says these words."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"]


def test_clients_leave_in_mid_stream(http: httpx.Client) -> None:
    body = {"messages": NORMAL["messages"], "temperature": 0, "stream": True}
    for model in ("tiny", "p5", "lora", "p13"):
        with http.stream("POST", "/v1/chat/completions", json=body | {"model": model}) as response:
            next(response.iter_lines())


def test_prompt_of_ten_megabytes(http: httpx.Client) -> None:
    long = [{"role": "user", "content": "x" * 10 * 2**20}]
    body = {"model": "tiny", "messages": long}
    refused(http.post("/v1/chat/completions", json=body), 413, "at most")
    refused(
        http.post("/v1/completions", json={"model": "p5", "prompt": "x" * 10**6}), 400, "at most"
    )


def test_many_tiny_requests(http: httpx.Client, known: list[str]) -> None:
    n = int(os.environ.get("TINY_REQUESTS", "500"))
    models = ("tiny", "p5")

    async def ask_all() -> list[tuple[int, bool]]:
        requests, outcomes = iter(range(n)), list[tuple[int, bool]]()
        async with httpx.AsyncClient(
            base_url=http.base_url, headers=http.headers, timeout=60, trust_env=False
        ) as client:

            async def ask() -> None:
                for i in requests:
                    body = NORMAL | {"model": models[i % 2], "max_tokens": 1}
                    response = await client.post("/v1/chat/completions", json=body)
                    text = response.json()["choices"][0]["message"]["content"]
                    outcomes.append((response.status_code, known[i % 2].startswith(text)))

            await asyncio.gather(*(ask() for _ in range(32)))
        return outcomes

    outcomes = asyncio.run(ask_all())
    assert len(outcomes) == n
    assert set(outcomes) == {(200, True)}


@pytest.mark.parametrize("path", ["chat/completions", "completions", "load_adapter"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"null", b"[" * 100_000, b'"\\u0000"'])
def test_invalid_json(http: httpx.Client, path: str, content: bytes) -> None:
    refused(http.post(f"/v1/{path}", content=content), 400)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_tokens": -5}, ["max_tokens must be at least 1"]),
        ({"max_tokens": 10**30}, ["max_tokens"]),
        ({"tempreature": 1}, ["tempreature", "temperature"]),
        ({"stop": [""] * 3}, ["stop"]),
        ({"seed": 1e400}, []),
        ({"model": ["p5"]}, ["model"]),
    ],
)
def test_wrong_fields(http: httpx.Client, wrong: dict, words: list[str]) -> None:
    body = json.dumps(NORMAL | {"model": "p5"} | wrong)
    refused(http.post("/v1/chat/completions", content=body), 400, *words)


def test_surrogate_halves_are_refused(http: httpx.Client) -> None:
    for field in ({"content": "a\ud83d"}, {"content": "b", "name": "\ude00"}):
        body = NORMAL | {"model": "p5", "messages": [{"role": "user"} | field]}
        refused(http.post("/v1/chat/completions", content=json.dumps(body)), 400)
    body = {"model": "p5", "prompt": "\udcff"}
    refused(http.post("/v1/completions", content=json.dumps(body)), 400)


def test_control_characters_are_text(http: httpx.Client) -> None:
    text = "".join(map(chr, [*range(32), 127, 0x200B, 0x202E, 0xFEFF, 0xFFFF])) + "<|user|>[gMASK]"
    body = NORMAL | {"model": "p5", "messages": [{"role": "user", "content": text}]}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text


def test_adapter_directory_goes_while_it_answers(
    http: httpx.Client, saved: dict[str, Path], known: list[str], tmp_path: Path
) -> None:
    for twin, text in (("p5", known[1]), ("lora", known[2])):
        folder = Path(shutil.copytree(saved[twin], tmp_path / twin))
        load = {"name": "new", "directory": str(folder)}
        assert http.post("/v1/load_adapter", json=load).status_code == 200
        body = NORMAL | {"model": "new", "max_tokens": 200, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            shutil.rmtree(folder)
            whole = "".join(lines)
        assert whole.endswith("data: [DONE]")
        answer = http.post("/v1/chat/completions", json=NORMAL | {"model": "new"}).json()
        assert answer["choices"][0]["message"]["content"] == text
        assert http.delete("/v1/models/new").status_code == 200
        refused(http.post("/v1/load_adapter", json=load), 400, "adapter")


def damage(config: Path, kind: str) -> None:
    """Break an adapter's config in one way."""
    content = json.loads(config.read_text(encoding="utf-8"))
    if kind == "no peft_type":
        del content["peft_type"]
    elif kind == "odd peft_type":
        content["peft_type"] = ["PREFIX"]
    elif kind == "unknown peft_type":
        content["peft_type"] = "NOTHING"
    elif kind == "no length":
        content = {"peft_type": content["peft_type"]}
    elif kind == "wrong length":
        content["num_virtual_tokens"] = "many"
    text = {"a list": "[]", "half": json.dumps(content)[:40], "empty": ""}.get(kind)
    config.write_text(text if text is not None else json.dumps(content), encoding="utf-8")
    if kind == "not text":
        config.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    "kind",
    [
        "no peft_type",
        "odd peft_type",
        "unknown peft_type",
        "no length",
        "wrong length",
        "a list",
        "half",
        "empty",
        "not text",
    ],
)
def test_adapter_config_is_damaged(
    http: httpx.Client, saved: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder = Path(shutil.copytree(saved["p5"], tmp_path / "damaged"))
    damage(folder / "adapter_config.json", kind)
    body = {"name": "new", "directory": str(folder)}
    refused(http.post("/v1/load_adapter", json=body), 400)
    assert "new" not in [model["id"] for model in http.get("/v1/models").json()["data"]]


def test_second_signal_gives_answers_up_and_says_so(bases: dict[str, Base]) -> None:
    engine = bases["glm"].engine()
    server = Server(uvicorn.Config(create_app(engine, "tiny")), engine)
    prompt = engine.encode([Message("user", "裙")])

    async def ask() -> None:
        running = Running(engine, prompt, Sampling(200), "p5", None)
        server.handle_exit(signal.SIGTERM, None)
        assert engine.is_open
        server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(ApiError, match="the server is shutting down"):
            [update async for update in running]

    asyncio.run(ask())
    assert server.should_exit
    assert not server.force_exit
    engine.close()


@pytest.mark.slow
def test_sigterm_with_requests_under_way() -> None:
    command = [sys.executable, "-m", "chatglm_ptuning", "serve", "--port", "0", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split(" at ")[1].split(" ")[0]
        body = NORMAL | {"model": "model", "stream": True, "max_tokens": 60}
        first = httpx.stream("POST", f"{url}/chat/completions", json=body, trust_env=False)
        with first as response:
            lines = response.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/models", trust_env=False)
    finally:
        server.kill()
        server.communicate()

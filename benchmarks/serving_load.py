"""Many clients at once on the demo model: errors, mixed-up answers, the server's memory, tokens/s.

The server is a process of its own (`python -m chatglm_ptuning serve`) with the base and random prefixes of several
lengths. The greedy answer to every (model, prompt) is asked for once, alone; afterwards each client asks for one after
another without a pause, every other one as a stream, and each answer must be the known one. In bfloat16 the likeliest
two tokens may change places with the batch, and such answers are counted as mixed up.

    python benchmarks/serving_load.py --clients 64 --seconds 120 [--dtype bfloat16]
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import torch

from chatglm_ptuning.loading import load_model
from chatglm_ptuning.serving.opening import DEMO_MODEL
from chatglm_ptuning.tuners import PrefixTuningConfig, add_adapter, prefix, save_adapter

PREFIXES = {f"p{length}": length for length in (4, 16, 32, 64, 128)}  # name -> virtual tokens
STD = 5.0  # of the prefixes' entries; smaller ones leave the base's answers as they are
PROMPTS, MAX_TOKENS = 8, 48


def make_adapters(folder: Path) -> list[str]:
    """Save random prefixes for the demo model.

    Returns:
        What `serve` takes: NAME=DIR of each.
    """
    model = load_model(DEMO_MODEL, "float32", "cpu")
    torch.manual_seed(0)
    for name, length in PREFIXES.items():
        add_adapter(model, PrefixTuningConfig(num_virtual_tokens=length), name)
        for parameter in prefix.parameters(model, name):
            torch.nn.init.normal_(parameter, std=STD)
        save_adapter(model, folder / name, name)
    return [f"{name}={folder / name}" for name in PREFIXES]


def start_server(adapters: list[str], dtype: str) -> tuple[subprocess.Popen[str], str]:
    """The server's process and its address, once it listens."""
    command = [sys.executable, "-m", "chatglm_ptuning", "serve", "--port", "0"]
    command += ["--device", "cpu", "--dtype", dtype]
    for adapter in adapters:
        command += ["--adapter", adapter]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    greeting = server.stdout.readline()
    if " at http" not in greeting:
        sys.exit("the server did not start")
    return server, greeting.split(" at ")[1].split(" ")[0]


def resident(pid: int) -> float:
    """Memory of a process now, in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def ask(http: httpx.AsyncClient, model: str, prompt: str, stream: bool) -> tuple[str, int]:
    """A greedy answer and its number of tokens.

    Raises:
        httpx.HTTPError: The server refuses, or goes away.
        KeyError: The answer broke off.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "stream": stream,
    }
    if not stream:
        response = (await http.post("chat/completions", json=body)).raise_for_status()
        answer = response.json()
        return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]
    body["stream_options"] = {"include_usage": True}
    text, chunk = "", {}
    async with http.stream("POST", "chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                text += "".join(c["delta"].get("content") or "" for c in chunk["choices"])
    return text, chunk["usage"]["completion_tokens"]


async def client(
    http: httpx.AsyncClient,
    known: dict[tuple[str, str], str],
    end: float,
    counts: Counter[str],
    number: int,
) -> None:
    """Ask until the time is over."""
    rng = random.Random(number)
    pairs = list(known)
    while time.perf_counter() < end:
        model, prompt = rng.choice(pairs)
        counts["requests"] += 1
        try:
            text, tokens = await ask(http, model, prompt, rng.random() < 0.5)
        except (httpx.HTTPError, KeyError) as error:
            counts["errors"] += 1
            print(f"error: {error!r}")
            continue
        counts["tokens"] += tokens
        if text != known[model, prompt]:
            counts["mixed up"] += 1
            if counts["mixed up"] <= 3:
                print(f"{model} on {prompt!r}: {text!r} instead of {known[model, prompt]!r}")


async def load(url: str, pid: int, clients: int, seconds: float) -> Counter[str]:
    """Run all clients and print what the server's memory does.

    Returns:
        Counts of requests, errors, mixed-up answers and tokens.
    """
    rows = (DEMO_MODEL.parent / "data" / "test.json").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(row)["content"] for row in rows[:PROMPTS]]
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False) as http:
        models = [model["id"] for model in (await http.get("models")).json()["data"]]
        known = {(m, p): (await ask(http, m, p, False))[0] for m in models for p in prompts}
        print(f"{len(known)} answers of {len(models)} models, {len(set(known.values()))} different")
        counts: Counter[str] = Counter()
        began = time.perf_counter()
        tasks = [
            asyncio.create_task(client(http, known, began + seconds, counts, i))
            for i in range(clients)
        ]
        await asyncio.sleep(min(10, seconds / 2))
        early = resident(pid)
        await asyncio.gather(*tasks)
        elapsed = time.perf_counter() - began
    print(
        f"{clients} clients, {elapsed:.0f} s: {counts['requests']} requests, {counts['errors']} errors,"
        f" {counts['mixed up']} mixed up; {counts['tokens'] / elapsed:.0f} tokens/s;"
        f" server's memory {early:.0f} MB early, {resident(pid):.0f} MB in the end"
    )
    return counts


def main() -> None:
    """Print the figures; exit code 1 if an answer is wrong or missing."""
    parser = argparse.ArgumentParser(description="Load on the server.")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server, url = start_server(make_adapters(Path(folder)), args.dtype)
        try:
            counts = asyncio.run(load(url, server.pid, args.clients, args.seconds))
        finally:
            server.terminate()
            print(f"the server's exit code after SIGTERM: {server.wait(60)}")
    sys.exit(1 if counts["errors"] or counts["mixed up"] else 0)


if __name__ == "__main__":
    main()

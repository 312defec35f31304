"""Rows per second through the data pipeline on one core, and the memory that streaming takes.

    python benchmarks/data_throughput.py [--model DIR] [--template NAME] [--rows 100000]

Rows are made up: questions of about 40 characters, answers of about 80. The tokenizer alone is timed first, so that
its part in the rest can be seen.
"""

import argparse
import gc
import json
import os
import random
import tempfile
import time
from collections import deque
from itertools import islice
from pathlib import Path

from chatglm_ptuning.data.check import check_files
from chatglm_ptuning.data.dataset import DataConfig
from chatglm_ptuning.data.splits import build_dataset
from chatglm_ptuning.data.template_choice import choose_template
from chatglm_ptuning.models.tokenizer_loading import load_tokenizer

WORDS = (  # noqa: SIM905 - a list would take a line a word
    "上衣 裙子 外套 衬衫 牛仔布 棉麻 蕾丝 白色 藏青色 浅粉色 简约 文艺 复古 清新 刺绣 印花 撞色 圆领 收腰 显瘦"
    " 舒适 百搭 时尚 气质 设计 优雅 蝴蝶结 连衣裙 的 而 又 与 让 更 很 这款 采用 搭配 展现 穿着 日常 出门 A4 100%"
).split()
MIB = 2**20


def make_text(draw: random.Random, length: int) -> str:
    """Words and punctuation up to about so many characters."""
    text = ""
    while len(text) < length:
        text += draw.choice(WORDS) + draw.choice(["", "", "，", "。", "*"])
    return text


def write_rows(file: Path, rows: int) -> None:
    """Rows that all differ."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as output:
        for number in range(rows):
            row = {"content": f"{number}号{make_text(draw, 36)}", "summary": make_text(draw, 80)}
            output.write(json.dumps(row, ensure_ascii=False) + "\n")


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory now, or the most since `reset_peak` (Linux)."""
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def reset_peak() -> int:
    """Begin a new peak; gives the bytes in memory now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def main() -> None:
    """Print one line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo/model", help="directory of the tokenizer")
    parser.add_argument("--template", help="chat format, where the tokenizer does not tell it")
    parser.add_argument("--rows", type=int, default=100_000)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tokenizer = load_tokenizer(arguments.model)
    template = choose_template(arguments.template, tokenizer)

    def show(name: str, started: float, memory: int) -> None:
        rate = arguments.rows / (time.perf_counter() - started)
        print(
            f"{name:<28} {rate:>9,.0f} rows/s {(resident(peak=True) - memory) / MIB:>8.0f} MiB more memory at its peak"
        )

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        write_rows(file, arguments.rows)

        memory, started = reset_peak(), time.perf_counter()
        characters = tokens = 0
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                for text in json.loads(line).values():
                    characters += len(text)
                    tokens += len(tokenizer.encode_ordinary(text))
        show("tokenizer alone", started, memory)
        print(
            f"  {characters / arguments.rows:.0f} characters, {tokens / arguments.rows:.0f} tokens a row"
        )

        memory, started = reset_peak(), time.perf_counter()
        stream, _ = build_dataset(
            DataConfig(train_file=str(file), streaming=True), "train", template, tokenizer
        )
        deque(islice(iter(stream), arguments.rows), maxlen=0)
        show("streamed and tokenised", started, memory)

        memory, started = reset_peak(), time.perf_counter()
        config = DataConfig(train_file=str(file), cache_dir=str(Path(folder, "cache")))
        build_dataset(config, "train", template, tokenizer)
        show("tokenised and cached", started, memory)

        memory, started = reset_peak(), time.perf_counter()
        build_dataset(config, "train", template, tokenizer)
        show("from the cache", started, memory)

        memory, started = reset_peak(), time.perf_counter()
        build_dataset(DataConfig(train_file=str(file)), "train", template, tokenizer)
        show("tokenised in memory", started, memory)

        memory, started = reset_peak(), time.perf_counter()
        check_files([str(file)], config, print, (), template, tokenizer)
        show("checked", started, memory)


if __name__ == "__main__":
    main()

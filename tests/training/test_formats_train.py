"""Every layout of rows and every form of file trains: from a file of each, through the pipeline, one optimizer step."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from chatglm_ptuning.data.collator import Collator
from chatglm_ptuning.data.config import DataConfig
from chatglm_ptuning.data.splits import build_dataset
from chatglm_ptuning.data.template import TEMPLATES
from chatglm_ptuning.models.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.models.tokenization_chatglm2 import ChatGLM2Tokenizer
from chatglm_ptuning.training.trainer import AdapterTrainer
from chatglm_ptuning.tuners import PrefixTuningConfig, add_adapter
from tests.checkpoints import GOLDEN, tiny_model

Train = Callable[..., AdapterTrainer]

TOKENIZERS = {
    "chatglm": ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer_v1"),
    "chatglm3": ChatGLM2Tokenizer.from_pretrained(GOLDEN / "tokenizer_v3", role_tokens=True),
}
TOOLS = [{"name": "weather", "description": "天气", "parameters": {"type": "object"}}]
CALL = {"name": "weather", "arguments": '{"city": "北京"}'}
USER, BOT = {"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好!"}
WEATHER = {"role": "user", "content": "天气"}

# layout -> a row, the answers that are learned from it, whether it needs a template with tools
LAYOUTS: dict[str, tuple[dict[str, Any], list[str], bool]] = {
    "content": ({"content": "你好", "summary": "再见"}, ["再见"], False),
    "prompt": ({"prompt": "你好", "response": "再见"}, ["再见"], False),
    "prompt with history": (
        {"prompt": "天气", "response": "再见", "history": [["你好", "晴天"]]},
        ["晴天", "再见"],
        False,
    ),
    "instruction": ({"instruction": "你好", "input": "", "output": "再见"}, ["再见"], False),
    "instruction with history": (
        {"instruction": "你", "input": "好", "output": "再见", "history": [["你好", "晴天"]]},
        ["晴天", "再见"],
        False,
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "再见"}]},
        ["再见"],
        False,
    ),
    "sharegpt with a call": (
        {
            "conversations": [
                {"from": "human", "value": "天气"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "22"},
                {"from": "gpt", "value": "晴天"},
            ],
            "tools": json.dumps(TOOLS),
        },
        ["tool_call(city='北京')", "晴天"],
        True,
    ),
    "chatglm3 with loss flags": (
        {"conversations": [USER, {**BOT, "loss": False}, WEATHER, {**BOT, "content": "晴天"}]},
        ["晴天"],
        False,
    ),
    "chatglm3 with tools": (
        {
            "tools": TOOLS,
            "conversations": [
                {"role": "system", "content": "令"},
                WEATHER,
                {
                    "role": "tool",
                    "name": "weather",
                    "parameters": {"city": "北京"},
                    "observation": "22",
                },
                {**BOT, "content": "晴天"},
            ],
        },
        ["tool_call(city='北京')", "晴天"],
        True,
    ),
    "openai": ({"messages": [USER, {**BOT, "content": "再见"}]}, ["再见"], False),
    "openai with tools": (
        {
            "messages": [
                WEATHER,
                {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
                {"role": "tool", "content": "22"},
                {**BOT, "content": "晴天"},
            ],
            "tools": [{"type": "function", "function": TOOLS[0]}],
        },
        ["tool_call(city='北京')", "晴天"],
        True,
    ),
}
ROWS = [{"content": f'颜色,"红"{n}', "summary": f"这件\n红{n}"} for n in range(3)]


def text_of(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def pretty(rows: list[dict[str, Any]]) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False, indent=2) for row in rows)


def write_table(delimiter: str) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(ROWS[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)

    return write


def write_parquet(file: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)


def write_folder(folder: Path) -> None:
    folder.mkdir()
    for number, row in enumerate(ROWS):
        (folder / f"{number}.json").write_text(text_of([row]), encoding="utf-8")


# name of the file -> what writes it, settings beside it
FILES: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "lines.jsonl": (lambda file: file.write_text(text_of(ROWS), "utf-8"), {}),
    "array.json": (lambda file: file.write_text(json.dumps(ROWS), "utf-8"), {}),
    "pretty_array.json": (lambda file: file.write_text(json.dumps(ROWS, indent=1)), {}),
    "pretty_objects.json": (lambda file: file.write_text(pretty(ROWS), "utf-8"), {}),
    "table.csv": (write_table(","), {}),
    "table.tsv": (write_table("\t"), {}),
    "table.parquet": (write_parquet, {}),
    "zipped.jsonl.gz": (lambda file: file.write_bytes(gzip.compress(text_of(ROWS).encode())), {}),
    "folder": (write_folder, {}),
    "marked.jsonl": (lambda file: file.write_text(text_of(ROWS), "utf-8-sig"), {}),
    "gbk.json": (lambda file: file.write_text(pretty(ROWS), "gb18030"), {"encoding": "gb18030"}),
}


def train_one_step(train: Train, family: str, **settings: Any) -> list[dict[str, list[int]]]:
    """Take one step on all rows of a data section; the prefix must move."""
    config = DataConfig(max_source_length=256, max_target_length=32, **settings)
    tokenizer = TOKENIZERS[family]
    rows, report = build_dataset(config, "train", TEMPLATES[family], tokenizer)
    assert report.used == report.rows == len(rows)
    model = tiny_model(family)
    add_adapter(model, PrefixTuningConfig(num_virtual_tokens=4, prefix_dropout=0.0))
    prefix = model.get_decoder().prefix_tuning.encoders["default"].embedding.weight
    before: Tensor = prefix.detach().clone()
    trainer = train(model, start=False, rows=rows, adapter_name="default", max_steps=1)
    trainer.data_collator = Collator(tokenizer.pad_token_id)
    trainer.train()
    assert trainer.state.global_step == 1
    assert (prefix != before).any()
    return list(rows)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        (family, layout)
        for family in TOKENIZERS
        for layout, (_, _, has_tools) in LAYOUTS.items()
        if family == "chatglm3" or not has_tools
    ],
)
def test_every_layout_trains(family: str, layout: str, train: Train, tmp_path: Path) -> None:
    row, answers, _ = LAYOUTS[layout]
    file = tmp_path / "rows.jsonl"
    file.write_text(text_of([row, row]), encoding="utf-8")
    rows = train_one_step(train, family, train_file=str(file))
    assert rows[0] == rows[1]
    learned = [label for label in rows[0]["labels"] if label != -100]
    text = TOKENIZERS[family].decode(learned)
    for answer in answers if family == "chatglm3" else answers[-1:]:
        assert answer in text
        text = text.partition(answer)[2]
    assert "你好" not in TOKENIZERS[family].decode(learned)


@pytest.mark.parametrize("name", FILES)
def test_every_form_of_file_trains(name: str, train: Train, tmp_path: Path) -> None:
    plain = tmp_path / "plain.jsonl"
    plain.write_text(text_of(ROWS), encoding="utf-8")
    expected, _ = build_dataset(
        DataConfig(train_file=str(plain)), "train", TEMPLATES["chatglm"], TOKENIZERS["chatglm"]
    )
    write, settings = FILES[name]
    write(tmp_path / name)
    rows = train_one_step(train, "chatglm", train_file=str(tmp_path / name), **settings)
    assert len(rows) == len(ROWS)
    assert rows == list(expected)


def test_several_files_with_weights_train(train: Train, tmp_path: Path) -> None:
    files = []
    for name in ("lines.jsonl", "table.csv"):
        files.append(str(tmp_path / name))
        FILES[name][0](tmp_path / name)
    rows = train_one_step(train, "chatglm", train_file=files, train_weights=[2.0, 1.0])
    assert len(rows) == 3 * len(ROWS)
    assert rows[0] == rows[1] == rows[6]

"""A run whose adapter starts from an earlier one (`adapter.from`), or from a text (`adapter.init: text`)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from chatglm_ptuning import cli, load_model, load_tokenizer
from chatglm_ptuning.config import RunConfig
from chatglm_ptuning.tuners import PrefixTuningConfig, add_adapter
from chatglm_ptuning.tuners.prefix import encoder_of
from chatglm_ptuning.tuners.prefix_init import init_from_text
from tests.conftest import Checkpoint

Command = Callable[..., int]
KINDS = {
    "prefix": "{type: ptuning_v2, num_virtual_tokens: 3}",
    "projected prefix": "{type: ptuning_v2, num_virtual_tokens: 3, prefix_projection: true}",
    "lora": "{type: lora, r: 2, lora_alpha: 4}",
    "ia3": "{type: ia3}",
}
TEXT = "颜色#红色"


@pytest.fixture(scope="module")
def train(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """`train(adapter, output_dir, overrides)`: two steps on four rows, nothing scored."""
    directory = tmp_path_factory.mktemp("train")
    rows = [{"content": f"颜色#{c}色", "summary": f"这件是{c}色的。"} for c in "红蓝白黑"]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (directory / "rows.json").write_text("\n".join(lines), encoding="utf-8")

    def command(adapter: str, output_dir: Path, *overrides: str) -> int:
        (directory / "run.yaml").write_text(
            f"""
            model: {{path: {checkpoint("chatglm")}, dtype: float32}}
            data: {{train_file: {directory / "rows.json"}}}
            adapter: {adapter}
            training:
              output_dir: {output_dir}
              max_steps: 2
              per_device_train_batch_size: 2
              learning_rate: 1e-1
              lr_scheduler_type: constant
              logging_steps: 1
              save_steps: 2
              eval_strategy: no
              use_cpu: true
            generation: {{max_new_tokens: 4}}
            """,
            encoding="utf-8",
        )
        return cli.main(["train", "--config", str(directory / "run.yaml"), *overrides])

    return command


@pytest.fixture(scope="module")
def first(train: Command, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`first(kind)`: a trained adapter, which no test may change."""
    root = tmp_path_factory.mktemp("first")

    def directory(kind: str) -> Path:
        if not (root / kind).exists():
            assert train(KINDS[kind], root / kind) == 0
        return root / kind

    return directory


def saved(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def steps(directory: Path) -> list[int]:
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if "loss" in row]


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_run_starts_from_an_adapter(
    train: Command,
    first: Callable[[str], Path],
    tmp_path: Path,
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = first(kind)
    capsys.readouterr()
    assert train(KINDS[kind], tmp_path, f"adapter.from={start}", "training.learning_rate=0") == 0
    line = f"starting from the adapter in {start}: optimizer, schedule and data start anew\n"
    assert line in capsys.readouterr().out
    before, after = saved(start), saved(tmp_path)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert steps(tmp_path) == [1, 2]
    assert RunConfig.load(tmp_path / "run_config.yaml").adapter.start == str(start)


@pytest.mark.parametrize(
    ("kind", "adapter", "message"),
    [
        ("prefix", "{num_virtual_tokens: 5}", "(5, 128)}, got {'prefix_encoder.embedding.weight'"),
        ("prefix", "{type: lora, r: 2}", "and peft_type='LORA' here"),
        ("lora", "{type: ia3}", "and peft_type='IA3' here"),
        ("lora", "{type: lora, r: 2, lora_alpha: 8}", "and lora_alpha=8 here"),
        ("lora", "{type: lora, r: 4, lora_alpha: 4}", "got (2, 32) in the file and (4, 32)"),
    ],
)
def test_another_kind_or_shape_is_one_sentence(
    train: Command,
    first: Callable[[str], Path],
    tmp_path: Path,
    kind: str,
    adapter: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = first(kind)
    capsys.readouterr()
    assert train(adapter, tmp_path, f"adapter.from={start}") == 1
    error = capsys.readouterr().err
    assert "adapter.from must be an adapter like the one to be trained, but " in error
    assert message in error
    assert error.count("\n") == 1


def test_a_checkpoint_comes_before_the_adapter(
    train: Command,
    first: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start, out = shutil.copytree(first("prefix"), tmp_path / "start"), tmp_path / "out"
    resume = (f"adapter.from={start}", "training.resume_from_checkpoint=true")
    capsys.readouterr()
    assert train(KINDS["prefix"], out, *resume) == 0
    assert f"starting from the adapter in {start}" in capsys.readouterr().out
    shutil.rmtree(start)
    assert train(KINDS["prefix"], out, *resume, "training.max_steps=4") == 0
    said = capsys.readouterr().out
    assert "going on from " in said
    assert "starting from" not in said
    assert steps(out) == [1, 2, 3, 4]
    assert train(KINDS["prefix"], out, "adapter.from=other", *resume[1:]) == 1
    assert "got adapter.from='" in capsys.readouterr().err
    assert train(KINDS["prefix"], out, resume[0]) == 1
    assert f"got '{start}'; give the directory that training wrote" in capsys.readouterr().err


def test_a_run_starts_from_a_text(
    train: Command, tmp_path: Path, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = f"{{type: ptuning_v2, init: text, init_text: '{TEXT}'}}"
    assert train(adapter, tmp_path, "training.learning_rate=0") == 0
    ids = load_tokenizer(checkpoint("chatglm")).encode_ordinary(TEXT)
    model = load_model(checkpoint("chatglm"), "float32", "cpu")
    add_adapter(model, PrefixTuningConfig(num_virtual_tokens=len(ids)), "text")
    init_from_text(model, "text", ids)
    expected = encoder_of(model, "text").embedding.weight
    assert torch.equal(saved(tmp_path)["prefix_encoder.embedding.weight"], expected)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["num_virtual_tokens"] == len(ids)
    more = (
        "training.max_steps=4",
        "training.learning_rate=0",
        "training.resume_from_checkpoint=true",
    )
    assert train(adapter, tmp_path, *more) == 0
    capsys.readouterr()
    assert train(adapter, tmp_path, "adapter.num_virtual_tokens=20") == 1
    error = capsys.readouterr().err
    assert f"got num_virtual_tokens=20 and {len(ids)} tokens of text; leave" in error

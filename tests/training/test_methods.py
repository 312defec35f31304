"""Every method on ChatGLM-6B, ChatGLM2 and ChatGLM3: trained on the demo's rows, saved, opened in another process."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from chatglm_ptuning import cli
from chatglm_ptuning.training import run as workflow
from chatglm_ptuning.training.trainer import AdapterTrainer

DEMO = Path(__file__).parents[2] / "demo"
SOFT = {"num_virtual_tokens": 4, "encoder_hidden_size": 16}
TEXT = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "类型#裙*颜色#红色"}
METHODS: dict[str, tuple[dict[str, Any], float]] = {  # -> adapter, learning rate
    "lora": ({"type": "lora", "r": 4}, 1e-2),
    "dora": ({"type": "lora", "r": 4, "use_dora": True}, 1e-2),
    "adalora": ({"type": "adalora", "init_r": 4, "target_r": 2, "total_step": 30}, 3e-2),
    "ia3": ({"type": "ia3"}, 1e-1),
    "prompt": ({"type": "prompt_tuning", "num_virtual_tokens": 4}, 3e-1),
    "prompt-text": ({"type": "prompt_tuning", "num_virtual_tokens": 4} | TEXT, 3e-1),
    "mlp": ({"type": "ptuning_v1", "encoder_reparameterization_type": "MLP"} | SOFT, 3e-2),
    "lstm": ({"type": "ptuning_v1", "encoder_reparameterization_type": "LSTM"} | SOFT, 3e-2),
    "prefix": ({"type": "ptuning_v2", "num_virtual_tokens": 4}, 1e-1),
    "projection": (
        {"type": "ptuning_v2", "num_virtual_tokens": 4, "prefix_projection": True},
        3e-2,
    ),
}
PROMPT = torch.arange(5, 25)[None]
OPEN = """
import sys
import torch
from safetensors.torch import save_file
from chatglm_ptuning import load_model

logits = {}
for directory in sys.argv[2:]:
    model = load_model(directory, "float32", "cpu")
    with torch.no_grad():
        logits[directory] = model(torch.arange(5, 25)[None]).logits
save_file(logits, sys.argv[1])
"""


def config(base: Path, method: str, out: Path, rows: Path) -> dict[str, Any]:
    adapter, rate = METHODS[method]
    return {
        "model": {"path": str(base), "dtype": "float32"},
        "data": {
            "train_file": str(rows),
            "validation_file": str(rows),
            "max_source_length": 24,
            "max_target_length": 24,
            "max_eval_samples": 1,  # of what is generated
        },
        "adapter": adapter,
        "training": {
            "output_dir": str(out),
            "max_steps": 30,
            "per_device_train_batch_size": 4,
            "learning_rate": rate,
            "eval_on_start": True,
            "eval_strategy": "steps",
            "eval_steps": 30,
            "save_strategy": "no",
            "use_cpu": True,
        },
        "generation": {"max_new_tokens": 2},
    }


def losses(out: Path) -> list[float]:
    """Of the rows that are trained on: before the first step, after the last."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["eval_loss"] for row in map(json.loads, lines) if "eval_loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["chatglm", "chatglm2", "chatglm3"])
def test_trains_saves_and_opens_elsewhere(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    # soft prompts steer only a model that has learnt something, and of ChatGLM-6B there is one
    base = DEMO / "model" if family == "chatglm" else checkpoint(family)
    rows = tmp_path / "rows.json"
    with (DEMO / "data/train.json").open(encoding="utf-8") as lines:
        rows.write_text("".join(islice(lines, 16)), encoding="utf-8")
    trainers: list[AdapterTrainer] = []

    def keep(**kwargs: Any) -> AdapterTrainer:
        trainers.append(AdapterTrainer(**kwargs))
        return trainers[-1]

    monkeypatch.setattr(workflow, "AdapterTrainer", keep)
    trained: dict[str, Tensor] = {}
    for method in METHODS:
        out, file = tmp_path / method, tmp_path / f"{method}.yaml"
        file.write_text(json.dumps(config(base, method, out, rows)))  # JSON is YAML
        assert cli.main(["train", "--config", str(file)]) == 0, method
        before, after = losses(out)
        assert after < before - 0.2, method
        with torch.no_grad():
            trained[str(out)] = trainers.pop().model.eval()(PROMPT).logits
    command = [sys.executable, "-c", OPEN, str(tmp_path / "logits.safetensors"), *trained]
    subprocess.run(command, check=True)
    assert_close(load_file(tmp_path / "logits.safetensors"), trained, atol=1e-5, rtol=1e-5)

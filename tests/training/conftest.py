import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GlmConfig, GlmForCausalLM, PreTrainedModel

from chatglm_ptuning import cli
from chatglm_ptuning.data.collator import Collator
from chatglm_ptuning.data.dataset import TokenDataset
from chatglm_ptuning.models.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.models.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.training.arguments import make_arguments
from chatglm_ptuning.training.trainer import AdapterTrainer
from tests.checkpoints import tiny_model

VOCAB, SOP, EOP, MASK, GMASK, PAD = 64, 60, 61, 62, 63, 3


def chatglm() -> PreTrainedModel:
    torch.manual_seed(0)
    config = ChatGLMConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        max_sequence_length=64,
        bos_token_id=SOP,
        eos_token_id=EOP,
        mask_token_id=MASK,
        gmask_token_id=GMASK,
        pad_token_id=PAD,
        initializer_range=0.2,
    )
    return ChatGLMForConditionalGeneration(config)


def glm() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=PAD,
        bos_token_id=SOP,
        eos_token_id=EOP,
        initializer_range=0.2,
    )
    return GlmForCausalLM(config)


MODELS = {"chatglm": chatglm, "glm": glm}


def make_rows(count: int, seed: int = 0) -> TokenDataset:
    """Random questions and answers as ChatGLM-6B gets them; the answer repeats the question backwards."""
    rng = random.Random(seed)
    rows = TokenDataset()
    for _ in range(count):
        question = [rng.randrange(4, 60) for _ in range(rng.randint(2, 6))]
        answer = [SOP, *reversed(question), EOP]
        rows.append([*question, GMASK, *answer], [-100] * (len(question) + 1) + answer)
    return rows


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., AdapterTrainer]:
    """Make a trainer on random rows, run it unless told not to, and return it."""

    def run(model: PreTrainedModel, *, start: bool = True, **settings: Any) -> AdapterTrainer:
        own = {
            name: settings.pop(name)
            for name in ("adapter_name", "score", "callbacks")
            if name in settings
        }
        rows = settings.pop("rows", None)
        resume = settings.pop("resume", None)
        defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1}
        defaults |= {"learning_rate": 1e-2, "save_strategy": "no", "report_to": "none"}
        trainer = AdapterTrainer(
            **{"adapter_name": None, "describe": lambda directory: None, **own},
            model=model,
            args=make_arguments(defaults | settings, tmp_path / "out"),
            train_dataset=rows if rows is not None else make_rows(12),
            eval_dataset=make_rows(6, seed=1),
            data_collator=Collator(PAD),
        )
        if start:
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


Command = Callable[..., int]
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
COLOURS = ["红色", "蓝色", "白色", "黑色", "绿色", "黄色"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random ChatGLM-6B in a directory, with a tokenizer."""
    directory = tmp_path_factory.mktemp("base")
    tiny_model("chatglm").save_pretrained(directory)
    for file in (GOLDEN / "tokenizer_v1").iterdir():
        shutil.copy(file, directory)
    return directory


@pytest.fixture
def command(base: Path, tmp_path: Path) -> Command:
    """The command on six rows and three steps; more overrides come after."""
    lines = [
        json.dumps(
            {"content": f"颜色#{colour}", "summary": f"这件是{colour}的。"}, ensure_ascii=False
        )
        for colour in COLOURS
    ]
    (tmp_path / "rows.json").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "run.yaml").write_text(
        f"""
        model: {{path: {base}, dtype: float32}}
        data:
          train_file: {tmp_path / "rows.json"}
          validation_file: {tmp_path / "rows.json"}
          test_file: {tmp_path / "rows.json"}
        adapter: {{type: ptuning_v2, num_virtual_tokens: 4}}
        training:
          output_dir: {tmp_path / "out"}
          max_steps: 4
          per_device_train_batch_size: 2
          learning_rate: 1e-2
          logging_steps: 1
          save_steps: 2
          use_cpu: true
        generation: {{max_new_tokens: 4}}
        """,
        encoding="utf-8",
    )

    def run(*overrides: str) -> int:
        return cli.main(["train", "--config", str(tmp_path / "run.yaml"), *overrides])

    return run


def losses(directory: Path) -> dict[int, float]:
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def adapter_is(tmp_path: Path, content: str) -> None:
    """Train another adapter than the config's."""
    file = tmp_path / "run.yaml"
    file.write_text(file.read_text().replace("type: ptuning_v2, num_virtual_tokens: 4", content))

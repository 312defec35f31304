import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import GlmConfig, GlmForCausalLM, PreTrainedModel

from chatglm_ptuning.data.template import TEMPLATES, Template
from chatglm_ptuning.models.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.models.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.models.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.models.tokenization_chatglm2 import ChatGLM2Tokenizer
from chatglm_ptuning.serving.engine import Engine
from chatglm_ptuning.tuners import PrefixTuningConfig, add_adapter, save_adapter, set_adapter

GOLDEN = Path(__file__).parents[1] / "golden"
PREFIXES = {"p1": 1, "p5": 5, "p8": 8, "p13": 13}  # name -> virtual tokens


@dataclass
class Base:
    """A tiny random model that has all adapters, with its tokenizer and template."""

    model: PreTrainedModel
    tokenizer: Any
    template: Template

    def engine(self, **kwargs: Any) -> Engine:
        """An engine on a copy of the model."""
        set_adapter(self.model, None)
        return Engine(copy.deepcopy(self.model), self.tokenizer, self.template, **kwargs)


def add_adapters(model: PreTrainedModel) -> None:
    for name, length in PREFIXES.items():
        add_adapter(model, PrefixTuningConfig(num_virtual_tokens=length), name)
    add_adapter(model, LoraConfig(r=4, lora_alpha=16, init_lora_weights=False), "lora")
    model.eval().requires_grad_(False)


def chatglm() -> Base:
    torch.manual_seed(0)
    tokenizer = ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer_v1")
    ids = tokenizer.convert_tokens_to_ids
    config = ChatGLMConfig(
        vocab_size=len(tokenizer.tokens),
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        inner_hidden_size=64,
        max_sequence_length=256,
        bos_token_id=ids("<sop>"),
        eos_token_id=ids("<eop>"),
        mask_token_id=ids("[MASK]"),
        gmask_token_id=ids("[gMASK]"),
        pad_token_id=ids("<pad>"),
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    model = ChatGLMForConditionalGeneration(config)
    add_adapters(model)
    return Base(model, tokenizer, TEMPLATES["chatglm"])


def glm() -> Base:
    torch.manual_seed(0)
    tokenizer = ChatGLM2Tokenizer.from_pretrained(GOLDEN / "tokenizer_v3")
    config = GlmConfig(
        vocab_size=len(tokenizer.tokens),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=2,
        initializer_range=0.3,
        attention_bias=True,
    )
    model = GlmForCausalLM(config)
    add_adapters(model)
    return Base(model, tokenizer, TEMPLATES["chatglm3"])


@pytest.fixture(scope="session")
def bases() -> dict[str, Base]:
    return {"chatglm": chatglm(), "glm": glm()}


@pytest.fixture(scope="session", params=["chatglm", "glm"])
def base(request: pytest.FixtureRequest, bases: dict[str, Base]) -> Base:
    return bases[request.param]


@pytest.fixture
def engine(base: Base) -> Iterator[Engine]:
    engine = base.engine()
    yield engine
    engine.close(drain=False)


@pytest.fixture(scope="session")
def saved(bases: dict[str, Base], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of ChatGLM3's p5 and lora."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("p5", "lora"):
        save_adapter(bases["glm"].model, folder / name, name)
    return {name: folder / name for name in ("p5", "lora")}

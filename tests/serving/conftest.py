import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chatglm_ptuning.data.template import TEMPLATES, Template
from chatglm_ptuning.models.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.models.tokenization_chatglm2 import ChatGLM2Tokenizer
from chatglm_ptuning.serving.engine import Engine
from chatglm_ptuning.tuners import PrefixTuningConfig, add_adapter, save_adapter, set_adapter
from tests.checkpoints import tiny_model

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


def base_of(family: str, tokenizer: PreTrainedTokenizerBase) -> Base:
    model = tiny_model(family)
    for name, length in PREFIXES.items():
        add_adapter(model, PrefixTuningConfig(num_virtual_tokens=length), name)
    add_adapter(model, LoraConfig(r=4, lora_alpha=16, init_lora_weights=False), "lora")
    model.eval().requires_grad_(False)
    return Base(model, tokenizer, TEMPLATES[family])


@pytest.fixture(scope="session")
def bases() -> dict[str, Base]:
    v1 = ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer_v1")
    v3 = ChatGLM2Tokenizer.from_pretrained(GOLDEN / "tokenizer_v3")
    return {"chatglm": base_of("chatglm", v1), "glm": base_of("chatglm3", v3)}


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

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from chatglm_ptuning.data.conversation import Message
from chatglm_ptuning.data.dataset import Prompt
from chatglm_ptuning.data.template import TEMPLATES, Template
from chatglm_ptuning.models.tokenization_chatglm import ChatGLMTokenizer
from tests.checkpoints import tiny_model

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = ["你好", "晚上睡不着应该怎么办", "Hello world, this is a test.", "它创建于哪一年？", "裙"]


@pytest.fixture(scope="session")
def tokenizer() -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer_v1")


@pytest.fixture(scope="session")
def template() -> Template:
    return TEMPLATES["chatglm"]


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    return tiny_model("chatglm")


@pytest.fixture(scope="session")
def prompts(tokenizer: Any, template: Template) -> list[Prompt]:
    return [
        Prompt(
            template.encode_prompt(tokenizer, [Message("user", text)]), f"答{text}", f"d:{i}", text
        )
        for i, text in enumerate(TEXTS)
    ]

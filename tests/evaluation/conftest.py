from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm_ptuning.data.conversation import Message
from chatglm_ptuning.data.dataset import Prompt
from chatglm_ptuning.data.template import TEMPLATES, Template
from chatglm_ptuning.models.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.models.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.models.tokenization_chatglm import ChatGLMTokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = ["你好", "晚上睡不着应该怎么办", "Hello world, this is a test.", "它创建于哪一年？", "裙"]


@pytest.fixture(scope="session")
def tokenizer() -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer_v1")


@pytest.fixture(scope="session")
def template() -> Template:
    return TEMPLATES["chatglm"]


@pytest.fixture(scope="session")
def model(tokenizer: Any) -> ChatGLMForConditionalGeneration:
    torch.manual_seed(0)
    ids = tokenizer.convert_tokens_to_ids
    config = ChatGLMConfig(
        vocab_size=len(tokenizer.tokens),
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        inner_hidden_size=64,
        max_sequence_length=128,
        bos_token_id=ids("<sop>"),
        eos_token_id=ids("<eop>"),
        mask_token_id=ids("[MASK]"),
        gmask_token_id=ids("[gMASK]"),
        pad_token_id=ids("<pad>"),
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return ChatGLMForConditionalGeneration(config).eval()


@pytest.fixture(scope="session")
def prompts(tokenizer: Any, template: Template) -> list[Prompt]:
    return [
        Prompt(
            template.encode_prompt(tokenizer, [Message("user", text)]), f"答{text}", f"d:{i}", text
        )
        for i, text in enumerate(TEXTS)
    ]

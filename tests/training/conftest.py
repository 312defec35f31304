import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GlmConfig, GlmForCausalLM, PreTrainedModel

from chatglm_ptuning.data.collator import Collator
from chatglm_ptuning.data.dataset import TokenDataset
from chatglm_ptuning.models.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.models.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.training.arguments import make_arguments
from chatglm_ptuning.training.trainer import AdapterTrainer

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

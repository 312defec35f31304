"""Packed rows train as the same examples do in rows of their own."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from chatglm_ptuning.data.collator import Collator
from chatglm_ptuning.data.packing import PackedDataset
from chatglm_ptuning.training.packed_rows import examples_apart, restarting_positions
from chatglm_ptuning.training.trainer import AdapterTrainer
from chatglm_ptuning.tuners import (
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    add_adapter,
)
from tests.training.conftest import MODELS, PAD, VOCAB, make_rows

Train = Callable[..., AdapterTrainer]

ROWS = make_rows(9)
PACKED = PackedDataset(ROWS, 40)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def qwen() -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE))


FAMILIES = {**MODELS, "llama": llama, "qwen": qwen}
TUNERS: dict[str, Callable[[], Any]] = {
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=5, prefix_dropout=0.0),
    "projected prefix": lambda: PrefixTuningConfig(
        num_virtual_tokens=5, prefix_projection=True, prefix_dropout=0.0
    ),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=5),
    "prompt encoder": lambda: PromptEncoderConfig(
        num_virtual_tokens=5, encoder_reparameterization_type="LSTM", encoder_hidden_size=8
    ),
    "lora": lambda: peft.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.0
    ),
}


def model_with(family: str, tuner: str, implementation: str = "sdpa") -> PreTrainedModel:
    model = FAMILIES[family]()
    model.set_attn_implementation(implementation)
    if tuner != "full":
        add_adapter(model, TUNERS[tuner](), "default")
    return model.train()


def batch_of(rows: Any) -> dict[str, Tensor]:
    return Collator(PAD)([rows[index] for index in range(len(rows))])


def loss_and_gradients(
    trainer: AdapterTrainer, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    return loss.detach(), {name: p.grad.clone() for name, p in trained.items()}


def test_the_rows_are_packed_and_one_is_padded() -> None:
    mask = batch_of(PACKED)["attention_mask"]
    assert len(PACKED) < len(ROWS) / 2
    assert mask.max() >= 3
    assert (mask == 0).any()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("tuner", [*TUNERS, "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_unpacked(
    family: str, tuner: str, implementation: str, train: Train
) -> None:
    trainer = train(model_with(family, tuner, implementation), start=False)
    loss, gradients = loss_and_gradients(trainer, batch_of(PACKED))
    expected_loss, expected = loss_and_gradients(trainer, batch_of(ROWS))
    assert_close(loss, expected_loss, atol=1e-5, rtol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)
        assert gradient.any() or "bias" in name


@pytest.mark.parametrize("tuner", ["prefix", "prompt"])
@pytest.mark.parametrize("family", MODELS)
def test_checkpointed_activations_change_nothing(family: str, tuner: str, train: Train) -> None:
    trainer = train(model_with(family, tuner), start=False)
    _, expected = loss_and_gradients(trainer, batch_of(ROWS))
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    _, gradients = loss_and_gradients(trainer, batch_of(PACKED))
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tuner", ["prefix", "prompt", "lora", "full"])
@pytest.mark.parametrize("family", MODELS)
def test_a_packed_run_ends_where_the_unpacked_does(family: str, tuner: str, train: Train) -> None:
    def run(rows: Any) -> AdapterTrainer:
        model = model_with(family, tuner)
        name = None if tuner == "full" else "default"
        settings = {"per_device_train_batch_size": len(rows), "max_steps": 3, "optim": "sgd"}
        return train(model, rows=rows, adapter_name=name, learning_rate=0.1, **settings)

    packed, plain = run(PACKED), run(ROWS)
    losses = [[r["loss"] for r in t.state.log_history if "loss" in r] for t in (packed, plain)]
    assert_close(*losses, atol=1e-5, rtol=0)
    assert losses[0][0] != losses[0][-1]
    for one, other in zip(packed.model.parameters(), plain.model.parameters(), strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert packed.state.num_input_tokens_seen == plain.state.num_input_tokens_seen


def test_positions_start_anew_in_each_example() -> None:
    examples = torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    expected = [[0, 1, 2, 0, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert restarting_positions(examples).tolist() == expected


def test_rows_of_one_example_keep_their_mask() -> None:
    inputs = batch_of(ROWS)
    with examples_apart(MODELS["glm"](), inputs) as given:
        assert given is inputs

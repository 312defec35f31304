"""Bases in 4 and 8 bits: trained on, saved from, generated with; the released quantised files."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig
from torch import Tensor
from torch.testing import assert_close
from transformers import GlmConfig, GlmForCausalLM, PreTrainedModel

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.models.glm_checkpoint import save_released
from chatglm_ptuning.models.loading import load_base_model
from chatglm_ptuning.models.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.models.quantization import dequantize
from chatglm_ptuning.training.trainer import AdapterTrainer
from chatglm_ptuning.tuners import (
    PrefixTuningConfig,
    add_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from tests.training.conftest import EOP, GMASK, MASK, PAD, SOP, VOCAB, train  # noqa: F401 - a fixture

SPECIAL = {"bos_token_id": SOP, "eos_token_id": EOP, "pad_token_id": PAD}
IDS = torch.randint(4, 60, (3, 7), generator=torch.Generator().manual_seed(0))
# Relative error of the logits: measured 0.08 / 0.37 at 4 bits and 0.008 / 0.035 at 8 on these random weights
ERRORS = {("chatglm", 4): 0.15, ("chatglm", 8): 0.02, ("glm", 4): 0.6, ("glm", 8): 0.07}
QUANTISED = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt}


def make(family: str) -> PreTrainedModel:
    """A model whose layers are as wide as a block of NF4."""
    torch.manual_seed(0)
    if family == "chatglm":
        config = ChatGLMConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            num_layers=2,
            num_attention_heads=4,
            max_sequence_length=64,
            mask_token_id=MASK,
            gmask_token_id=GMASK,
            initializer_range=0.2,
            tie_word_embeddings=False,
            **SPECIAL,
        )
        return ChatGLMForConditionalGeneration(config).eval()
    config = GlmConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attention_bias=True,
        initializer_range=0.2,
        **SPECIAL,
    )
    model = GlmForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias, std=0.3)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directories = {}
    for family in ("chatglm", "glm"):
        directories[family] = tmp_path_factory.mktemp(family) / "base"
        save_released(make(family), directories[family])
    return directories


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "bits"), ERRORS)
def test_linear_layers_are_quantised_and_nothing_else(
    family: str, bits: int, dtype: str, released: dict[str, Path]
) -> None:
    whole = make(family)
    model = load_base_model(released[family], dtype, "cpu", bits)
    for name, module in whole.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            assert type(model.get_submodule(name)) is QUANTISED[bits]
            assert not model.get_submodule(name).weight.is_floating_point()
    assert type(model.lm_head) is torch.nn.Linear
    wanted = getattr(torch, dtype)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {wanted}
    expected = logits(whole)
    error = (logits(model) - expected).norm() / expected.norm()
    assert 0.001 < error < ERRORS[family, bits]


@pytest.mark.parametrize("bits", [4, 8])
def test_native_directory_gives_the_same(
    bits: int, released: dict[str, Path], tmp_path: Path
) -> None:
    make("glm").save_pretrained(tmp_path)
    native = load_base_model(tmp_path, "float32", "cpu", bits)
    assert torch.equal(
        logits(native), logits(load_base_model(released["glm"], "float32", "cpu", bits))
    )
    assert not getattr(native, "is_quantized", False)


@pytest.mark.parametrize(
    ("family", "bits", "method"),
    [(family, bits, method) for family, bits in ERRORS for method in ("prefix", "lora")]
    + [("chatglm", 8, "adalora"), ("glm", 4, "adalora"), ("chatglm", 8, "ia3"), ("glm", 4, "ia3")],
)
def test_adapters_train_on_it(
    family: str,
    bits: int,
    method: str,
    released: dict[str, Path],
    train: Callable[..., AdapterTrainer],  # noqa: F811
    tmp_path: Path,
) -> None:
    model = load_base_model(released[family], "float32", "cpu", bits)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    configs: dict[str, Any] = {
        "prefix": PrefixTuningConfig(num_virtual_tokens=4),
        "lora": LoraConfig(r=4),
        "adalora": AdaLoraConfig(init_r=4, total_step=100, lora_alpha=64),
        "ia3": IA3Config(),
    }
    add_adapter(model, configs[method], "own")
    run = train(
        model,
        adapter_name="own",
        max_steps=20,
        learning_rate={"prefix": 0.1, "ia3": 0.3}.get(method, 3e-2),
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=8,  # training goes on after evaluation
    )
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    for name, parameter in model.named_parameters():
        own = base.get(name.replace(".base_layer", ""))
        assert own is None or torch.equal(parameter, own)
    save_adapter(model, tmp_path / "own", "own")
    fresh = load_base_model(released[family], "float32", "cpu", bits)
    load_adapter(fresh, tmp_path / "own")
    assert_close(logits(fresh), logits(model.eval()), atol=1e-5, rtol=0)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    answers = [m.generate(IDS, **options) for m in (model, fresh)]
    assert answers[0].shape == (3, 11)
    assert torch.equal(*answers)


def test_an_adapter_is_merged_into_the_whole_base(
    released: dict[str, Path], tmp_path: Path
) -> None:
    model = load_base_model(released["glm"], "float32", "cpu", 4)
    add_adapter(model, LoraConfig(r=2), "own")
    save_adapter(model, tmp_path, "own")
    with pytest.raises(UserError, match="merged into whole weights, got 'own' on a quantised base"):
        merge_adapter(model, "own")
    whole = load_base_model(released["glm"], "float16", "cpu")
    load_adapter(whole, tmp_path, "own")
    merge_adapter(whole, "own")
    assert {p.dtype for p in whole.parameters()} == {torch.float16}


def test_other_numbers_of_bits_are_refused(released: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"quantization_bit must be 4, 8 or null, got .*=3"):
        load_base_model(released["glm"], quantization_bit=3)


# ---- the released quantised files
def quantise(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """As the release did: rows over max / (2^(bits - 1) - 1), rounded; in int4 the even column is the upper half."""
    scale = (weight.abs().amax(dim=1) / (2 ** (bits - 1) - 1)).half()
    numbers = (
        (weight / scale.float()[:, None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    )
    numbers = numbers.to(torch.int8)
    if bits == 4:
        unsigned = numbers.view(torch.uint8) & 15
        numbers = ((unsigned[:, ::2] << 4) | unsigned[:, 1::2]).view(torch.int8)
    return numbers, scale


def test_int4_halves_and_signs() -> None:
    packed = torch.tensor([[0x7F, -0x78]], dtype=torch.int8)  # 0x7F: 7 and -1; 0x88: -8 and -8
    assert dequantize(packed, torch.tensor([0.5]), 4).tolist() == [[3.5, -0.5, -4.0, -4.0]]
    assert dequantize(packed, torch.tensor([0.5]), 2).tolist() == [[63.5, -60.0]]


def write_quantised(source: Path, target: Path, bits: int) -> dict[str, Tensor]:
    """A directory as the quantised releases are; returns the weights it stands for."""
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    config = json.loads((source / "config.json").read_text()) | {"quantization_bit": bits}
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    packed, meant = {}, {}
    for name, value in state.items():
        is_linear = any(part in name for part in ("query_key_value", "dense"))
        if not (is_linear and name.endswith(".weight")):
            packed[name] = meant[name] = value.half()
            continue
        packed[name], packed[f"{name}_scale"] = quantise(value.float(), bits)
        numbers = (value.float() / packed[f"{name}_scale"].float()[:, None]).round()
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        meant[name] = numbers.clamp(low, high) * packed[f"{name}_scale"].float()[:, None]
    torch.save(packed, target / "pytorch_model.bin")
    return meant


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["chatglm", "glm"])
def test_released_quantised_checkpoints_are_turned_into_whole_ones(
    family: str,
    bits: int,
    released: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    meant = write_quantised(released[family], tmp_path / "quantised", bits)
    model = load_base_model(tmp_path / "quantised", "float32", "cpu")
    lines = [r.message for r in caplog.records if "is quantised" in r.message]
    assert lines == [
        f"{tmp_path / 'quantised'} is quantised: 8 weights are turned back into whole ones"
    ]
    save_released(model, tmp_path / "whole")
    whole = torch.load(tmp_path / "whole" / "pytorch_model.bin", weights_only=True)
    for name, value in meant.items():
        if name.endswith("inv_freq"):
            continue  # recomputed
        assert_close(whole[name].float(), value.float(), atol=0, rtol=1e-6)
    error = (logits(model) - (expected := logits(make(family)))).norm() / expected.norm()
    assert error < {4: 1.0, 8: 0.1}[bits]


def test_missing_scale_is_named(released: dict[str, Path], tmp_path: Path) -> None:
    write_quantised(released["glm"], tmp_path / "quantised", 8)
    file = tmp_path / "quantised" / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    name = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"
    del state[f"{name}_scale"]
    torch.save(state, file)
    with pytest.raises(UserError, match=rf"misshapen: {name} is torch\.int8"):
        load_base_model(tmp_path / "quantised", "float32", "cpu")

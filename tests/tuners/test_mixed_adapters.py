"""Adapters of several kinds on one base: switched, disabled, deleted, and a different one for each row of a batch."""

import json
import logging
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from chatglm_ptuning import load_model
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models.glm_checkpoint import save_released
from chatglm_ptuning.tuners import (
    PrefixTuningConfig,
    active_adapters,
    add_adapter,
    delete_adapter,
    disable_adapters,
    list_adapters,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapter,
)
from tests.training.conftest import GMASK, MODELS, SOP

LENGTHS = {"long": 5, "short": 2}
QUESTIONS = torch.randint(4, 60, (5, 6), generator=torch.Generator().manual_seed(0))
IDS = torch.cat((QUESTIONS, torch.tensor([[GMASK, SOP]] * 5)), dim=1)
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0  # padded on the left, as batches are at generation
ROWS = ["long", "lora", None, "short", "other"]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


def crowd(family: str) -> PreTrainedModel:
    """A base with two prefixes, two LoRAs, one of which copies the head, and IA3, all shaken."""
    model = MODELS[family]().eval()
    for name, length in LENGTHS.items():
        add_adapter(model, PrefixTuningConfig(num_virtual_tokens=length), name)
    add_adapter(model, LoraConfig(r=2, target_modules="all-linear"), "lora")
    add_adapter(model, LoraConfig(r=3, modules_to_save=["lm_head"]), "other")
    add_adapter(model, IA3Config(), "ia3")
    generator = torch.Generator().manual_seed(1)
    for name, kind in list_adapters(model).items():
        for parameter in kind.parameters(model, name):
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
    return model


@pytest.mark.parametrize("family", MODELS)
def test_each_row_its_own_adapter(family: str) -> None:
    model = crowd(family)
    alone = {}
    for name in dict.fromkeys(ROWS):
        set_adapter(model, name)
        alone[name] = logits(model)
    assert len({round(float(value.sum()), 3) for value in alone.values()}) == len(alone)
    set_adapter(model, ROWS)
    together = logits(model)
    for row, name in enumerate(ROWS):
        real = MASK[row].bool()
        assert_close(together[row][real], alone[name][row][real], atol=2e-5, rtol=0)
    set_adapter(model, "lora")  # no row keeps anything of before
    assert torch.equal(logits(model), alone["lora"])


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("beams", [1, 3])
def test_rows_generate_as_alone(family: str, beams: int) -> None:
    model = crowd(family)
    options = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "eos_token_id": None}
    alone = []
    for row, name in enumerate(ROWS):
        set_adapter(model, name)
        one = slice(row, row + 1)
        alone.append(model.generate(IDS[one], attention_mask=MASK[one], **options)[0])
    set_adapter(model, ROWS)
    together = model.generate(IDS, attention_mask=MASK, **options)
    assert together.tolist() == [row.tolist() for row in alone]
    assert len({tuple(row[-5:].tolist()) for row in together}) > 1


def test_only_plain_lora_and_prefixes_mix_and_refusal_changes_nothing() -> None:
    model = crowd("glm")
    set_adapter(model, ROWS)
    before = logits(model)
    with pytest.raises(
        UserError, match=r"prefix, a soft prompt or plain LoRA, got 'ia3' of type IA3"
    ):
        set_adapter(model, ["long", "ia3", None, None, None])
    assert active_adapters(model) == ROWS
    assert torch.equal(logits(model), before)
    with pytest.raises(UserError, match=r"batch=3 and 5 names"):
        model(input_ids=IDS[:3])


@pytest.mark.parametrize("family", MODELS)
def test_disabling_and_deleting_leave_the_others_and_at_last_the_base(family: str) -> None:
    model = crowd(family)
    base = logits(MODELS[family]().eval())
    alone = {}
    for name in list_adapters(model):
        set_adapter(model, name)
        alone[name] = logits(model)
    with disable_adapters(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), alone["ia3"])
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    for name in ("lora", "long", "other", "ia3", "short"):
        delete_adapter(model, name)
        assert name not in list_adapters(model)
        for left in list_adapters(model):
            set_adapter(model, left)
            assert_close(logits(model), alone[left], atol=0, rtol=0)
        assert all(p.requires_grad == trained.get(n, False) for n, p in model.named_parameters())
    assert torch.equal(logits(model), base)
    assert model.config._attn_implementation == MODELS[family]().config._attn_implementation


def test_deleted_rows_use_the_base() -> None:
    model = crowd("glm")
    base = logits(MODELS["glm"]().eval())
    set_adapter(model, ROWS)
    delete_adapter(model, "other")
    assert active_adapters(model) == [*ROWS[:4], None]
    assert_close(logits(model)[4], base[4], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["", "a.b", "__base__", "keys", "long"])
def test_names_that_cannot_be(name: str) -> None:
    model = crowd("glm")
    with pytest.raises(UserError, match="an adapter's name must be"):
        add_adapter(model, LoraConfig(), name)
    assert len(list_adapters(model)) == 5


@pytest.mark.parametrize("name", ["lora", "layers", "weight", "0"])
def test_a_name_of_the_models_own_is_no_trouble(name: str, tmp_path: Path) -> None:
    model = MODELS["glm"]().eval()
    add_adapter(model, LoraConfig(r=2), name)
    add_adapter(model, LoraConfig(r=2), "other")
    for parameter in list_adapters(model)[name].parameters(model, name):
        parameter.data += 0.1
    set_adapter(model, name)
    save_adapter(model, tmp_path, name)
    fresh = MODELS["glm"]().eval()
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))


def test_a_prefix_cannot_be_merged() -> None:
    model = crowd("glm")
    with pytest.raises(
        UserError, match="a merged adapter must be LoRA or one of its relatives, got 'long'"
    ):
        merge_adapter(model, "long")


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", ["long", "lora"])
def test_an_adapter_directory_opens_with_its_base(family: str, name: str, tmp_path: Path) -> None:
    save_released(MODELS[family](), tmp_path / "base")
    model = load_model(tmp_path / "base", dtype="float32", device="cpu")
    config = PrefixTuningConfig(num_virtual_tokens=3) if name == "long" else LoraConfig(r=2)
    add_adapter(model, config, name)
    for parameter in list_adapters(model)[name].parameters(model, name):
        parameter.data += 0.2
    save_adapter(model, tmp_path / "adapter", name)
    opened = load_model(tmp_path / "adapter", dtype="float32", device="cpu")
    assert list(list_adapters(opened)) == ["default"]
    assert_close(logits(opened), logits(model), atol=0, rtol=0)
    assert not any(p.requires_grad for p in opened.parameters())


def test_the_first_adapter_freezes_the_base_when_loaded_for_training(tmp_path: Path) -> None:
    model = crowd("glm")
    save_adapter(model, tmp_path, "long")
    fresh = MODELS["glm"]()
    load_adapter(fresh, tmp_path, is_trainable=True)
    trained = [name for name, p in fresh.named_parameters() if p.requires_grad]
    assert trained == ["model.prefix_tuning.encoders.default.embedding.weight"]


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("long", "num_virtual_tokens", 6),
        ("long", "prefix_dropout", None),
        ("lora", "r", 5),
    ],
)
def test_a_load_that_fails_is_one_sentence_and_changes_nothing(
    name: str, field: str, value: object, tmp_path: Path
) -> None:
    save_adapter(crowd("glm"), tmp_path, name)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    model = MODELS["glm"]().eval()
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(UserError) as caught:
        load_adapter(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert list_adapters(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [name for name, _ in model.named_modules()] == modules
    assert model.config._attn_implementation == "sdpa"


# ---- is it the base that the adapter was trained on?
def saved_lora(tmp_path: Path) -> Path:
    model = crowd("glm")
    save_adapter(model, tmp_path, "lora")
    return tmp_path


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "chatglm"),
        ("num_hidden_layers", 3),
        ("num_attention_heads", 8),
        ("hidden_size", 64),
        ("vocab_size", 65),
    ],
)
def test_another_base_is_refused_with_both_values(
    field: str, value: object, tmp_path: Path
) -> None:
    directory = saved_lora(tmp_path)
    file = directory / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    content = json.loads(metadata["base_fingerprint"])
    here = content[field]
    metadata["base_fingerprint"] = json.dumps(content | {field: value})
    save_file(load_file(file), file, metadata)
    model = MODELS["glm"]().eval()
    with pytest.raises(UserError) as caught:
        load_adapter(model, directory)
    assert f"got {field}={value!r} in {directory} and {field}={here!r} in the base" in str(
        caught.value
    )
    assert list_adapters(model) == {}


def test_other_weights_of_the_same_shape_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = saved_lora(tmp_path)
    load_adapter(MODELS["glm"]().to(torch.bfloat16), directory)  # rounding is no other model
    assert "was trained on other weights" not in caplog.text
    other = MODELS["glm"]()
    other.model.embed_tokens.weight.data *= 1.1
    load_adapter(other, directory)
    assert "was trained on other weights than those of" in caplog.text
    assert [r.levelno for r in caplog.records if "other weights" in r.message] == [logging.WARNING]


def test_effect_is_said_and_none_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    load_adapter(MODELS["glm"]().eval(), saved_lora(tmp_path / "some"))
    assert "adapter 'default' moves the logits of a fixed prompt by up to" in caplog.text
    fresh = MODELS["glm"]().eval()
    add_adapter(fresh, LoraConfig(r=2), "fresh")
    save_adapter(fresh, tmp_path / "none", "fresh")
    caplog.clear()
    load_adapter(MODELS["glm"]().eval(), tmp_path / "none")
    assert [r.levelno for r in caplog.records if "has no effect" in r.message] == [logging.WARNING]

"""Prefixes of peft and ours: the same logits in both, both ways."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft import PrefixTuningConfig as PeftPrefixConfig
from torch.testing import assert_close

from chatglm_ptuning import load_model
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.export import export
from chatglm_ptuning.models.glm_checkpoint import save_released
from chatglm_ptuning.tuners import (
    LoraConfig,
    PrefixTuningConfig,
    add_adapter,
    export_peft_prefix,
    list_adapters,
    load_adapter,
    save_adapter,
)
from tests.training.conftest import MODELS

IDS = torch.randint(4, 60, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("projection", [False, True])
@torch.no_grad()
def test_peft_runs_an_exported_prefix(projection: bool, tmp_path: Path) -> None:
    model = MODELS["glm"]().eval()
    config = PrefixTuningConfig(num_virtual_tokens=6, prefix_projection=projection)
    add_adapter(model, config, "own")
    expected = model(input_ids=IDS).logits
    export_peft_prefix(model, "own", tmp_path)
    theirs = PeftModel.from_pretrained(MODELS["glm"]().eval(), tmp_path)
    assert_close(theirs(input_ids=IDS).logits, expected, atol=1e-5, rtol=0)
    assert (expected - MODELS["glm"]().eval()(input_ids=IDS).logits).abs().max() > 0.1


@pytest.mark.parametrize("projection", [False, True])
@torch.no_grad()
def test_a_prefix_of_peft_is_read(projection: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = PeftPrefixConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=6,
        prefix_projection=projection,
        encoder_hidden_size=16,
    )
    theirs = get_peft_model(MODELS["glm"](), config).eval()
    for parameter in theirs.prompt_encoder.parameters():
        parameter.data += torch.randn_like(parameter)
    expected = theirs(input_ids=IDS).logits
    theirs.save_pretrained(tmp_path)
    model = MODELS["glm"]().eval()
    load_adapter(model, tmp_path, "own")
    assert_close(model(input_ids=IDS).logits, expected, atol=1e-5, rtol=0)
    with_padding = torch.cat((torch.full((3, 4), 3), IDS), dim=1)
    mask = torch.cat((torch.zeros(3, 4, dtype=torch.long), torch.ones_like(IDS)), dim=1)
    padded = model(input_ids=with_padding, attention_mask=mask).logits
    assert_close(padded[:, 4:], expected, atol=1e-5, rtol=0)


def test_a_prefix_of_another_length_of_layers_is_refused(tmp_path: Path) -> None:
    config = PeftPrefixConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=6,
        num_layers=3,
        token_dim=16,
        num_attention_heads=2,
    )
    get_peft_model(MODELS["glm"](), config).save_pretrained(tmp_path)
    model = MODELS["glm"]()
    with pytest.raises(UserError, match=r"of shape \(6, 64\) for this base, got \(6, 96\)"):
        load_adapter(model, tmp_path)
    assert list_adapters(model) == {}


def test_the_command_writes_it(tmp_path: Path) -> None:
    save_released(MODELS["glm"](), tmp_path / "base")
    model = load_model(tmp_path / "base", "float32", "cpu")
    add_adapter(model, PrefixTuningConfig(num_virtual_tokens=3), "own")
    save_adapter(model, tmp_path / "own", "own")
    said = export(tmp_path / "own", tmp_path / "out", "peft")
    assert "written to" in said
    assert "rotated by +3 positions" in said
    theirs = PeftModel.from_pretrained(MODELS["glm"]().eval(), tmp_path / "out")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert_close(theirs(input_ids=IDS).logits, expected, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="--merge must come with --format released or native"):
        export(tmp_path / "own", tmp_path / "more", "peft", merge=True)
    add_adapter(model, LoraConfig(r=2), "lora")
    save_adapter(model, tmp_path / "lora", "lora")
    with pytest.raises(
        UserError, match="must be given a P-Tuning v2 adapter, got peft_type='LORA'"
    ):
        export(tmp_path / "lora", tmp_path / "more", "peft")


def test_what_peft_cannot_run_is_not_written(tmp_path: Path) -> None:
    model = MODELS["chatglm"]()
    add_adapter(model, PrefixTuningConfig(num_virtual_tokens=2), "own")
    with pytest.raises(UserError, match=r"rotary positions of its own, got model_type='chatglm'"):
        export_peft_prefix(model, "own", tmp_path / "out")
    with pytest.raises(UserError, match=r"one of those loaded, got 'none'"):
        export_peft_prefix(model, "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()

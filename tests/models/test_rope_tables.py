"""The rotations of the real models' head size at positions up to the longest, in float32."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding

from chatglm_ptuning.models.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.models.glm_checkpoint import glm_config
from chatglm_ptuning.models.modeling_chatglm import RotaryEmbedding

TABLES = load_file(Path(__file__).parents[1] / "golden" / "rope_tables.safetensors")


def test_chatglm_6b():
    rotary = RotaryEmbedding(ChatGLMConfig(num_layers=1))
    assert_close(rotary.inv_freq, TABLES["v1.inv_freq.float32"], rtol=0, atol=0)
    positions = TABLES["v1.positions"].expand(1, 2, -1)
    cos, sin = rotary(torch.zeros(1), positions)
    for axis in (0, 1):
        assert_close(cos[0, 0, :, axis], TABLES["v1.cos.float32"], rtol=0, atol=1e-6)
        assert_close(sin[0, 0, :, axis], TABLES["v1.sin.float32"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("generation", ["v2", "v3"])
def test_later_models(generation):
    rotary = GlmRotaryEmbedding(glm_config({}))
    cos, sin = rotary(torch.zeros(1), TABLES["v23.positions"][None])
    expected = TABLES[f"{generation}.cache.float32"]
    # An angle of 32767 in float32 is rounded by up to 2e-3.
    assert_close(cos[0, :, :32], expected[..., 0], rtol=0, atol=2e-3)
    assert_close(sin[0, :, :32], expected[..., 1], rtol=0, atol=2e-3)

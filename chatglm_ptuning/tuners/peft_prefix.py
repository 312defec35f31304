"""Prefixes of peft (PREFIX_TUNING) and ours, turned into one another exactly, for decoders with rotary positions.

peft puts the prefix into the cache, so the text starts at position P; ours does not count, the text starts at 0. A
score depends on the difference of positions alone: it is the same if ours is peft's with its keys rotated by -P, and
peft's is ours with its keys rotated by +P. Values have no position. Both lay out
[P, layer, key or value, head, channel].
"""

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.tuners import prefix

logger = logging.getLogger(__name__)

PEFT_TYPE, PEFT_TENSOR = "PREFIX_TUNING", "prompt_embeddings"


def rotate_keys(model: PreTrainedModel, key_values: Tensor, positions: int) -> Tensor:
    """Turn the keys of a prefix by a number of positions.

    Args:
        model: Its decoder gives the rotation.
        key_values: [L, 2, K, P, D], keys first.
        positions: How far; negative ones turn back.

    Raises:
        UserError: The decoder has no rotary positions on one axis.
    """
    decoder = model.get_decoder()
    attention = next(
        (m for m in decoder.modules() if hasattr(m, "layer_idx") and hasattr(m, "head_dim")), None
    )
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if rotate is None or not hasattr(decoder, "rotary_emb"):
        raise UserError(
            "a prefix for peft must be of a decoder with rotary positions of its own, got model_type="
            f"{model.config.model_type!r}, whose prefixes peft cannot run; keep it in this project's format"
        )
    keys = key_values[:, 0].float()
    ids = torch.full((len(keys), keys.shape[2]), positions, device=keys.device)
    cosine, sine = decoder.rotary_emb(keys, ids)
    turned, _ = rotate(keys, keys, cosine, sine)
    return torch.stack((turned, key_values[:, 1].float()), dim=1)


def flatten(key_values: Tensor) -> Tensor:
    """[L, 2, K, P, D] -> [P, 2 * L * K * D]."""
    return key_values.permute(3, 0, 1, 2, 4).flatten(1).contiguous()


@torch.no_grad()
def from_peft(
    model: PreTrainedModel, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Turn peft's prefix into ours.

    Args:
        model: The base.
        config: Content of peft's adapter_config.json.
        tensors: Of its adapter_model.safetensors.

    Raises:
        UserError: It is damaged or for another model.
    """
    table = tensors.get(PEFT_TENSOR)
    own = prefix.PrefixTuningConfig(
        num_virtual_tokens=config.get("num_virtual_tokens", 0), prefix_dropout=0.0
    ).fit(model.config)
    shape = (own.num_virtual_tokens, own.kv_size)
    if table is None or table.shape != shape:
        got = None if table is None else tuple(table.shape)
        raise UserError(
            f"a prefix of peft must hold {PEFT_TENSOR} of shape {shape} for this base, got {got}; load it on the model"
            " it was trained on"
        )
    device = model.get_input_embeddings().weight.device
    sizes = (own.num_layers, 2, own.num_key_value_heads, own.head_dim)
    parts = table.to(device).unflatten(1, sizes)
    key_values = rotate_keys(model, parts.permute(1, 2, 3, 0, 4), -own.num_virtual_tokens)
    logger.info(
        "a prefix of peft is turned into ours: its keys rotated by -%d", own.num_virtual_tokens
    )
    content = {"peft_type": own.peft_type, **vars(own)}
    return content, {f"{prefix.SAVED}embedding.weight": flatten(key_values)}


@torch.no_grad()
def export_peft_prefix(
    model: PreTrainedModel, name: str, directory: str | os.PathLike[str]
) -> None:
    """Write a prefix as peft's PREFIX_TUNING, with its projection carried out.

    Args:
        model: The base that has it.
        name: Of the prefix.
        directory: Where to, made if need be.

    Raises:
        UserError: There is no such prefix, or peft cannot run it on this model.
    """
    if name not in prefix.names(model):
        raise UserError(f"an exported prefix must be one of those loaded, got {name!r}")
    encoder = prefix.encoder_of(model, name)
    own = encoder.config
    key_values = rotate_keys(model, encoder(), own.num_virtual_tokens)
    content = {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.path.abspath(model.config.name_or_path),
        "inference_mode": True,
        "num_virtual_tokens": own.num_virtual_tokens,
        "num_layers": own.num_layers,
        "num_attention_heads": own.num_key_value_heads,
        "token_dim": own.num_key_value_heads * own.head_dim,  # type: ignore[operator]
        "num_transformer_submodules": 1,
        "encoder_hidden_size": own.hidden_size,
        "prefix_projection": False,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (directory / "adapter_config.json").write_text(text, encoding="utf-8")
    save_file(
        {PEFT_TENSOR: flatten(key_values).cpu()},
        directory / "adapter_model.safetensors",
        {"format": "pt"},
    )
    logger.info(
        "wrote prefix %r for peft, its keys rotated by +%d, to %s",
        name,
        own.num_virtual_tokens,
        directory,
    )

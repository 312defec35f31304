"""LoRA trained by others on the released ChatGLM2/ChatGLM3/GLM-4 modules, turned into one for native Glm.

Only names change, except for the fused `query_key_value`: its rows are those of the queries, keys and values, so
lora_B is cut row by row, and each part keeps the whole lora_A, the rank and alpha. The product of each part is exactly
its rows of the fused product. The same holds for DoRA's magnitudes and IA3's factors, which are one a row.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

FUSED = "query_key_value"
SPLIT = ("q_proj", "k_proj", "v_proj")
# Released name -> native one, applied to the names of tensors and to the patterns of a config, in this order
RENAMED = {
    r"transformer\.encoder\.layers": "model.layers",
    r"transformer\.encoder\.final_layernorm": "model.norm",
    r"transformer\.embedding\.word_embeddings": "model.embed_tokens",
    r"transformer\.output_layer": "lm_head",
    r"\bself_attention\b": "self_attn",
    r"\bdense_h_to_4h\b": "gate_up_proj",
    r"\bdense_4h_to_h\b": "down_proj",
    r"\bdense\b": "o_proj",
    r"\bword_embeddings\b": "embed_tokens",
    r"\boutput_layer\b": "lm_head",
}


def has_released_names(tensors: Mapping[str, Tensor]) -> bool:
    """Whether an adapter was trained on the modules of the released code of ChatGLM2 and later."""
    return any(".transformer.encoder.layers." in name for name in tensors)


def native_name(text: str) -> str:
    """A released module name, or a pattern of such names, in native Glm; `query_key_value` stays."""
    for released, native in RENAMED.items():
        text = re.sub(released, native, text)
    return text


def to_native_glm(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: PreTrainedConfig
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Turn config and tensors of an adapter for the released modules into those for native Glm.

    Args:
        config: Content of adapter_config.json.
        tensors: Of the adapter, by peft's names.
        base: The config of the native model.
    """
    heads, groups, head_dim = base.num_attention_heads, base.num_key_value_heads, base.head_dim
    rows = [heads * head_dim, groups * head_dim, groups * head_dim]
    native: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = native_name(name)
        if f".{FUSED}." not in name:
            native[name] = tensor
            continue
        parts = [tensor] * 3  # lora_A reads the same input in all three
        if tensor.shape[0] == sum(rows):
            if heads == groups:  # no multi-query attention: released rows are interleaved per head
                tensor = tensor.unflatten(0, (-1, 3, head_dim)).transpose(0, 1).flatten(0, 2)
            parts = list(tensor.split(rows))
        native |= {
            name.replace(FUSED, projection): part
            for projection, part in zip(SPLIT, parts, strict=True)
        }
    logger.info(
        "an adapter for the released modules is turned into one for native Glm: %d tensors, %d now",
        len(tensors),
        len(native),
    )
    fields = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save")
    fields += ("rank_pattern", "alpha_pattern")  # type: ignore[assignment]
    return {
        key: native_modules(value) if key in fields else value for key, value in config.items()
    }, native


def native_modules(value: Any) -> Any:
    """A field of a config that names modules: a pattern, a list of names, or a mapping by pattern."""
    pattern = "[qkv]_proj"
    if isinstance(value, str):
        return native_name(value).replace(FUSED, pattern)
    if isinstance(value, Mapping):
        return {native_name(key).replace(FUSED, pattern): entry for key, entry in value.items()}
    if isinstance(value, list):
        named = [native_name(name) for name in value]
        return [n.replace(FUSED, p) for n in named for p in (SPLIT if FUSED in n else ("",))]
    return value

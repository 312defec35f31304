"""ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B checkpoints as transformers' native Glm, and back, bit for bit.

The released directories say `model_type: chatglm` and hold a fused `query_key_value` per layer; `GlmForCausalLM` is the
same network with three projections. Everything else is a change of names: `dense_h_to_4h` is `gate_up_proj` row for
row (gate first), and the rotation covers the first half of each head in both.

Facts about the released files: multi-query checkpoints store the rows of all queries, then keys, then values;
multi-head ones (`multi_query_attention: false`) interleave them per head. `rope_ratio` multiplies the base of the
rotation, 10000, in ChatGLM3-6B and GLM-4-9B. ChatGLM2-6B-32k divides the positions by it instead (position
interpolation, Chen et al., arXiv 2306.15595) and is known by its ratio, 16, which no other 28-layer release has.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GlmConfig, PreTrainedConfig, PreTrainedModel

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models.configuration_chatglm import ChatGLMConfig

# The released configuration class, for the keys that an older config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "padded_vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "num_layers": 28,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "seq_length": 2048,
    "multi_query_attention": False,
    "multi_query_group_num": 1,
    "add_qkv_bias": False,
    "attention_dropout": 0.0,
    "layernorm_epsilon": 1e-5,
    "rope_ratio": 1,
    "use_cache": True,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Switches of the released network, with the one setting that native Glm computes.
SUPPORTED: dict[str, Any] = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "original_rope": True,
    "interleaved_qkv": False,
}
# Keys without influence on what the network computes. The scaling of the scores is taken back in the softmax.
INERT = (
    {"apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion"}
    | {"classifier_dropout", "pre_seq_len", "prefix_projection", "quantization_bit"}
    | {"vocab_size", "num_hidden_layers", "auto_map", "attn_implementation", "torch_dtype"}
    | {"quantization_embeddings", "gradient_checkpointing", "tie_word_embeddings"}
)
INTERPOLATED_ROPE_RATIO = 16  # ChatGLM2-6B-32k
SHARD_BYTES = 2 * 10**9


def check_released_config(released: dict[str, Any]) -> None:
    """Refuse a `config.json` that native Glm would compute differently.

    Raises:
        UserError: A switch has another setting than native Glm computes, a switch is unknown, or a size is no positive
            whole number.
    """
    wrong = [
        f"{key}={released[key]!r} (must be {value!r})"
        for key, value in SUPPORTED.items()
        if released.get(key) is not None and released[key] != value
    ]
    if wrong:
        raise UserError(
            "config.json must describe the network of ChatGLM2-6B, ChatGLM3-6B or GLM-4-9B,"
            f" got {', '.join(wrong)}; such a variant cannot be loaded"
        )
    known = INERT.union(DEFAULTS, SUPPORTED, GenerationConfig().to_dict())
    unknown = [
        f"{key}={value!r}"
        for key, value in released.items()
        if (value is True or isinstance(value, dict))
        and not (key in known or key.startswith("_") or hasattr(PreTrainedConfig(), key))
    ]
    if unknown:
        raise UserError(
            "config.json must hold the switches of ChatGLM2-6B, ChatGLM3-6B or GLM-4-9B only,"
            f" got {', '.join(unknown)}; such a variant cannot be loaded"
        )
    settings = DEFAULTS | released
    sizes = ["padded_vocab_size", "hidden_size", "ffn_hidden_size", "num_layers"]
    sizes += ["num_attention_heads", "kv_channels", "seq_length", "multi_query_group_num"]
    for key in sizes:
        if type(settings[key]) is not int or settings[key] < 1:
            raise UserError(
                f"config.json must give {key} as a positive whole number, got {key}={settings[key]!r};"
                " copy config.json again from the released checkpoint"
            )


def glm_config(released: dict[str, Any]) -> GlmConfig:
    """Translate the released `config.json` of ChatGLM2-6B, ChatGLM3-6B or GLM-4-9B.

    Args:
        released: The file's content; keys that older files leave out take the released defaults.

    Returns:
        The configuration of the same network as `GlmForCausalLM`.

    Raises:
        UserError: Native Glm cannot compute this network; the sentence names the keys.
    """
    check_released_config(released)
    settings = DEFAULTS | {key: value for key, value in released.items() if value is not None}
    heads, vocabulary = settings["num_attention_heads"], settings["padded_vocab_size"]
    groups = settings["multi_query_group_num"] if settings["multi_query_attention"] else heads
    if heads % groups:
        raise UserError(
            f"multi_query_group_num must divide num_attention_heads={heads!r}, got"
            f" multi_query_group_num={groups!r}; copy config.json again from the released checkpoint"
        )
    if not 0 <= settings["pad_token_id"] < vocabulary:
        raise UserError(
            f"pad_token_id must be below padded_vocab_size={vocabulary!r}, got"
            f" pad_token_id={settings['pad_token_id']!r}; correct it in config.json"
        )
    ratio = settings["rope_ratio"]
    if ratio == INTERPOLATED_ROPE_RATIO and settings["num_layers"] == DEFAULTS["num_layers"]:
        rope = {"rope_type": "linear", "factor": float(ratio), "rope_theta": 10000.0}
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0 * ratio}
    return GlmConfig(
        vocab_size=vocabulary,
        hidden_size=settings["hidden_size"],
        intermediate_size=settings["ffn_hidden_size"],
        num_hidden_layers=settings["num_layers"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=settings["kv_channels"],
        hidden_act="silu",
        attention_bias=settings["add_qkv_bias"],
        attention_dropout=settings["attention_dropout"],
        max_position_embeddings=settings["seq_length"],
        rms_norm_eps=settings["layernorm_epsilon"],
        rope_parameters=rope | {"partial_rotary_factor": 0.5},
        use_cache=settings["use_cache"],
        eos_token_id=settings["eos_token_id"],
        pad_token_id=settings["pad_token_id"],
        tie_word_embeddings=False,  # the released classes never tie them, whatever the key says
    )


def is_interleaved(released: dict[str, Any]) -> bool:
    """Whether `query_key_value` holds q, k, v of head 0, of head 1, ... instead of all q, all k, all v."""
    return not (DEFAULTS | released)["multi_query_attention"]


def released_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Write a configuration under the released keys: the content of `config.json`.

    Args:
        config: A `ChatGLMConfig` or a `GlmConfig`.

    Raises:
        UserError: The network is none that was released (another model type, rotation or activation).
    """
    common = {"model_type": "chatglm", "architectures": ["ChatGLMModel"]}
    if isinstance(config, ChatGLMConfig):
        return common | {key: getattr(config, key) for key in ChatGLMConfig.__annotations__}
    rope = getattr(config, "rope_parameters", None) or {}
    released_kind = (
        isinstance(config, GlmConfig)
        and config.hidden_act == "silu"
        and rope.get("partial_rotary_factor") == 0.5
        and (
            rope["rope_type"] == "default"
            or (rope["rope_type"], rope["rope_theta"]) == ("linear", 10000)
        )
    )
    if not released_kind:
        raise UserError(
            "the released layout must hold ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B or GLM-4-9B, got"
            f" model_type={config.model_type!r}; export it in the native layout instead"
        )
    ratio = rope["factor"] if rope["rope_type"] == "linear" else rope["rope_theta"] / 10000
    multi_query = config.num_key_value_heads != config.num_attention_heads
    return (
        common
        | SUPPORTED
        | {
            "padded_vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.intermediate_size,
            "num_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "kv_channels": config.head_dim,
            "seq_length": config.max_position_embeddings,
            "multi_query_attention": multi_query,
            "multi_query_group_num": config.num_key_value_heads,
            "add_qkv_bias": config.attention_bias,
            "attention_dropout": config.attention_dropout,
            "layernorm_epsilon": config.rms_norm_eps,
            "rope_ratio": int(ratio) if ratio == int(ratio) else ratio,
            "use_cache": config.use_cache,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
            "apply_query_key_layer_scaling": True,
            "attention_softmax_in_fp32": True,
            "bias_dropout_fusion": True,
            "tie_word_embeddings": False,
        }
    )


def released_names(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Name every tensor of a released checkpoint and its counterparts in the model.

    Args:
        model: ChatGLM-6B, whose names are the released ones, or native Glm; on any device.

    Returns:
        Released name -> the model's name, or the three names whose rows a fused tensor holds.
    """
    config = model.config
    if isinstance(config, ChatGLMConfig):
        return {name: (name,) for name in model.state_dict()}
    names: dict[str, tuple[str, ...]] = {
        "transformer.embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
        "transformer.encoder.final_layernorm.weight": ("model.norm.weight",),
        "transformer.output_layer.weight": ("lm_head.weight",),
    }
    same = ("input_layernorm.weight", "post_attention_layernorm.weight")
    renamed = {
        "self_attention.dense.weight": "self_attn.o_proj.weight",
        "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
        "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
    } | {name: name for name in same}
    for layer in range(config.num_hidden_layers):
        released, native = f"transformer.encoder.layers.{layer}", f"model.layers.{layer}"
        names |= {f"{released}.{old}": (f"{native}.{new}",) for old, new in renamed.items()}
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            names[f"{released}.self_attention.query_key_value.{kind}"] = tuple(
                f"{native}.self_attn.{part}_proj.{kind}" for part in "qkv"
            )
    return names


def split_qkv(fused: Tensor, rows: list[int], head_dim: int, interleaved: bool) -> list[Tensor]:
    """Cut a released `query_key_value` weight [rows, hidden_size] or bias [rows] into query, key and value.

    Args:
        fused: The released tensor.
        rows: Rows of query, key and value.
        head_dim: Channels of a head.
        interleaved: See `is_interleaved`.

    Returns:
        Views of query, key and value where nothing is interleaved, else copies.
    """
    if interleaved:
        fused = fused.unflatten(0, (-1, 3, head_dim)).transpose(0, 1).flatten(0, 2)
    return list(fused.split(rows))


def fuse_qkv(parts: list[Tensor], head_dim: int, interleaved: bool) -> Tensor:
    """Undo `split_qkv`."""
    fused = torch.cat(parts)
    if interleaved:
        fused = fused.unflatten(0, (3, -1, head_dim)).transpose(0, 1).flatten(0, 2)
    return fused


def inverse_frequencies(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Make the rotation tables that released files carry, which their own code reads and recomputes at once."""
    if isinstance(model.config, ChatGLMConfig):
        table = model.transformer.rotary_emb.frequencies().to(dtype)
        return {
            f"transformer.layers.{layer}.attention.rotary_emb.inv_freq": table
            for layer in range(model.config.num_layers)
        }
    dim = model.config.head_dim // 2
    table = 1.0 / 10000 ** (torch.arange(0, dim, 2).to(dtype) / dim)
    return {"transformer.rotary_pos_emb.inv_freq": table}


def save_released(
    model: PreTrainedModel,
    directory: str | Path,
    tokenizer_files: Iterable[str | Path] = (),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a base model as its release did: `config.json`, `pytorch_model*.bin` with an index, tokenizer files.

    Reading the directory with `load_base_model` gives the same tensors bit for bit.

    Args:
        model: ChatGLM-6B or native Glm, without adapters and not quantised.
        directory: A new directory, or one without weights.
        tokenizer_files: Files to copy beside the weights, code and `generation_config.json` included if wanted.
        shard_bytes: Largest size of one file of weights, in bytes; a larger single tensor gets its own.

    Raises:
        UserError: No such model was released, it has adapters or is quantised, or the directory holds weights.
    """
    directory = Path(directory)
    config = released_config(model.config) | {
        "torch_dtype": str(model.dtype).removeprefix("torch.")
    }
    with torch.device("meta"):
        plain = type(model)(model.config)
    state = model.state_dict()
    if changed := sorted(set(state) ^ set(plain.state_dict())):
        raise UserError(
            f"an exported model must be a plain one, got tensors such as {changed[0]!r};"
            " merge or delete its adapters, and load it without quantization_bit"
        )
    if any(directory.glob("*.safetensors")) or any(directory.glob("pytorch_model*.bin*")):
        raise UserError(
            f"the export directory must not hold weights yet, got {str(directory)!r};"
            " give a new directory"
        )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in tokenizer_files:
        shutil.copyfile(file, directory / Path(file).name)  # a read-only file would stay one
    tables = inverse_frequencies(model, model.dtype)
    names = released_names(plain) | {name: (name,) for name in tables}
    tensors = state | tables
    interleaved = is_interleaved(config)

    def fused(name: str) -> Tensor:
        parts = [tensors[native].cpu() for native in names[name]]
        return parts[0] if len(parts) == 1 else fuse_qkv(parts, config["kv_channels"], interleaved)

    shards: list[list[str]] = [[]]
    sizes = {name: sum(tensors[native].nbytes for native in names[name]) for name in names}
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    if len(shards) == 1:
        torch.save({name: fused(name) for name in names}, directory / "pytorch_model.bin")
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        torch.save({name: fused(name) for name in shard}, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8"
    )

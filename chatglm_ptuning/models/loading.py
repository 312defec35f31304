"""Open a checkpoint directory: which family it is, its weights shard by shard, its tokenizer. Nothing is downloaded.

ChatGLM-6B becomes `ChatGLMForConditionalGeneration`; ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B in the released layout are
read as native `GlmForCausalLM`; directories of any other model type go through transformers.
"""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, GlmForCausalLM, PreTrainedModel

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.models.glm_checkpoint import (
    glm_config,
    is_interleaved,
    released_names,
    split_qkv,
)
from chatglm_ptuning.models.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.models.quantization import (
    SCALE,
    check_bits,
    dequantize,
    finish_quantized,
    is_quantizable,
    native_quantization,
    quantize_linear,
)
from chatglm_ptuning.tensor_files import read_tensors

logger = logging.getLogger(__name__)

# Keys that only the configurations of ChatGLM2-6B and later have.
LATER_KEYS = {"multi_query_attention", "ffn_hidden_size", "padded_vocab_size", "kv_channels"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: The file is no JSON object in UTF-8.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also a wrong encoding
        raise UserError(
            f"{file} must be JSON, got an error: {error}; copy the file again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{file} must hold a JSON object, got {type(content).__name__}; copy it again"
        )
    return content


def checkpoint_directory(path: str | Path) -> Path:
    """Check that a path is a base model's directory.

    Raises:
        UserError: It is none; the sentence says what it is instead.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise UserError(
            f"the model's path must be a directory on this machine, got path={str(path)!r};"
            " nothing is downloaded here, so fetch the checkpoint first and give its directory"
        )
    if (directory / "config.json").is_file():
        return directory
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"the model's path must be a base model's directory, got the adapter {str(path)!r};"
            " open it with chatglm_ptuning.load_model, which loads its base model too"
        )
    raise UserError(
        f"the model's path must hold a config.json, got path={str(path)!r};"
        " give the directory of a checkpoint"
    )


def family(config: dict[str, Any], directory: Path) -> str:
    """Tell the family by the content of `config.json`; see `model_family`."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(
            f"{directory / 'config.json'} must name a model_type, got model_type={model_type!r};"
            " copy the file again from the checkpoint"
        )
    if model_type != "chatglm":
        return model_type
    return "glm" if LATER_KEYS & config.keys() else "chatglm"


def model_family(path: str | Path) -> str:
    """Tell which kind of network a checkpoint directory holds.

    Returns:
        "chatglm" for ChatGLM-6B; "glm" for ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B, released or native; any other
        directory's own `model_type`.

    Raises:
        UserError: The path is no checkpoint directory, or its `config.json` is broken.
    """
    directory = checkpoint_directory(path)
    return family(read_json(directory / "config.json"), directory)


def resolve_device(device: str | int | torch.device | None) -> torch.device:
    """Take the GPU if there is one and nothing else is asked for.

    Raises:
        UserError: There is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"device must be one that this machine has, got device={device!r}; say device='cpu'"
        ) from error
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Turn "auto" into bfloat16 where the device computes it natively, else float16 on a GPU and float32 on a CPU.

    Raises:
        UserError: The name is none of auto, float32, float16, bfloat16.
    """
    if dtype == "auto":
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        if device.type != "cpu":
            return torch.float16
        abilities = torch.cpu.get_capabilities()
        native = abilities.get("avx512_bf16") or abilities.get("amx_bf16")
        return torch.bfloat16 if native else torch.float32
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in DTYPES.values():
        raise UserError(
            f"dtype must be auto, {', '.join(DTYPES)}, got dtype={dtype!r}; correct its name"
        )
    return resolved


def shard_files(directory: Path) -> list[Path]:
    """List the files that hold the weights, safetensors before pickles, a single file before an index.

    Raises:
        UserError: There are none, or one that the index names is missing.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (directory / single).is_file():
            return [directory / single]
        index = directory / f"{single}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{index} must hold a weight_map, got none; copy the file again")
            files = [directory / name for name in sorted(set(weight_map.values()))]
            for file in files:
                if not file.is_file():
                    raise UserError(
                        f"{directory} must hold every file that {index.name} names,"
                        f" got no {file.name}; copy or download it again"
                    )
            return files
    raise UserError(
        f"{directory} must hold weights (model.safetensors or pytorch_model.bin, or their parts with an"
        " index.json), got none; copy or download them again"
    )


def load_released_weights(
    model: PreTrainedModel,
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    interleaved: bool,
    quantization_bit: int | None = None,
) -> None:
    """Fill a model on the meta device from a released checkpoint, with one tensor beside the model in memory.

    Args:
        model: ChatGLM-6B or native Glm.
        directory: The checkpoint.
        dtype: What every tensor is turned into.
        device: Where every tensor goes.
        interleaved: See `glm_checkpoint.is_interleaved`.
        quantization_bit: 8 or 4 quantises every linear layer as soon as it is read.

    Raises:
        UserError: Tensors are missing, unexpected or of the wrong shape, or a file cannot be read.
    """
    names = released_names(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = set(names)
    unexpected, wrong, prefix = [], [], []
    scales = read_scales(directory)
    for file in shard_files(directory):
        for name, tensor in read_tensors(file):
            if name.endswith((".rotary_emb.inv_freq", ".rotary_pos_emb.inv_freq")):
                continue  # recomputed by the model, as the released code does
            if name.startswith("transformer.prefix_encoder."):
                prefix.append(name)
                continue
            if name.endswith(SCALE) and name.removesuffix("_scale") in names:
                continue
            if name not in names:
                unexpected.append(name)
                continue
            missing.discard(name)
            rows = [parameters[native].shape[0] for native in names[name]]
            shape = (sum(rows), *parameters[names[name][0]].shape[1:])
            if name in scales:
                tensor = dequantize(tensor, scales[name], shape[-1])
            if tensor.shape != shape or not tensor.is_floating_point():
                wrong.append(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {shape}")
                continue
            parts = [tensor]
            if len(rows) > 1:
                parts = split_qkv(tensor, rows, model.config.head_dim, interleaved)
            for native, part in zip(names[name], parts, strict=True):
                parent, _, leaf = native.rpartition(".")
                # A copy always: a mapped tensor would change when its file is overwritten.
                weight = part.to(device, dtype, copy=True).contiguous()
                setattr(model.get_submodule(parent), leaf, nn.Parameter(weight))
                if quantization_bit and leaf == "weight" and is_quantizable(model, parent):
                    quantize_linear(model, parent, quantization_bit, dtype)
    if prefix and len(missing) == len(names):
        raise UserError(
            f"{directory} must hold a base model, got a P-Tuning prefix only; give the base model's"
            " directory and load this one as an adapter"
        )
    tied = {head: table for head, table in model.all_tied_weights_keys.items() if head in missing}
    problems = {
        "missing": sorted(missing - set(tied)),
        "unexpected": unexpected,
        "misshapen": wrong,
    }
    check_tensors(directory, problems)
    if prefix:
        logger.warning(
            "%s also holds a P-Tuning prefix, which was left out; load_adapter(model, %r) loads it",
            directory,
            str(directory),
        )
    tie_head(model)


def read_scales(directory: Path) -> dict[str, Tensor]:
    """The scales [out] of a released quantised checkpoint by the names of their weights; none elsewhere."""
    if not read_json(directory / "config.json").get("quantization_bit"):
        return {}
    scales = {
        name.removesuffix("_scale"): scale.clone()
        for file in shard_files(directory)
        for name, scale in read_tensors(file)
        if name.endswith(SCALE)
    }
    if scales:
        logger.info(
            "%s is quantised: %d weights are turned back into whole ones", directory, len(scales)
        )
    return scales


def check_tensors(directory: Path, problems: dict[str, list[str]]) -> None:
    """Refuse a checkpoint in which tensors are wrong, by what is wrong with them.

    Raises:
        UserError: Some are.
    """
    listed = "; ".join(f"{kind}: {abridged(names)}" for kind, names in problems.items() if names)
    if listed:
        raise UserError(
            f"{directory} must hold exactly the tensors that its config.json describes, got {listed};"
            " check that all files are of one checkpoint"
        )


def abridged(items: list[str], limit: int = 8) -> str:
    """Join the first few items."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def tie_head(model: PreTrainedModel) -> None:
    """Let the head share the word embeddings where the configuration says so and the checkpoint does not differ."""
    for head, table in list(model.all_tied_weights_keys.items()):
        own, shared = model.get_parameter(head), model.get_parameter(table)
        if own.is_meta or torch.equal(own, shared):
            model.get_submodule(head.rpartition(".")[0]).weight = shared
        else:
            logger.warning("%s differs from %s in this checkpoint and stays separate", head, table)
            model.config.tie_word_embeddings = False
            del model.all_tied_weights_keys[head]


def build_released(
    directory: Path, released: dict[str, Any], dtype: torch.dtype
) -> PreTrainedModel:
    """Build the model that a released `config.json` describes, without weights, on the meta device."""
    if family(released, directory) == "glm":
        config = glm_config(released)
        model_class: type[PreTrainedModel] = GlmForCausalLM
    else:
        ours = {
            key: value for key, value in released.items() if key in ChatGLMConfig.__annotations__
        }
        if "bos_token_id" in ours:  # the oldest files name <sop> only; the ids before it are fixed
            sop = ours["bos_token_id"]
            ours = {"mask_token_id": sop - 4, "gmask_token_id": sop - 3} | ours
        config = ChatGLMConfig(**ours)
        model_class = ChatGLMForConditionalGeneration
    config.dtype = dtype
    config.name_or_path = str(directory)
    with torch.device("meta"):
        return model_class(config)


def load_base_model(
    path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | int | torch.device | None = None,
    quantization_bit: int | None = None,
) -> PreTrainedModel:
    """Load a base model from its directory, ready for inference.

    Args:
        path: A checkpoint directory: ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B or GLM-4-9B in the released layout, or
            any directory that transformers reads natively. No code from it is ever run.
        dtype: Of the weights: "auto" (see `resolve_dtype`), "float32", "float16", "bfloat16" or a torch.dtype.
        device: Where the model goes; the GPU if there is one.
        quantization_bit: 8 or 4 to quantise the linear layers with bitsandbytes; None leaves them as they are.

    Returns:
        The model in evaluation mode. Peak memory is the model and one tensor for a released layout.

    Raises:
        UserError: The directory, one of its files or an argument is wrong; one sentence says which and how to fix it.
    """
    check_bits(quantization_bit)
    directory = checkpoint_directory(path)
    released = read_json(directory / "config.json")
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    if released.get("model_type") != "chatglm":
        return load_native(directory, dtype, device, quantization_bit)
    model = build_released(directory, released, dtype)
    interleaved = is_interleaved(released)
    load_released_weights(model, directory, dtype, device, interleaved, quantization_bit)
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            model.set_submodule(name, type(module)(model.config).to(device))  # computes its tables
    if (directory / "generation_config.json").is_file():
        read_json(directory / "generation_config.json")
        model.generation_config = GenerationConfig.from_pretrained(directory)
    if quantization_bit:
        finish_quantized(model, quantization_bit)
    return model.eval()


def load_native(
    directory: Path, dtype: torch.dtype, device: torch.device, quantization_bit: int | None = None
) -> PreTrainedModel:
    """Load a directory that transformers knows by itself.

    Raises:
        UserError: transformers cannot read it, or weights are missing or of the wrong shape.
    """
    if (directory / "generation_config.json").is_file():
        read_json(directory / "generation_config.json")  # transformers would pass a broken one over
    quantization: dict[str, Any] = {}
    if quantization_bit:
        quantization["quantization_config"] = native_quantization(quantization_bit, dtype)
        quantization["device_map"] = {"": device}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            **quantization,
        )
    except (
        *(ValueError, OSError, RuntimeError, SafetensorError, pickle.UnpicklingError),
        StrictDataclassError,
    ) as error:
        reason = " ".join(str(error).split()).rstrip(". ") or type(error).__name__
        raise UserError(
            f"{directory} must be a complete checkpoint that transformers can read, got an error: {reason};"
            " check its config.json and its files of weights"
        ) from error
    wrong = [f"{n} is {tuple(a)}, not {tuple(b)}" for n, a, b in sorted(report["mismatched_keys"])]
    groups = {"missing": sorted(report["missing_keys"]), "misshapen": wrong}
    check_tensors(directory, groups)
    if quantization_bit:
        # transformers' trainer refuses its own quantised models unless they are peft's.
        model.hf_quantizer.remove_quantization_config(model)
        finish_quantized(model, quantization_bit)
        return model.eval()
    return model.to(device).eval()

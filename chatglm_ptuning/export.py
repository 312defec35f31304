"""Write a model, or a prefix, as other tools read it: what the command `export` does."""

import json
import shutil
from functools import reduce
from pathlib import Path

import torch
from transformers import PreTrainedModel

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.loading import base_of, is_adapter, load_tokenizer, saved_template
from chatglm_ptuning.models.glm_checkpoint import released_config, save_released
from chatglm_ptuning.models.loading import (
    checkpoint_directory,
    load_base_model,
    read_json,
    shard_files,
)
from chatglm_ptuning.tensor_files import read_tensors
from chatglm_ptuning.tuners import PrefixTuningConfig, export_peft_prefix, load_adapter
from chatglm_ptuning.tuners.adapters import read_adapter
from chatglm_ptuning.tuners.released_prefix import write_released_prefix

WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")
# Beside the weights of a release: the tokenizer, the settings of generate, the code that other tools run.
COMPANIONS = (
    *("ice_text.model", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "generation_config.json", "*.py"),
)
# Keys of a released config.json that would be wrong of what is written: whole weights without a prefix.
STALE = {"quantization_bit", "quantization_embeddings", "pre_seq_len", "prefix_projection"}


def export(source: Path, out: Path, layout: str, merge: bool = False, flatten: bool = False) -> str:
    """Write a checkpoint in another layout, an adapter merged into its base, or a prefix in its released form.

    Weights keep the dtype that they have on disk and every bit, unless something is merged into them.

    Args:
        source: A checkpoint directory or an adapter directory.
        out: A new directory, or one without weights.
        layout: "released" (ChatGLM's own files), "native" (what `from_pretrained` reads), "prefix" (the
            `pytorch_model.bin` that released P-Tuning code loads) or "peft" (peft's PREFIX_TUNING; not ChatGLM-6B).
        merge: Add the adapter to the weights of its base.
        flatten: Write a prefix with projection as the embeddings that it amounts to.

    Returns:
        What was written, in words.

    Raises:
        UserError: The source is not of that kind, or `out` holds weights.
    """
    check_request(source, out, layout, merge, flatten)
    if layout == "prefix":
        return export_prefix(source, out, flatten)
    if layout == "peft":
        return export_for_peft(source, out)
    base = checkpoint_directory(base_of(source))
    model = load_base_model(base, stored_dtype(base), "cpu")
    if layout == "released":
        released_config(model.config)  # refuses what was never released, before anything is merged
    if merge:
        from chatglm_ptuning.tuners import merge_adapter

        load_adapter(model, source)
        merge_adapter(model, "default")
    if layout == "released":
        write_released(model, base, out)
    else:
        write_native(model, base, out)
    note_role_tokens(out, saved_template(source))
    size = sum(file.stat().st_size for pattern in WEIGHTS[:2] for file in out.glob(pattern))
    merged = f", {source} merged into it" if merge else ""
    return (
        f"{base}{merged}: written to {out} in the {layout} layout,"
        f" {str(model.dtype).removeprefix('torch.')}, {size / 1e6:,.1f} MB of weights"
    )


def check_request(source: Path, out: Path, layout: str, merge: bool, flatten: bool) -> None:
    """Refuse what cannot be done, before gigabytes are read.

    Raises:
        UserError: The options contradict one another or the source, or `out` holds weights.
    """
    if not source.is_dir():
        raise UserError(f"what is exported must be a directory, got {str(source)!r}; correct it")
    if any(path for pattern in WEIGHTS for path in out.glob(pattern)):
        raise UserError(
            f"the export directory must not hold weights yet, got {str(out)!r}; give a new directory"
        )
    if layout in ("prefix", "peft") and merge:
        raise UserError(f"--merge must come with --format released or native, got {layout}")
    if layout == "prefix":
        return
    if flatten:
        raise UserError(f"--flatten must come with --format prefix, got {layout}")
    if layout == "peft":
        return
    if is_adapter(source) and not merge:
        raise UserError(
            f"an adapter must be merged into its base to be exported as a model, got {str(source)!r}; add --merge, or"
            " write a prefix alone with --format prefix"
        )
    if merge and not is_adapter(source):
        raise UserError(
            f"--merge must be given with an adapter directory, got {str(source)!r}; leave it out for a checkpoint"
        )
    if merge:
        kind = read_json(source / "adapter_config.json").get("peft_type")
        if kind == PrefixTuningConfig.peft_type:
            raise UserError(
                f"a merged adapter must be LoRA or one of its relatives, got peft_type={kind!r}; a prefix"
                " fits no weight, so write it with --format prefix and load it beside the base"
            )


def export_prefix(source: Path, out: Path, flatten: bool) -> str:
    """Write an adapter's prefix in its released form; see `export`."""
    config, tensors, _ = read_adapter(source)
    if config.get("peft_type") != PrefixTuningConfig.peft_type:
        raise UserError(
            f"--format prefix must be given a P-Tuning v2 adapter, got peft_type={config.get('peft_type')!r} in"
            f" {str(source)!r}; use --merge --format native for LoRA"
        )
    shapes = write_released_prefix(tensors, out, flatten)
    listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    return f"{source}: written to {out / 'pytorch_model.bin'}: {listed}"


def export_for_peft(source: Path, out: Path) -> str:
    """Write an adapter's prefix for peft, its keys rotated by the base; see `export`."""
    config, _, _ = read_adapter(source)
    if config.get("peft_type") != PrefixTuningConfig.peft_type:
        raise UserError(
            f"--format peft must be given a P-Tuning v2 adapter, got peft_type={config.get('peft_type')!r} in"
            f" {str(source)!r}; peft reads every other kind as it is"
        )
    base = checkpoint_directory(base_of(source))
    model = load_base_model(base, stored_dtype(base), "cpu")
    load_adapter(model, source)
    export_peft_prefix(model, "default", out)
    length = config["num_virtual_tokens"]
    return f"{source}: written to {out} as PREFIX_TUNING, its keys rotated by +{length} positions"


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype of a checkpoint's weights on disk, whatever its config.json says; the widest where they differ."""
    dtypes = {
        tensor.dtype
        for file in shard_files(directory)
        for name, tensor in read_tensors(file)
        if tensor.is_floating_point() and "inv_freq" not in name and "prefix_encoder" not in name
    }
    if not dtypes:
        raise UserError(f"{directory} must hold weights, got none of a floating-point dtype")
    return reduce(torch.promote_types, dtypes)


def write_released(model: PreTrainedModel, base: Path, out: Path) -> None:
    """Write a model as its release did, with the files that stood beside it.

    Keys of a released config.json that change nothing here (`auto_map`, the name) stay for the tools that read them.
    """
    companions = [file for pattern in COMPANIONS for file in sorted(base.glob(pattern))]
    save_released(model, out, companions)
    original = read_json(base / "config.json")
    if original.get("model_type") == "chatglm":
        file = out / "config.json"
        kept = {key: value for key, value in original.items() if key not in STALE}
        content = kept | read_json(file)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_native(model: PreTrainedModel, base: Path, out: Path) -> None:
    """Write a model as `save_pretrained` does, with its tokenizer."""
    model.save_pretrained(out)
    load_tokenizer(base).save_pretrained(out)
    if (base / "generation_config.json").is_file():
        shutil.copy2(base / "generation_config.json", out)


def note_role_tokens(out: Path, template: str | None) -> None:
    """Say in tokenizer_config.json which of ChatGLM2 and ChatGLM3 a run was on, whose vocabulary file is one."""
    if template not in ("chatglm2", "chatglm3"):
        return
    file = out / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    settings["role_tokens"] = template == "chatglm3"
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

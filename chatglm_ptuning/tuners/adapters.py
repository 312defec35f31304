"""Adapters of every kind on one base: add, load, save, switch, disable, delete, merge.

A kind is a module with the same few functions: `prefix` (P-Tuning v2), `prompt` (soft prompts), `lora` (peft's). What
is on disk is the same for all: `adapter_config.json`, `adapter_model.safetensors`; the latter's metadata holds a
fingerprint of the base.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.tensor_files import read_tensors
from chatglm_ptuning.tuners import lora, lora_names, peft_prefix, prefix, prompt
from chatglm_ptuning.tuners.prefix import PrefixTuningConfig
from chatglm_ptuning.tuners.prompt_encoder import PromptEncoderConfig, PromptTuningConfig
from chatglm_ptuning.tuners.released_prefix import read_released_prefix

logger = logging.getLogger(__name__)

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
FINGERPRINT = "base_fingerprint"
SHAPE = ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
KINDS: dict[str, ModuleType] = {
    PrefixTuningConfig.peft_type: prefix,
    PromptTuningConfig.peft_type: prompt,
    PromptEncoderConfig.peft_type: prompt,
}  # all others: lora
ALL_KINDS = (prefix, prompt, lora)


def list_adapters(model: PreTrainedModel) -> dict[str, ModuleType]:
    """Every adapter by name, with its kind."""
    return {name: kind for kind in ALL_KINDS for name in kind.names(model)}


def active_adapters(model: PreTrainedModel) -> list[str | None]:
    """What `set_adapter` was last given: one name for all rows, one a row, or nothing."""
    return getattr(model, "active_rows", [])


def add_adapter(model: PreTrainedModel, config: Any, name: str = "default") -> None:
    """Put a fresh adapter on a model and use it; the base is frozen, the adapter trained, in float32.

    Args:
        model: Any decoder of transformers.
        config: A `PrefixTuningConfig`, `PromptTuningConfig`, `PromptEncoderConfig` or one of peft's LoRA-like configs.
        name: What it is called from now on.

    Raises:
        UserError: The name is taken, or the adapter does not fit; the model is then as before.
    """
    check_new(model, name)
    kind = KINDS.get(getattr(config.peft_type, "value", config.peft_type), lora)
    with attached(model, kind, name, config):
        set_adapter(model, name)


def check_new(model: PreTrainedModel, name: str) -> None:
    """Refuse a name that is taken or that no file and no module may have.

    Raises:
        UserError: It is one.
    """
    if name in list_adapters(model):
        raise UserError(
            f"an adapter's name must be new, got {name!r} twice; delete that one or choose another"
        )
    if not name or "." in name or name == lora.NO_ADAPTER or hasattr(nn.ModuleDict(), name):
        raise UserError(
            f"an adapter's name must be a plain word without a full stop, got {name!r}; choose another"
        )


@contextmanager
def attached(model: PreTrainedModel, kind: ModuleType, name: str, config: Any) -> Iterator[None]:
    """Attach a new adapter; the first one freezes the base. If that or what follows fails, all is as before."""
    active, is_first = active_adapters(model), not list_adapters(model)
    base = list(model.parameters())
    try:
        kind.attach(model, name, config)
        yield
    except Exception:
        if name in kind.names(model):
            kind.detach(model, name)
        use_rows(model, active)
        raise
    if is_first:
        for parameter in base:
            parameter.requires_grad_(False)


def set_adapter(model: PreTrainedModel, names: str | Sequence[str | None] | None) -> None:
    """Use one adapter for every row, or a different one (None: the base alone) for each row of a batch.

    Raises:
        UserError: There is no such adapter.
    """
    rows = [names] if isinstance(names, str | None) else list(names)
    known = list_adapters(model)
    for name in rows:
        if name is not None and name not in known:
            listed = ", ".join(known) if known else "none"
            raise UserError(f"adapter must be one of those loaded ({listed}), got {name!r}")
    active = active_adapters(model)
    try:
        use_rows(model, [] if rows == [None] else rows)
    except UserError:
        use_rows(model, active)
        raise


def use_rows(model: PreTrainedModel, rows: Sequence[str | None]) -> None:
    """Hand every kind its own names."""
    known = list_adapters(model)
    for kind in ALL_KINDS:
        kind.use(model, [name if known.get(name) is kind else None for name in rows])  # type: ignore[arg-type]
    model.active_rows = list(rows)


@contextmanager
def disable_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Within it, the model is its base."""
    active = active_adapters(model)
    use_rows(model, [])
    try:
        yield
    finally:
        use_rows(model, active)


def delete_adapter(model: PreTrainedModel, name: str) -> None:
    """Take an adapter off; rows that used it use the base.

    Raises:
        UserError: There is no such adapter.
    """
    known = list_adapters(model)
    if name not in known:
        raise UserError(
            f"adapter must be one of those loaded ({', '.join(known) or 'none'}), got {name!r}"
        )
    rows = [other if other != name else None for other in active_adapters(model)]
    use_rows(model, [])
    known[name].detach(model, name)
    use_rows(model, rows if any(rows) else [])


def save_adapter(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    name: str = "default",
    trained: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter's config and tensors (float32) into a directory, made if need be.

    Args:
        model: The model that has it.
        directory: Where to.
        name: Of the adapter.
        trained: Its values by the model's parameter names, where the parameters are sharded (ZeRO-3).

    Raises:
        UserError: There is no such adapter.
    """
    kind = list_adapters(model).get(name)
    if kind is None:
        raise UserError(f"adapter must be one of those loaded, got {name!r}")
    directory = Path(directory).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    content = kind.config_of(model, name) | {
        "base_model_name_or_path": os.path.abspath(model.config.name_or_path)
    }
    write_text(directory / CONFIG_FILE, json.dumps(content, indent=2, sort_keys=True) + "\n")
    tensors = {
        key: value.detach().to("cpu", copy=True).contiguous()
        for key, value in kind.tensors(model, name, trained).items()
    }
    metadata = {"format": "pt", FINGERPRINT: json.dumps(fingerprint(model))}
    partial = directory / f".partial-{WEIGHTS_FILE}"
    partial.write_bytes(save(tensors, metadata))  # save_file would let nobody else read it
    os.replace(partial, directory / WEIGHTS_FILE)


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = file.with_name(f".partial-{file.name}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def load_adapter(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    name: str = "default",
    is_trainable: bool = False,
) -> None:
    """Read an adapter into a model: into the one of that name, or as a new one, which is then used.

    Args:
        model: The base it was trained on.
        directory: What `save_adapter` or peft wrote, or a released P-Tuning checkpoint (`pytorch_model.bin`).
        name: What it is called here.
        is_trainable: Train a new one further.

    Raises:
        UserError: The files cannot be read, or are of an adapter for another model; the model is then as before.
    """
    config, tensors, metadata = read_adapter(Path(directory).expanduser())
    if config["peft_type"] == peft_prefix.PEFT_TYPE:
        config, tensors = peft_prefix.from_peft(model, config, tensors)
    elif model.config.model_type == "glm" and lora_names.has_released_names(tensors):
        config, tensors = lora_names.to_native_glm(config, tensors, model.config)
    kind = KINDS.get(config["peft_type"], lora)
    check_fingerprint(model, metadata, directory)
    if name in list_adapters(model):
        check_same(list_adapters(model)[name].config_of(model, name), config, directory)
        kind.load_tensors(model, name, tensors)
        return
    check_new(model, name)
    try:
        own = kind.read_config(config)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{CONFIG_FILE} must be one that can be read, got an error: {error}; copy the adapter again"
        ) from error
    with attached(model, kind, name, own):
        kind.load_tensors(model, name, tensors)
        for parameter in kind.parameters(model, name):
            parameter.requires_grad_(is_trainable)
        set_adapter(model, name)
        report_effect(model, name)


def check_same(
    here: Mapping[str, Any], read: Mapping[str, Any], directory: str | os.PathLike[str]
) -> None:
    """Compare the configs of two adapters in what the tensors' names and shapes do not tell.

    Raises:
        UserError: The tensors of one would be something else in the other.
    """
    for key in ("peft_type", "lora_alpha", "alpha_pattern", "use_rslora"):
        if key in read and read[key] != here.get(key):
            old, new = (getattr(c.get(key), "value", c.get(key)) for c in (read, here))
            raise UserError(
                f"an adapter read into another must be alike, got {key}={old!r} in {os.fspath(directory)} and"
                f" {key}={new!r} here; make them the same"
            )


def read_adapter(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Config, tensors and metadata of an adapter on disk.

    Raises:
        UserError: It is none, or damaged.
    """
    file = path / CONFIG_FILE
    if not file.is_file():
        return *read_released_prefix(path), {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also a wrong encoding
        raise UserError(
            f"{file} must be JSON, got an error: {error}; copy the adapter again"
        ) from error
    check_kind(config, file)
    weights, older = path / WEIGHTS_FILE, path / "adapter_model.bin"
    if older.is_file() and not weights.is_file():
        return config, dict(read_tensors(older)), {}
    tensors = dict(read_tensors(weights))
    with safe_open(weights, framework="pt") as opened:
        return config, tensors, opened.metadata() or {}


def check_kind(config: Any, file: Path) -> None:
    """Refuse a config that does not tell the adapter's kind.

    Raises:
        UserError: It is no object, or its `peft_type` is no word.
    """
    peft_type = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(peft_type, str):
        raise UserError(
            f"{CONFIG_FILE} must be an object with a peft_type, got peft_type={peft_type!r} in {str(file)!r}; copy the"
            " adapter again"
        )


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What tells one base from another: its shape, and a few of its weights.

    The weights are 16 word-embedding entries, which no quantisation touches; rounding to another dtype moves them
    by less than 1 %.
    """
    shape = {name: getattr(model.config, name, None) for name in SHAPE}
    table = model.get_input_embeddings()
    table = getattr(
        table, "original_module", table
    ).weight  # the base's, where an adapter has its own
    if table.numel() == 0:  # sharded by ZeRO-3
        return shape
    rows = torch.linspace(0, table.shape[0] - 1, 16, device=table.device).long()
    columns = torch.linspace(0, table.shape[1] - 1, 16, device=table.device).long()
    return shape | {"weights": table.detach()[rows, columns].float().tolist()}


def check_fingerprint(
    model: PreTrainedModel, metadata: Mapping[str, str], directory: str | os.PathLike[str]
) -> None:
    """Compare the base an adapter was trained on with the one it meets.

    Raises:
        UserError: Their shapes differ. (Other weights of the same shape are a warning.)
    """
    if FINGERPRINT not in metadata:
        return
    trained, here = json.loads(metadata[FINGERPRINT]), fingerprint(model)
    for name in SHAPE:
        if trained.get(name) != here[name]:
            raise UserError(
                f"an adapter must fit its base model, got {name}={trained.get(name)!r} in {os.fspath(directory)} and"
                f" {name}={here[name]!r} in the base; load it on the model it was trained on"
            )
    if "weights" in trained and "weights" in here:
        before, now = torch.tensor(trained["weights"]), torch.tensor(here["weights"])
        if not torch.allclose(before, now, rtol=0.01, atol=1e-4):
            logger.warning(
                "%s was trained on other weights than those of %s: of the word embeddings looked at,"
                " one was %.4g and is %.4g",
                os.fspath(directory),
                model.config.name_or_path,
                *max(
                    zip(before.tolist(), now.tolist(), strict=True), key=lambda p: abs(p[0] - p[1])
                ),
            )


@torch.no_grad()
def effect(model: PreTrainedModel, name: str) -> float:
    """How far an adapter moves the logits of a fixed prompt at most; 0 is no effect at all."""
    active, was_training = active_adapters(model), model.training
    ids = torch.arange(10, 18, device=model.get_input_embeddings().weight.device)[None]
    ids = ids % model.config.vocab_size
    model.eval()
    use_rows(model, [])
    base = model(input_ids=ids).logits.float()
    use_rows(model, [name])
    tuned = model(input_ids=ids).logits.float()
    use_rows(model, active)
    model.train(was_training)
    return float((tuned - base).abs().max())


def report_effect(model: PreTrainedModel, name: str) -> None:
    """Say how much an adapter does; "no effect" is the commonest complaint, so nothing at all is a warning."""
    moved = effect(model, name)
    if moved:
        logger.info("adapter %r moves the logits of a fixed prompt by up to %.3g", name, moved)
    else:
        logger.warning(
            "adapter %r has no effect: the logits of a fixed prompt stay as they are", name
        )

"""Open a model for use: a checkpoint directory, or an adapter directory with the base that it names."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chatglm_ptuning.config import RUN_CONFIG_FILE, RunConfig
from chatglm_ptuning.data.template import Template
from chatglm_ptuning.data.template_choice import choose_template
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models import tokenizer_loading
from chatglm_ptuning.models.loading import load_base_model, read_json
from chatglm_ptuning.tuners import load_adapter
from chatglm_ptuning.tuners.adapters import CONFIG_FILE


def load_model(
    path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | int | torch.device | None = None,
    quantization_bit: int | None = None,
) -> PreTrainedModel:
    """Load a model ready for inference.

    Args:
        path: A checkpoint directory, or an adapter directory: its base and the adapter on it, named "default".
        dtype: "auto" (bfloat16 where the device computes it natively, else float16 on a GPU and float32 on a CPU),
            "float32", "float16", "bfloat16" or a torch.dtype.
        device: Where the model goes; the GPU if there is one.
        quantization_bit: 8 or 4 quantises the base with bitsandbytes.

    Raises:
        UserError: The directory, one of its files or an argument is wrong; one sentence says which and how to fix it.
    """
    model = load_base_model(base_of(path), dtype, device, quantization_bit)
    if is_adapter(path):
        load_adapter(model, path)
    return model


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint directory, or of the base of an adapter directory.

    Raises:
        UserError: As `tokenizer_loading.load_tokenizer`.
    """
    return tokenizer_loading.load_tokenizer(base_of(path))


def is_adapter(path: str | Path) -> bool:
    """Whether a directory holds an adapter and not a whole model."""
    directory = Path(path)
    return (directory / CONFIG_FILE).is_file() and not (directory / "config.json").is_file()


def base_of(path: str | Path) -> Path:
    """The checkpoint directory of an adapter; the path itself where it is none.

    Raises:
        UserError: The adapter names a base that is not there.
    """
    if not is_adapter(path):
        return Path(path)
    named = read_json(Path(path) / CONFIG_FILE).get("base_model_name_or_path")
    if not isinstance(named, str) or not Path(named).is_dir():
        raise UserError(
            f"an adapter's base must be a directory on this machine, got base_model_name_or_path={named!r} in"
            f" {Path(path) / CONFIG_FILE}; correct it there, or load the base and then the adapter"
        )
    return Path(named)


def template_of(
    tokenizer: PreTrainedTokenizerBase, name: str | None, adapters: list[str | Path]
) -> Template:
    """The chat format that a base and its adapters speak.

    Args:
        tokenizer: Of the base.
        name: What the user says; None for what the adapters' run_config.yaml or the tokenizer tell.
        adapters: Adapter directories.

    Raises:
        UserError: They contradict one another, or nothing tells.
    """
    told = {}
    for directory in adapters:
        file = Path(directory) / RUN_CONFIG_FILE
        if file.is_file() and (template := RunConfig.load(file).model.template) is not None:
            told[str(directory)] = template
    for directory, template in told.items():
        name = name if name is not None else template
        if template != name:
            raise UserError(
                f"an adapter must be used with the chat format it was trained with, got template={name!r} where"
                f" {directory} has {template!r}; serve them apart"
            )
    return choose_template(name, tokenizer)

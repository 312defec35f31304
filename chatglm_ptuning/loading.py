"""Open a model for use: a checkpoint directory, or an adapter directory with the base that it names."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chatglm_ptuning.config import RUN_CONFIG_FILE, RunConfig
from chatglm_ptuning.data.chat_template import apply_chat_template
from chatglm_ptuning.data.template import Template
from chatglm_ptuning.data.template_choice import choose_template, fitting_templates
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


def load_tokenizer(path: str | Path, template: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint directory, or of the base of an adapter directory.

    Its `apply_chat_template` gives the ids of the template object: of the format named here, else of the one the
    directory was trained with, else of the one the tokenizer tells. Where nothing tells (ChatGLM2-6B and ChatGLM3-6B
    share a vocabulary), calling it is the error. A tokenizer of another family keeps its own.

    Args:
        path: The directory.
        template: A name in `data.template.TEMPLATES`.

    Raises:
        UserError: As `tokenizer_loading.load_tokenizer`, or the template does not fit.
    """
    tokenizer = tokenizer_loading.load_tokenizer(base_of(path))
    if template is not None or saved_template(path) is not None:
        template = template_of(tokenizer, template, [path]).name
    if template is not None or fitting_templates(tokenizer):
        tokenizer.apply_chat_template = partial(apply_chat_template, tokenizer, template)
    return tokenizer


def is_adapter(path: str | Path) -> bool:
    """Whether a directory holds an adapter and not a whole model."""
    directory = Path(path).expanduser()
    return (directory / CONFIG_FILE).is_file() and not (directory / "config.json").is_file()


def base_of(path: str | Path) -> Path:
    """The checkpoint directory of an adapter; the path itself where it is none.

    Raises:
        UserError: The adapter names a base that is not there.
    """
    path = Path(path).expanduser()
    if not is_adapter(path):
        return path
    named = read_json(path / CONFIG_FILE).get("base_model_name_or_path")
    if not isinstance(named, str) or not Path(named).is_dir():
        raise UserError(
            f"an adapter's base must be a directory on this machine, got base_model_name_or_path={named!r} in"
            f" {path / CONFIG_FILE}; correct it there, or load the base and then the adapter"
        )
    return Path(named)


def saved_template(directory: str | Path) -> str | None:
    """The chat format that a run wrote beside its adapter or model; None where it wrote none."""
    file = Path(directory).expanduser() / RUN_CONFIG_FILE
    return RunConfig.load(file).model.template if file.is_file() else None


def template_of(
    tokenizer: PreTrainedTokenizerBase, name: str | None, adapters: Sequence[str | Path]
) -> Template:
    """The chat format that a base and its adapters speak.

    Args:
        tokenizer: Of the base.
        name: What the user says; None for what the adapters' run_config.yaml or the tokenizer tell.
        adapters: Adapter directories, or models trained as a whole.

    Raises:
        UserError: They contradict one another, or nothing tells.
    """
    for directory in adapters:
        template = saved_template(directory)
        name = name if name is not None else template
        if template not in (None, name):
            raise UserError(
                f"an adapter must be used with the chat format it was trained with, got template={name!r} where"
                f" {str(directory)!r} has {template!r}; serve them apart, or leave model.template out"
            )
    return choose_template(name, tokenizer)

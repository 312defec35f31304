"""P-Tuning v2 prefixes as the released ChatGLM training wrote them: `pytorch_model.bin`, read and written.

The files hold `transformer.prefix_encoder.*` (whole checkpoints of the trainer) or the bare `embedding.*` and
`trans.*`, in half precision or float32. Length and projection are read off the shapes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.tensor_files import read_tensors
from chatglm_ptuning.tuners.prefix import SAVED, PrefixTuningConfig

RELEASED = "transformer.prefix_encoder."
PARTS = ("embedding.", "trans.")
FILES = ("pytorch_model.bin", "model.safetensors")


def read_released_prefix(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a released prefix.

    Args:
        path: A file, or a directory with `pytorch_model.bin` (or `model.safetensors`, or either in parts).

    Returns:
        The content of an adapter_config.json, and the tensors under our names in float32.

    Raises:
        UserError: There is no such file, it is damaged, or it holds no prefix.
    """
    files = [path] if path.is_file() else prefix_files(path)
    state: dict[str, Tensor] = {}
    for file in files:
        for key, value in read_tensors(file):
            name = key.removeprefix(RELEASED).removeprefix(SAVED)
            if key.startswith((RELEASED, SAVED, *PARTS)) and name.startswith(PARTS):
                state[name] = value.float()
    if "embedding.weight" not in state:
        raise UserError(
            f"an adapter must be a directory with adapter_config.json or a released P-Tuning checkpoint, got"
            f" {str(path)!r} without a prefix in it; give the directory that training wrote"
        )
    config = {
        "peft_type": PrefixTuningConfig.peft_type,
        "num_virtual_tokens": state["embedding.weight"].shape[0],
        "prefix_projection": "trans.0.weight" in state,
    }
    return config, {f"{SAVED}{name}": value for name, value in state.items()}


def prefix_files(directory: Path) -> list[Path]:
    """The files of weights in a directory.

    Raises:
        UserError: There are none.
    """
    for single in FILES:
        if (directory / single).is_file():
            return [directory / single]
        index = directory / f"{single}.index.json"
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return [directory / n for n in sorted({f for k, f in names.items() if RELEASED in k})]
    raise UserError(
        f"an adapter must be a directory with adapter_config.json or a released P-Tuning checkpoint, got"
        f" {str(directory)!r}; give the directory that training wrote"
    )


def write_released_prefix(
    tensors: Mapping[str, Tensor], directory: Path, flatten: bool
) -> dict[str, tuple[int, ...]]:
    """Write a prefix as the released training did: `pytorch_model.bin`, in float32.

    Args:
        tensors: The tensors of an adapter directory.
        directory: Where to; made if need be.
        flatten: Write a projected prefix as its output, plain embeddings [num_virtual_tokens, 2 * L * K * D], which
            code without the projection can load.

    Returns:
        The shape of every tensor written, by its released name.

    Raises:
        UserError: There is nothing to flatten.
    """
    state = {name.removeprefix(SAVED): value.float() for name, value in tensors.items()}
    if flatten:
        if "trans.0.weight" not in state:
            raise UserError(
                "--flatten must be given a prefix with projection, got one that is flat already; leave it out"
            )
        hidden = F.linear(
            state["embedding.weight"], state["trans.0.weight"], state["trans.0.bias"]
        ).tanh()
        flat = F.linear(hidden, state["trans.2.weight"], state["trans.2.bias"])
        state = {"embedding.weight": flat}
    released = {f"{RELEASED}{name}": value.contiguous() for name, value in state.items()}
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(released, directory / FILES[0])
    return {name: tuple(value.shape) for name, value in released.items()}

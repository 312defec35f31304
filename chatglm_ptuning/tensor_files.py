"""Files of named tensors, read: safetensors, and PyTorch's pickles without running what is in them."""

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chatglm_ptuning.errors import UserError

# What the readers raise where bytes are no tensors; a pickle may call for anything
DAMAGED = (
    *(SafetensorError, pickle.UnpicklingError, OSError, EOFError, RuntimeError),
    *(LookupError, TypeError, ValueError, AttributeError),
)


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Read a file tensor by tensor, mapped into memory where its format allows.

    Pickles are read with `weights_only=True`: a file that would run code is refused.

    Raises:
        UserError: The file is missing, damaged, cut off or holds something else than named tensors.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping, only keys()
                    yield name, tensors.get_tensor(name)
            return
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        content = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except DAMAGED as error:
        raise UserError(
            f"{file} must be a complete file of weights, got one that cannot be read ({reason(file, error)});"
            " copy or download it again"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(
            f"{file} must hold a flat dictionary of tensors, got {type(content).__name__};"
            " save the model's state_dict() alone"
        )
    yield from content.items()


def reason(file: Path, error: Exception) -> str:
    """Why a file cannot be read, in a few words."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    with file.open("rb") as opened:
        start = opened.read(24)
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is Git LFS's pointer to the file, which `git lfs pull` fetches"
    if file.suffix != ".safetensors" and not start.startswith((b"PK", b"\x80")):
        return "it is no file of PyTorch"
    if isinstance(error, pickle.UnpicklingError):  # its own text advises to run the code
        return "it holds other things than tensors, which are not run"
    return (str(error).splitlines() or ["it ends early"])[0].rstrip(". ")

"""Fine-tune, evaluate and serve ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B on today's transformers."""

import logging
from typing import TYPE_CHECKING, Any

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.version import __version__

if TYPE_CHECKING:
    from chatglm_ptuning.loading import load_model, load_tokenizer

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels nobody asked for

__all__ = ["UserError", "__version__", "load_model", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    """`load_model` and `load_tokenizer`, imported when they are asked for: torch takes seconds."""
    if name in ("load_model", "load_tokenizer"):
        from chatglm_ptuning import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

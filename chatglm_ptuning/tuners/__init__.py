"""What is trained: P-Tuning v2, soft prompts and, through peft, LoRA; one set of functions for all of them."""

from typing import Any

from chatglm_ptuning.tuners.adapters import (
    active_adapters,
    add_adapter,
    delete_adapter,
    disable_adapters,
    list_adapters,
    load_adapter,
    save_adapter,
    set_adapter,
)
from chatglm_ptuning.tuners.merging import combine_adapters, merge_adapter, merged_adapter
from chatglm_ptuning.tuners.peft_prefix import export_peft_prefix
from chatglm_ptuning.tuners.prefix import PrefixTuningConfig
from chatglm_ptuning.tuners.prompt_encoder import PromptEncoderConfig, PromptTuningConfig

__all__ = [
    "LoraConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "active_adapters",
    "add_adapter",
    "combine_adapters",
    "delete_adapter",
    "disable_adapters",
    "export_peft_prefix",
    "list_adapters",
    "load_adapter",
    "merge_adapter",
    "merged_adapter",
    "save_adapter",
    "set_adapter",
]


def __getattr__(name: str) -> Any:
    """Peft's `LoraConfig`, imported when it is asked for: it takes seconds."""
    if name == "LoraConfig":
        from peft import LoraConfig

        return LoraConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

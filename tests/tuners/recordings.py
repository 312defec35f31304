"""What the released code computed with a prefix, and our model and adapter with the same weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from chatglm_ptuning.models.loading import load_base_model
from chatglm_ptuning.tuners import load_adapter

GOLDEN = Path(__file__).parents[1] / "golden"
STATE = ("transformer.", "lm_head.")
PREFIX = "transformer.prefix_encoder."


class Recording:
    """One recorded model: its tensors and, built anew for every use, ours."""

    def __init__(self, case: str, directory: Path) -> None:
        self.tensors = load_file(GOLDEN / f"{case}.safetensors")
        self.config = json.loads((GOLDEN / f"{case}.json").read_text())["config"]
        # Noise of the recording in float32 is up to 5e-5; the mildest mistakes move logits by 3e-4.
        self.tolerance = {"atol": 1e-4 if case.startswith("v1") else 2e-4, "rtol": 0.0}
        self.directory = directory
        state = {key: value for key, value in self.tensors.items() if key.startswith(STATE)}
        torch.save(state, directory / "pytorch_model.bin")
        (directory / "config.json").write_text(
            json.dumps({"model_type": "chatglm"} | self.config), encoding="utf-8"
        )

    def model(self, attention: str = "sdpa", dtype: str = "float32") -> PreTrainedModel:
        """The base with the recorded prefix on it."""
        model = load_base_model(self.directory, dtype, "cpu").eval()
        model.set_attn_implementation(attention)
        load_adapter(model, self.directory, is_trainable=True)
        return model

    def batches(self, quantity: str) -> list[str]:
        """Inputs for which something was recorded: "logits", "loss"."""
        parts = [key.split(".") for key in self.tensors if key.startswith("out.")]
        return sorted(batch for _, batch, name in parts if name == quantity)

    def inputs(self, batch: str) -> dict[str, Tensor]:
        """Ids, labels and the mask `[batch, seq_len]` of an input; positions are left to the model."""
        inputs = {"input_ids": self.tensors[f"in.{batch}.input_ids"]}
        if (labels := self.tensors.get(f"in.{batch}.labels")) is not None:
            inputs["labels"] = labels
        if (mask := self.tensors.get(f"in.{batch}.attention_mask")) is not None:
            inputs["attention_mask"] = mask if mask.ndim == 2 else (~mask[:, 0, -1]).long()
        return inputs

    def gradients(self, batch: str) -> dict[str, Tensor]:
        """Recorded gradients of the prefix by the encoder's parameter names."""
        start = f"grad.{batch}.{PREFIX}"
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}

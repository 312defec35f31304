"""What AdaLoRA (Zhang et al., arXiv 2303.10512) does between the optimizer's steps: its penalty and its rank budget."""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chatglm_ptuning.tuners.lora import placed_parameters

AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # peft's names for how much every entry matters


class RankBudget:
    """Spends a shrinking budget of ranks on the layers where they matter, by peft's allocator.

    The ranks given up stay in the adapter as zeros, so that it is one of peft's without a pattern of ranks. The
    allocator's averages are kept in the optimizer's state, beside Adam's own: a checkpoint holds them.

    Args:
        model: The model with the adapter.
        name: Of the adapter.
        state: The optimizer's, by parameter.
    """

    def __init__(
        self, model: PreTrainedModel, name: str, state: MutableMapping[Tensor, dict[str, Any]]
    ) -> None:
        from peft.tuners.adalora import RankAllocator

        self.model, self.name, self.state = model, name, state
        self.config = model.peft_config[name]
        self.allocator = RankAllocator(model, self.config, name)
        for inside, parameter in self.parameters("").items():
            if AVERAGES[0] in (own := self.state.get(parameter, {})):
                for field in AVERAGES:
                    getattr(self.allocator, field)[inside] = own[field]
        # Past the end of the schedule a resumed run keeps what it finds kept.
        self.kept = {
            inside: (values != 0).flatten().tolist()
            for inside, values in self.parameters(".lora_E.").items()
        }

    def parameters(self, part: str) -> dict[str, Tensor]:
        """One factor of every layer, by its name in the model."""
        return {
            inside: p for inside, _, p in placed_parameters(self.model, self.name) if part in inside
        }

    def add_penalty(self) -> None:
        """Add the gradient of the penalty that keeps both factors orthogonal (equation 4): their mean distance."""
        rows = list(self.parameters(".lora_A.").values())
        columns = list(self.parameters(".lora_B.").values())
        factors = rows + columns
        with torch.enable_grad():
            products = [p @ p.T for p in rows] + [p.T @ p for p in columns]
            distances = [
                torch.linalg.matrix_norm(m - torch.eye(len(m), device=m.device)) for m in products
            ]
            penalty = self.config.orth_reg_weight * torch.stack(distances).mean()
        for parameter, gradient in zip(factors, torch.autograd.grad(penalty, factors), strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def step(self, step: int) -> None:
        """Weigh the ranks and give up those beyond the budget.

        Args:
            step: Optimizer steps done before the one just made, whose gradients are still there.
        """
        end = self.config.total_step - self.config.tfinal
        if step > end:
            self.allocator.mask_using_rank_pattern(self.model, self.kept)
            return
        _, kept = self.allocator.update_and_allocate(self.model, step, force_mask=step == end)
        self.kept = kept if kept is not None else self.kept
        for inside, parameter in self.parameters("").items():
            for field in AVERAGES:
                self.state[parameter][field] = getattr(self.allocator, field)[inside]

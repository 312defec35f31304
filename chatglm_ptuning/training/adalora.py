"""AdaLoRA's own work in a run."""

from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.training.arguments import RunArguments
from chatglm_ptuning.tuners.adalora import RankBudget


class AdaLoraSteps(TrainerCallback):
    """Adds AdaLoRA's penalty before each optimizer step and spends its budget of ranks after it."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.model, self.name = model, name

    def on_train_begin(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the adapter, which a resumed run has loaded by now.

        Raises:
            UserError: The run is under DeepSpeed, which keeps the gradients to itself.
        """
        if args.deepspeed:
            raise UserError(
                f"adapter.type=adalora must run without DeepSpeed, got training.deepspeed={args.deepspeed!r};"
                " leave that out or choose adapter.type=lora"
            )
        self.budget = RankBudget(self.model, self.name, kwargs["optimizer"].state)

    def on_pre_optimizer_step(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the penalty's gradient."""
        self.budget.add_penalty()

    def on_optimizer_step(
        self, args: RunArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Spend the budget, while the gradients are there."""
        self.budget.step(state.global_step)

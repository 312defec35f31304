"""LoRA and its relatives (AdaLoRA, IA3): peft's own, through the adapter API that every transformers model has.

What is added here: default target modules of the families, float32 for what is trained, and a different adapter for
every row of a batch. peft is imported where it is used: it takes seconds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chatglm_ptuning.errors import UserError

SAVED = "base_model.model."  # in front of the model's module names in peft's files
NO_ADAPTER = "__base__"  # peft's name, in a mixed batch, for a row without
# Where LoRA goes if the config does not say: the attention's projections.
TARGETS = {"chatglm": ["query_key_value"], "glm": ["q_proj", "k_proj", "v_proj"]}


def names(model: PreTrainedModel) -> list[str]:
    """Names of peft's adapters in a model."""
    return list(getattr(model, "peft_config", {}))


def attach(model: PreTrainedModel, name: str, config: Any) -> None:
    """Inject a freshly made adapter, trainable and not yet in use.

    Args:
        model: The base.
        name: Of the adapter.
        config: One of peft's config classes.

    Raises:
        UserError: peft refuses the config.
    """
    if config.target_modules is None and model.config.model_type in TARGETS:
        config.target_modules = set(TARGETS[model.config.model_type])
    config.task_type = "CAUSAL_LM"
    try:
        model.add_adapter(config, name)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"adapter must be one that peft can put into {model.config.model_type}, got an error: {error}"
        ) from error
    for parameter in parameters(model, name):
        parameter.data = parameter.data.float()


def detach(model: PreTrainedModel, name: str) -> None:
    """Take an adapter out; with the last one peft's layers stay, empty and without effect."""
    model.delete_adapter(name)


def use(model: PreTrainedModel, rows: Sequence[str | None]) -> None:
    """One name for every row, one name per row, or none at all."""
    if not names(model):
        return
    chosen = {name for name in rows if name is not None}
    for layer in tuner_layers(model):
        for handle in layer.__dict__.pop("_row_hooks", ()):
            handle.remove()
        if len(rows) > 1 and chosen:
            layer._row_hooks = [layer.register_forward_pre_hook(RowNames(rows), with_kwargs=True)]
    if not chosen:
        model.disable_adapters()
        return
    model.enable_adapters()
    is_trained = {name: any(p.requires_grad for p in parameters(model, name)) for name in chosen}
    model.set_adapter(sorted(chosen))
    for name, trained in is_trained.items():  # peft makes what it sets trainable
        for parameter in parameters(model, name):
            parameter.requires_grad_(trained)


class RowNames:
    """Tells a layer of peft which adapter each row of the batch takes; beams repeat each."""

    def __init__(self, rows: Sequence[str | None]) -> None:
        self.rows = [name if name is not None else NO_ADAPTER for name in rows]

    def __call__(
        self, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Add the names to a call of the layer.

        Raises:
            UserError: The batch is no multiple of the number of names.
        """
        batch = args[0].shape[0]
        if batch % len(self.rows):
            raise UserError(
                f"a batch must have a multiple of as many rows as there are active adapters, got batch={batch!r}"
                f" and {len(self.rows)} names; call set_adapter with one name a row"
            )
        repeats = batch // len(self.rows)
        return args, kwargs | {"adapter_names": [n for n in self.rows for _ in range(repeats)]}


def tuner_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that peft put into a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def parameters(model: PreTrainedModel, name: str) -> list[nn.Parameter]:
    """What is trained of an adapter."""
    return [p for path, p in model.named_parameters() if name in path.split(".")]


def tensors(
    model: PreTrainedModel, name: str, trained: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The tensors of an adapter under peft's names; see `prefix.tensors`."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, state_dict=trained, adapter_name=name)
    return {f"{SAVED}{key}": value for key, value in state.items()}


def load_tensors(model: PreTrainedModel, name: str, saved: Mapping[str, Tensor]) -> None:
    """Fill an adapter with tensors from peft's file.

    Raises:
        UserError: Names or shapes are not those of this adapter.
    """
    from peft import set_peft_model_state_dict

    own = tensors(model, name, None)
    wrong = sorted(own.keys() ^ saved.keys())
    wrong += [key for key in own.keys() & saved.keys() if own[key].shape != saved[key].shape]
    if wrong:
        raise UserError(
            f"the saved adapter must hold the {len(own)} tensors of its config on this model, got another"
            f" {wrong[0]!r} ({len(wrong)} differ); load it on the model it was trained on"
        )
    state = {key.removeprefix(SAVED): value for key, value in saved.items()}
    with torch.no_grad():
        set_peft_model_state_dict(model, state, adapter_name=name)


def config_of(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """What adapter_config.json says of an adapter: peft's own content."""
    content = model.peft_config[name].to_dict()
    content |= {key: sorted(value) for key, value in content.items() if isinstance(value, set)}
    return content | {"inference_mode": True}


def read_config(content: dict[str, Any]) -> Any:
    """One of peft's config objects from the content of adapter_config.json.

    Raises:
        UserError: peft knows no such kind of adapter.
    """
    from peft import PeftConfig

    try:
        return PeftConfig.from_peft_type(**content)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"adapter_config.json must be one that peft can read, got an error: {error}"
        ) from error

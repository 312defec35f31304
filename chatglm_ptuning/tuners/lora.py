"""LoRA and its relatives (DoRA, AdaLoRA, IA3): peft's own layers, put into the model and used here.

What is added: default targets of the families, float32 for what is trained, a different adapter for every row of a
batch, and an end without traces: the last adapter that leaves a layer gives the base its own layer back. Every adapter
leaves the weights of the base alone, so peft's options that change them are refused. peft is imported where it is used:
it takes seconds.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from chatglm_ptuning.errors import UserError

SAVED = "base_model.model."  # in front of the model's module names in peft's files
NO_ADAPTER = "__base__"  # peft's name, in a mixed batch, for a row without
# Where an adapter goes if the config does not say: the attention's projections; IA3 also scales what enters the last
# layer of the feed-forward part, as in its paper (Liu et al., arXiv 2205.05638).
TARGETS = {"chatglm": {"query_key_value"}, "glm": {"q_proj", "k_proj", "v_proj"}}
IA3_TARGETS = {"chatglm": {"query_key_value"}, "glm": {"k_proj", "v_proj"}}
IA3_FEEDFORWARD = {"chatglm": {"dense_4h_to_h"}, "glm": {"down_proj"}}
# Fields of peft's configs with the values that leave the weights of the base as they are
KEEPS_BASE: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "kasa_config": (None,),
}


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
        UserError: peft refuses the config, or it would change the base; the model is then as before.
    """
    from peft import inject_adapter_in_model

    config = copy.deepcopy(config)
    for field, values in KEEPS_BASE.items():
        if (value := getattr(config, field, values[0])) not in values:
            raise UserError(
                f"adapter.{field} must leave the weights of the base alone, got {value!r}; say one of"
                f" {', '.join(map(repr, values))}"
            )
    fill_targets(model, config)
    config.task_type = "CAUSAL_LM"
    config.inference_mode = True  # what is trained is said below
    try:
        with trainability_kept(model):
            inject_adapter_in_model(config, model, name)
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, re.error) as error:
        detach(model, name)
        raise UserError(
            f"adapter must be one that peft can put into {model.config.model_type}, got an error: {error}"
        ) from error
    model._hf_peft_config_loaded = True  # transformers' own mark of a model with peft's layers
    for layer in peft_layers(model):
        copied = getattr(layer, "modules_to_save", {})
        if name in copied:
            compute_in_float32(copied[name])
    for parameter in parameters(model, name):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def fill_targets(model: PreTrainedModel, config: Any) -> None:
    """Say where an adapter goes if its config does not.

    Raises:
        UserError: Nothing tells.
    """
    family = model.config.model_type
    is_ia3 = config.peft_type == "IA3"
    if getattr(config, "target_modules", None) is None:
        if family not in TARGETS:
            raise UserError(
                f'adapter.target_modules must be given for a model of type {family!r}, got None; "all-linear" names'
                " every linear layer but the head"
            )
        config.target_modules = (
            IA3_TARGETS[family] | IA3_FEEDFORWARD[family] if is_ia3 else TARGETS[family]
        )
    if is_ia3 and config.feedforward_modules is None:
        config.feedforward_modules = IA3_FEEDFORWARD.get(family, set())


def compute_in_float32(module: nn.Module) -> None:
    """Let a trained copy of a module take and give the dtype of the base around it."""
    dtype = next(module.parameters()).dtype

    def widen(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.float() if x.is_floating_point() else x for x in args)

    module.register_forward_pre_hook(widen)
    module.register_forward_hook(lambda _, args, output: output.to(dtype))


def detach(model: PreTrainedModel, name: str) -> None:
    """Take an adapter out; a layer without any becomes the base's own again."""
    with trainability_kept(model):
        for layer in peft_layers(model):
            if is_copy(layer):
                layer.delete_adapter(name, new_active_adapters=[])
            elif name in adapters_of(layer):
                layer.set_adapter([])
                layer.delete_adapter(name)
    # The inner ones of nested layers first: LoRA around IA3 around a linear layer
    for path, layer in reversed([*model.named_modules()]):
        if is_peft_layer(layer) and not adapters_of(layer):
            parent, _, leaf = path.rpartition(".")
            base = layer.original_module if is_copy(layer) else layer.base_layer
            setattr(model.get_submodule(parent), leaf, base)
    getattr(model, "peft_config", {}).pop(name, None)
    if not names(model):
        vars(model).pop("peft_config", None)
        model._hf_peft_config_loaded = False


def use(model: PreTrainedModel, rows: Sequence[str | None]) -> None:
    """One name for every row, one name per row, or none at all.

    Raises:
        UserError: Rows differ in an adapter that peft runs on whole batches only; nothing is changed then.
    """
    if not names(model):
        return
    if len(set(rows)) == 1:
        rows = rows[:1]
    chosen = sorted({name for name in rows if name is not None})
    if len(rows) > 1:
        check_mixable(model, chosen)
    with trainability_kept(model):
        for layer in peft_layers(model):
            for handle in layer.__dict__.pop("_row_hooks", ()):
                handle.remove()
            own = [name for name in chosen if name in adapters_of(layer)]
            # A copied module takes one active name at most; in a mixed batch the hook says all of them.
            layer.set_adapter([] if len(rows) > 1 and is_copy(layer) else own)
            layer.enable_adapters(bool(chosen))
            if len(rows) > 1 and own:
                hook = RowNames(rows, adapters_of(layer))
                layer._row_hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True)]


def check_mixable(model: PreTrainedModel, chosen: list[str]) -> None:
    """Refuse what peft cannot run on some rows of a batch.

    Raises:
        UserError: There is such an adapter.
    """
    for name in chosen:
        config = model.peft_config[name]
        kind = "DoRA" if getattr(config, "use_dora", False) else config.peft_type.value
        if kind != "LORA":
            raise UserError(
                f"an adapter for some rows of a batch must be a prefix, a soft prompt or plain LoRA, got {name!r} of"
                f" type {kind}; use it for whole batches"
            )


class RowNames:
    """Tells a layer of peft which adapter each row of the batch takes; beams repeat each.

    Args:
        rows: A name, or None for the base alone, for each row.
        known: The adapters that the layer has; for any other a row takes the base.
    """

    def __init__(self, rows: Sequence[str | None], known: set[str]) -> None:
        self.rows = [name if name in known else NO_ADAPTER for name in rows]

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


@contextmanager
def trainability_kept(model: nn.Module) -> Iterator[None]:
    """Within it, peft may say what is trained; afterwards it is what it was."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, is_trained in before:
            parameter.requires_grad_(is_trained)


def is_copy(layer: nn.Module) -> bool:
    """Whether peft's layer trains a copy of a whole module (`modules_to_save`)."""
    return hasattr(layer, "modules_to_save")


def is_peft_layer(module: nn.Module) -> bool:
    """Whether peft put this module in the place of one of the base's."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def peft_layers(model: PreTrainedModel) -> list[Any]:
    """The layers that peft put into a model."""
    return [module for module in model.modules() if is_peft_layer(module)]


def adapters_of(layer: Any) -> set[str]:
    """The adapters that one of peft's layers has."""
    return {name for attribute in layer.adapter_layer_names for name in getattr(layer, attribute)}


def placed_parameters(model: PreTrainedModel, name: str) -> Iterator[tuple[str, str, nn.Parameter]]:
    """What is trained of an adapter: its name in the model, its name in peft's files, the parameter."""
    for path, layer in model.named_modules():
        if not is_peft_layer(layer):
            continue
        # Where kinds are nested, the file names the base's module all the same.
        place = f"{SAVED}{path}".replace(".base_layer", "")
        for attribute in layer.adapter_layer_names:
            container = getattr(layer, attribute)
            if name not in container:
                continue
            entry, inside = container[name], f"{path}.{attribute}.{name}"
            where = place if is_copy(layer) else f"{place}.{attribute}"
            if isinstance(entry, nn.Parameter):
                yield inside, where, entry
                continue
            for leaf, parameter in entry.named_parameters():
                # peft's file has the magnitudes of DoRA without a leaf.
                end = "" if attribute == "lora_magnitude_vector" else f".{leaf}"
                yield f"{inside}.{leaf}", f"{where}{end}", parameter


def parameters(model: PreTrainedModel, name: str) -> list[nn.Parameter]:
    """What is trained of an adapter."""
    return [parameter for _, _, parameter in placed_parameters(model, name)]


def tensors(
    model: PreTrainedModel, name: str, trained: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The tensors of an adapter under peft's names; see `prefix.tensors`."""
    return {
        saved: parameter.detach() if trained is None else trained[inside]
        for inside, saved, parameter in placed_parameters(model, name)
    }


def load_tensors(model: PreTrainedModel, name: str, saved: Mapping[str, Tensor]) -> None:
    """Fill an adapter with tensors from peft's file.

    Raises:
        UserError: Names or shapes are not those of this adapter.
    """
    own = tensors(model, name, None)
    # Beside an adapter of the embeddings peft saves the embeddings themselves.
    saved = {key: value for key, value in saved.items() if ".base_layer." not in key}
    wrong = sorted(own.keys() ^ saved.keys())
    if wrong:
        raise UserError(
            f"the saved adapter must hold the {len(own)} tensors of its config on this model, got {len(saved)}"
            f" ({len(wrong)} differ, such as {wrong[0]!r}); load it on the model it was trained on"
        )
    for key, value in own.items():
        if value.shape != saved[key].shape:
            raise UserError(
                f"the saved adapter must fit its base model, got {tuple(saved[key].shape)} in the file and"
                f" {tuple(value.shape)} in the base for {key!r}; load it on the model it was trained on"
            )
    for key, value in own.items():
        value.copy_(saved[key])


def config_of(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """What adapter_config.json says of an adapter: peft's own content."""
    content = model.peft_config[name].to_dict()
    return {key: sorted(v) if isinstance(v, set) else v for key, v in content.items()}


def read_config(content: dict[str, Any]) -> Any:
    """One of peft's config objects from the content of adapter_config.json."""
    from peft import PeftConfig

    return PeftConfig.from_peft_type(**content)

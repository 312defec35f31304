"""LoRA-like adapters in the weights of the base, for good or for a while, and one LoRA made of several."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.tuners import lora
from chatglm_ptuning.tuners.adapters import (
    active_adapters,
    check_new,
    delete_adapter,
    list_adapters,
    set_adapter,
    use_rows,
)


def merge_adapter(model: PreTrainedModel, name: str = "default") -> None:
    """Add a LoRA-like adapter to the weights of the base for good, and take it off.

    Raises:
        UserError: There is no such adapter, it cannot be merged, or the base is quantised; nothing is merged then.
    """
    layers = mergeable_layers(model, name)
    untie(model, name)
    with lora.trainability_kept(model):
        merge_layers([layer for layer in layers if not lora.is_copy(layer)], name)
        for layer in layers:
            if lora.is_copy(layer):
                tuned = layer.modules_to_save[name].parameters()
                for own, new in zip(layer.original_module.parameters(), tuned, strict=True):
                    own.data = new.data.to(own.dtype)
            else:
                layer.merged_adapters.remove(name)
    delete_adapter(model, name)


@contextmanager
def merged_adapter(model: PreTrainedModel, name: str = "default") -> Iterator[None]:
    """Within it the adapter is used from within the weights, which costs no time; afterwards they are as before.

    As before up to the rounding of one addition and one subtraction in the dtype of the base.

    Raises:
        UserError: As `merge_adapter`.
    """
    layers = [layer for layer in mergeable_layers(model, name) if not lora.is_copy(layer)]
    untie(model, name)
    active = active_adapters(model)
    set_adapter(model, name)
    try:
        merge_layers(layers, name)
        yield
    finally:
        for layer in layers:
            if layer.merged:
                layer.unmerge()
        use_rows(model, active)


def mergeable_layers(model: PreTrainedModel, name: str) -> list[Any]:
    """The layers of an adapter that can be merged.

    Raises:
        UserError: There is no such adapter, it cannot be merged, or the base is quantised.
    """
    kind = list_adapters(model).get(name)
    if kind is None:
        raise UserError(f"adapter must be one of those loaded, got {name!r}")
    if kind is not lora:
        raise UserError(
            f"a merged adapter must be LoRA or one of its relatives, got {name!r}, whose vectors stand beside the text"
            " and fit no weight; keep its directory and load it with the base"
        )
    layers = [layer for layer in lora.peft_layers(model) if name in lora.adapters_of(layer)]
    for layer in layers:
        if not lora.is_copy(layer) and not layer.get_base_layer().weight.is_floating_point():
            raise UserError(
                f"an adapter must be merged into whole weights, got {name!r} on a quantised base; load the base without"
                " quantization_bit and merge there"
            )
    return layers


def merge_layers(layers: Sequence[Any], name: str) -> None:
    """Merge all layers, or none.

    Raises:
        UserError: A sum holds NaN or infinity.
    """
    try:
        for layer in layers:
            layer.merge(safe_merge=True, adapter_names=[name])
    except ValueError as error:
        for layer in layers:
            if layer.merged:
                layer.unmerge()
        raise UserError(
            f"merged weights must be finite, got others from adapter {name!r}; train it with a lower learning rate"
        ) from error


def untie(model: PreTrainedModel, name: str) -> None:
    """Give the head its own weight where it shares that of the embeddings and the adapter changes one of them."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    touched = [m for m in (head, table) if lora.is_peft_layer(m) and name in lora.adapters_of(m)]
    own_head, own_table = (
        getattr(m, "original_module", getattr(m, "base_layer", m)) for m in (head, table)
    )
    if touched and own_head.weight is own_table.weight:
        own_head.weight = nn.Parameter(own_table.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys.clear()


def combine_adapters(
    model: PreTrainedModel,
    names: Sequence[str],
    weights: Sequence[float],
    new_name: str,
    method: Literal["linear", "cat", "svd"] = "cat",
) -> None:
    """Make one LoRA of several, frozen, and use it; they stay as they are.

    Args:
        model: The model that has them.
        names: The LoRAs.
        weights: Of each; negative ones take its effect away.
        new_name: What the sum is called.
        method: "cat" is exact, its rank is the sum of theirs; "svd" is the closest one of the largest rank among them;
            "linear" adds the factors of LoRAs of one rank, which is not their sum but costs nothing.

    Raises:
        UserError: A name or the method is wrong, or these LoRAs cannot be combined so.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel
    from peft.utils.constants import DUMMY_TARGET_MODULES

    check_new(model, new_name)
    if len(weights) != len(names) or not names:
        raise UserError(
            f"weights must be one for each of {list(names)}, got {list(weights)}; give as many"
        )
    if method not in ("linear", "cat", "svd"):
        raise UserError(f"method must be linear, cat or svd, got {method!r}")
    for name in names:
        if lora.names(model).count(name) == 0 or model.peft_config[name].peft_type != "LORA":
            raise UserError(
                f"combined adapters must be LoRAs of this model, got {name!r}; load it first"
            )
    active = active_adapters(model)
    try:
        with lora.trainability_kept(model):
            # peft's own object around the model, which knows how to combine; it targets nothing itself.
            tuner = LoraModel(
                model, LoraConfig(target_modules=DUMMY_TARGET_MODULES), lora.NO_ADAPTER
            )
            del model.peft_config[lora.NO_ADAPTER]
            tuner.active_adapter = []
            tuner.add_weighted_adapter(
                list(names), list(weights), new_name, combination_type=method
            )
    except (ValueError, TypeError) as error:
        lora.detach(model, new_name)
        use_rows(model, active)
        raise UserError(f"adapters must fit one another, got an error: {error}") from error
    for parameter in lora.parameters(model, new_name):
        parameter.requires_grad_(False)
    set_adapter(model, new_name)

"""P-Tuning v2 (Liu et al., arXiv 2110.07602): trained keys and values in front of those of every layer.

Nothing of the model changes. A forward pre-hook on the decoder hands the prefix in as one more keyword, which
transformers passes down to its attention function; ours, registered beside the ones it wraps, puts the prefix before
the keys and values that the cache returned and lets every token see it. So it works on any decoder of transformers
that goes through the attention interface, `generate()` included. The cache holds real tokens only and the prefix is
never rotated: positions are those of the text, as in the released ChatGLM code. (peft's prefix tuning shifts them.)

Shapes: B batch, S new tokens, T cached and new tokens, P virtual tokens, L layers, K key-value heads, D channels of a
head.

What differs from the released code on purpose: the encoder stays in float32 whatever the base is, and its dropout acts
on one layer at a time, so that a batch never holds B copies of the whole prefix.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chatglm_ptuning.errors import UserError

SAVED = "prefix_encoder."  # in front of an encoder's parameter names on disk
TAKING = "prefix_"  # in front of the name of an implementation of attention that takes a prefix


@dataclass
class PrefixTuningConfig:
    """What a prefix looks like; the fields below the line are read off the base model.

    Args:
        num_virtual_tokens: P, the length of the prefix in tokens (`pre_seq_len` in the released code).
        prefix_projection: Make keys and values by a two-layer perceptron from smaller embeddings.
        prefix_dropout: Probability of dropping an entry of the prefix in training; 0.1 as released.
        num_layers: L.
        num_key_value_heads: K.
        head_dim: D.
        hidden_size: Width of the base, and of the perceptron.
        embedding_size: Width of the embeddings under projection: hidden_size for ChatGLM-6B, 2 * L * K * D for the
            later models, as released.

    Raises:
        UserError: A number that cannot be.
    """

    peft_type: ClassVar[str] = "P_TUNING_V2"

    num_virtual_tokens: int = 128
    prefix_projection: bool = False
    prefix_dropout: float = 0.1
    # ---- of the base model
    num_layers: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_size: int | None = None
    embedding_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.num_virtual_tokens, int) or self.num_virtual_tokens < 1:
            raise UserError(
                f"num_virtual_tokens must be at least 1, got {self.num_virtual_tokens!r}"
            )
        if not 0 <= self.prefix_dropout < 1:
            raise UserError(f"prefix_dropout must be in [0, 1), got {self.prefix_dropout!r}")

    @property
    def kv_size(self) -> int:
        """Keys and values of one token in all layers: 2 * L * K * D."""
        return 2 * self.num_layers * self.num_key_value_heads * self.head_dim  # type: ignore[operator]

    def fit(self, base: PreTrainedConfig) -> "PrefixTuningConfig":
        """This prefix with the shape of a base model.

        Raises:
            UserError: A field that is already set says otherwise: the prefix was made for another model.
        """
        heads = getattr(base, "num_key_value_heads", None) or base.num_attention_heads
        head_dim = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
        shape = {
            "num_layers": base.num_hidden_layers,
            "num_key_value_heads": heads,
            "head_dim": head_dim,
            "hidden_size": base.hidden_size,
        }
        for name, value in shape.items():
            own = getattr(self, name)
            if own is not None and own != value:
                raise UserError(
                    f"prefix must fit its base model, got {name}={own!r} in the prefix"
                    f" and {name}={value!r} in the base; load it on the model it was trained on"
                )
        if self.embedding_size is None:
            kv_size = 2 * base.num_hidden_layers * heads * head_dim
            shape["embedding_size"] = base.hidden_size if base.model_type == "chatglm" else kv_size
        return PrefixTuningConfig(**{**vars(self), **shape})


class PrefixEncoder(nn.Module):
    """Embeddings, with projection also a perceptron, to the keys and values of every layer.

    Without projection the embeddings are the keys and values: [P, 2 * L * K * D]. With it they are [P, embedding_size],
    followed by Linear to hidden_size, tanh, Linear to 2 * L * K * D. Parameter names are the released ones.
    """

    def __init__(self, config: PrefixTuningConfig) -> None:
        super().__init__()
        self.config = config
        hidden_size: Any = config.hidden_size  # a number once `fit` has filled it in
        width: Any = config.embedding_size if config.prefix_projection else config.kv_size
        self.embedding = nn.Embedding(config.num_virtual_tokens, width)
        if config.prefix_projection:
            self.trans = nn.Sequential(
                nn.Linear(width, hidden_size),
                nn.Tanh(),
                nn.Linear(hidden_size, config.kv_size),
            )
        self._memo: tuple[object, Tensor] | None = None

    def forward(self) -> Tensor:
        """Keys (0) and values (1) of every layer: [L, 2, K, P, D], float32.

        Computed once per state of the parameters where no gradient is wanted, anew at every step otherwise: the graph
        behind it can be walked back only once. ZeRO-3 gathers and frees parameters in each process's own memory, which
        tells nothing of their state; and were only some of the processes to compute it, all would wait for ever.
        """
        if torch.is_grad_enabled() or hasattr(self.embedding.weight, "ds_id"):
            self._memo = None
            return self._encode()
        state = [(p.data_ptr(), p._version) for p in self.parameters()]
        if self._memo is None or self._memo[0] != state:
            self._memo = (state, self._encode())
        return self._memo[1]

    def _encode(self) -> Tensor:
        config = self.config
        tokens = torch.arange(config.num_virtual_tokens, device=self.embedding.weight.device)
        with torch.autocast(tokens.device.type, enabled=False):
            flat = self.embedding(tokens)
            if config.prefix_projection:
                flat = self.trans(flat)
        parts = flat.view(
            len(tokens), config.num_layers, 2, config.num_key_value_heads, config.head_dim
        )
        return parts.permute(1, 2, 3, 0, 4)


@dataclass
class PrefixKeyValues:
    """The prefix of one forward pass, as it travels down to the attention function.

    Args:
        key_values: [L, 2, 1 or B, K, P, D].
        visible: Boolean [B, P], False where a row's prefix is shorter or absent; None if all see all.
        dropout: Probability for every entry of every row, 0 outside training.
    """

    key_values: Tensor
    visible: Tensor | None
    dropout: float

    def of_layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of one layer: [B, K, P, D] each, in dtype and batch size of `like`."""
        rows = self.key_values[index].to(like.dtype).expand(-1, like.shape[0], -1, -1, -1)
        key, value = F.dropout(rows, self.dropout) if self.dropout else rows
        return key, value


class PrefixTuning(nn.Module):
    """The prefixes of one decoder: all encoders by name, and which of them is in use.

    Args:
        decoder: The model whose layers attend; the hook stays on it as long as there is a prefix.
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoders: dict[str, PrefixEncoder] = nn.ModuleDict()  # type: ignore[assignment]
        self.active: list[str | None] = []
        self._names = list(inspect.signature(decoder.forward).parameters)
        wrap_attention(decoder)
        self._hook = decoder.register_forward_pre_hook(partial(self._hand_in), with_kwargs=True)

    def detach_from(self, decoder: PreTrainedModel) -> None:
        """Take the hook away and give the decoder its own attention back."""
        self._hook.remove()
        decoder.set_attn_implementation(decoder.config._attn_implementation.removeprefix(TAKING))

    def forward(self, batch_size: int) -> PrefixKeyValues | None:
        """The prefix of every row of a batch; None if no row has one.

        One active name serves the whole batch. Several are one per row, None for a row without; a batch that is a
        multiple of them (beams, several sequences per prompt) repeats each.

        Raises:
            UserError: The batch is no multiple of the number of names.
        """
        names = sorted({name for name in self.active if name is not None})
        if not names:
            return None
        dropout = self.encoders[names[0]].config.prefix_dropout if self.training else 0.0
        if len(self.active) == 1:
            return PrefixKeyValues(self.encoders[names[0]]().unsqueeze(2), None, dropout)
        if batch_size % len(self.active):
            raise UserError(
                f"a batch must have a multiple of as many rows as there are active adapters, got batch={batch_size!r}"
                f" and {len(self.active)} names; call set_adapter with one name a row"
            )
        longest = max(self.encoders[name].config.num_virtual_tokens for name in names)
        prefixes = [
            F.pad(
                self.encoders[name](),
                (0, 0, 0, longest - self.encoders[name].config.num_virtual_tokens),
            )
            for name in names
        ]
        device = prefixes[0].device
        lengths = [
            self.encoders[n].config.num_virtual_tokens if n is not None else 0 for n in self.active
        ]
        index = [names.index(n) if n is not None else 0 for n in self.active]
        repeats = batch_size // len(self.active)
        rows = torch.tensor(index, device=device).repeat_interleave(repeats)
        visible = (
            torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        )
        stacked = torch.stack(prefixes, dim=2)[:, :, rows]
        return PrefixKeyValues(stacked, visible.repeat_interleave(repeats, dim=0), dropout)

    def _hand_in(
        self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Add the prefix to a forward call of the decoder, and positions that do not count padding."""
        kwargs = dict(zip(self._names, args, strict=False)) | kwargs
        tokens = (
            kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        )
        prefix = self(tokens.shape[0])
        if prefix is None:
            return (), kwargs
        wrap_attention(decoder)  # another one may have been chosen since
        mask = kwargs.get("attention_mask")
        # ChatGLM-6B numbers its own tokens. Elsewhere positions count from the start of the row, padding included,
        # which rotation alone would forgive; beside an unrotated prefix it is another computation.
        numbers_tokens = hasattr(decoder, "get_position_ids")
        if (
            not numbers_tokens
            and kwargs.get("position_ids") is None
            and mask is not None
            and mask.ndim == 2
        ):
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            kwargs["position_ids"] = positions[:, -tokens.shape[1] :]
        return (), kwargs | {"prefix": prefix}


def extend_mask(mask: Tensor, prefix: PrefixKeyValues, length: int) -> Tensor:
    """Put P columns before a mask [1 or B, 1 or H, S, T], boolean (True visible) or added to the scores."""
    batch = mask.shape[0] if prefix.visible is None else prefix.visible.shape[0]
    mask = mask.expand(batch, -1, -1, -1)
    columns = mask.new_ones(()) if mask.dtype == torch.bool else mask.new_zeros(())
    columns = columns.expand(*mask.shape[:-1], length)
    if prefix.visible is not None:
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        columns = columns.masked_fill(~prefix.visible[:, None, None], hidden)
    return torch.cat((columns, mask), dim=-1)


def attend_with_prefix(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    implementation: str,
    prefix: PrefixKeyValues | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers that puts the prefix first and leaves the rest to another one.

    Args:
        module: The attention layer; tells its index.
        query: [B, H, S, D].
        key: [B, K, T, D], as the cache returned it.
        value: [B, K, T, D].
        attention_mask: [B, 1, S, T]; None where the mask is exactly causal.
        implementation: The one wrapped: "sdpa" or "eager".
        prefix: What the hook handed in; None to run the wrapped one alone.
        kwargs: Handed on.

    Returns:
        Context [B, S, H, D], and attention weights where the wrapped function gives them.
    """
    # A modeling file calls its own eager attention by this name; the registry does not hold it.
    own_eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    wrapped: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, own_eager)
    if prefix is None:
        return wrapped(module, query, key, value, attention_mask, **kwargs)
    length = query.shape[2]
    if attention_mask is None and length > 1:
        # Nothing is padded and the cache was empty. A static cache is longer than the tokens it holds: the rest of it
        # lies in the future of all of them.
        key, value = key[:, :, :length], value[:, :, :length]
    prefix_key, prefix_value = prefix.of_layer(module.layer_idx, key)
    virtual = prefix_key.shape[2]
    key, value = torch.cat((prefix_key, key), dim=2), torch.cat((prefix_value, value), dim=2)
    if attention_mask is not None:
        attention_mask = extend_mask(attention_mask, prefix, virtual)
    elif prefix.visible is not None:
        causal = torch.ones(length, key.shape[2] - virtual, dtype=torch.bool, device=key.device)
        if length > 1:
            causal = causal.tril()
        attention_mask = extend_mask(causal[None, None], prefix, virtual)
    elif length > 1:
        attention_mask = causal_lower_right(length, key.shape[2])
    return wrapped(module, query, key, value, attention_mask, **kwargs)


WRAPPED: dict[str, Callable] = {"sdpa": sdpa_mask, "eager": eager_mask}
for name, mask_function in WRAPPED.items():
    AttentionInterface.register(TAKING + name, partial(attend_with_prefix, implementation=name))
    AttentionMaskInterface.register(TAKING + name, mask_function)


def wrap_attention(decoder: PreTrainedModel) -> None:
    """Choose, in place of a decoder's implementation of attention, the one around it that takes a prefix.

    Raises:
        UserError: It is none of those wrapped here.
    """
    implementation = decoder.config._attn_implementation
    if implementation.startswith(TAKING):
        return
    if implementation not in WRAPPED:
        raise UserError(
            f"attn_implementation must be one of {sorted(WRAPPED)} for a prefix, got {implementation!r};"
            " sdpa runs the fused kernels"
        )
    decoder.set_attn_implementation(TAKING + implementation)


def prefix_tuning_of(model: PreTrainedModel) -> PrefixTuning | None:
    """The prefixes attached to a model; None if there are none."""
    return getattr(model.get_decoder(), "prefix_tuning", None)


def encoder_of(model: PreTrainedModel, name: str) -> PrefixEncoder:
    """The encoder of one prefix."""
    return model.get_decoder().prefix_tuning.encoders[name]


def names(model: PreTrainedModel) -> list[str]:
    """Names of the prefixes attached to a model."""
    tuning = prefix_tuning_of(model)
    return list(tuning.encoders) if tuning is not None else []


def attach(model: PreTrainedModel, name: str, config: PrefixTuningConfig) -> None:
    """Put a freshly made prefix beside a model, trainable and not yet in use.

    Raises:
        UserError: It does not fit the model.
    """
    decoder = model.get_decoder()
    with torch.inference_mode(False):  # else the parameters do not count their changes
        encoder = PrefixEncoder(config.fit(model.config))
        encoder.to(device=decoder.get_input_embeddings().weight.device, dtype=torch.float32)
    if prefix_tuning_of(model) is None:
        decoder.prefix_tuning = PrefixTuning(decoder).train(model.training)
    decoder.prefix_tuning.encoders[name] = encoder.train(model.training)


def detach(model: PreTrainedModel, name: str) -> None:
    """Take one prefix away, and with the last one everything that came with it."""
    decoder = model.get_decoder()
    del decoder.prefix_tuning.encoders[name]
    if not decoder.prefix_tuning.encoders:
        decoder.prefix_tuning.detach_from(decoder)
        del decoder.prefix_tuning


def use(model: PreTrainedModel, rows: Sequence[str | None]) -> None:
    """One name for every row, one name per row, or none at all."""
    tuning = prefix_tuning_of(model)
    if tuning is not None:
        tuning.active = list(rows)


def parameters(model: PreTrainedModel, name: str) -> list[nn.Parameter]:
    """What is trained of a prefix."""
    return list(encoder_of(model, name).parameters())


def tensors(
    model: PreTrainedModel, name: str, trained: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The tensors of a prefix under the names they are saved by.

    Args:
        model: The base with the prefix.
        name: Of the prefix.
        trained: Values by the model's parameter names, where the parameters themselves are sharded; None reads them.
    """
    encoder = encoder_of(model, name)
    if trained is not None:
        path = next(path for path, module in model.named_modules() if module is encoder)
        return {f"{SAVED}{key}": trained[f"{path}.{key}"] for key in encoder.state_dict()}
    return {f"{SAVED}{key}": value for key, value in encoder.state_dict().items()}


def load_tensors(model: PreTrainedModel, name: str, saved: Mapping[str, Tensor]) -> None:
    """Fill a prefix with saved tensors.

    Raises:
        UserError: Names or shapes are not those of this prefix.
    """
    own = {f"{SAVED}{key}": value for key, value in encoder_of(model, name).state_dict().items()}
    shapes = [{key: tuple(value.shape) for key, value in group.items()} for group in (saved, own)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"the saved prefix must hold {shapes[1]}, got {shapes[0]}; load it on the model it was trained on"
        )
    for key, value in own.items():
        value.copy_(saved[key])


def config_of(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """What adapter_config.json says of a prefix."""
    config = encoder_of(model, name).config
    return {"peft_type": config.peft_type, **asdict(config)}


def read_config(content: dict[str, Any]) -> PrefixTuningConfig:
    """A config from the content of adapter_config.json; keys of other writers are left out."""
    known = {field.name for field in fields(PrefixTuningConfig)}
    return PrefixTuningConfig(**{key: value for key, value in content.items() if key in known})

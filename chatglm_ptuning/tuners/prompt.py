"""Soft prompts: prompt tuning (Lester et al., arXiv 2104.08691) and P-tuning v1 (Liu et al., arXiv 2103.10385).

Trained vectors stand in front of the token embeddings, as if they were P more tokens. Nothing of the model changes: a
forward pre-hook on the decoder puts them in front of every example, a forward hook cuts them off its hidden states
again. So logits and labels are those of the real tokens, and callers know nothing of it, `generate()` included.

Positions, which are peft's too wherever a row has no padding on its left (peft counts that padding): the vectors have
0 to P - 1, what follows is shifted by P. In ChatGLM-6B they are context, 0 on its second axis: they see the whole
context and all see them, and the place of `[gMASK]` is shifted with the rest. In a packed row every example has a
prompt of its own. The cache holds the vectors like tokens, P more than the caller has counted; a later call is told by
the cache not being empty, and must use the adapters of the first.

Shapes: B batch, S tokens of the call, P virtual tokens (of the longest prompt in the batch), T tokens that the decoder
gets, H hidden size.
"""

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.tuners.prompt_encoder import (
    PromptEmbedding,
    PromptEncoder,
    PromptEncoderConfig,
    PromptTuningConfig,
    SoftPromptConfig,
    fill,
)
from chatglm_ptuning.tuners.prompt_layout import Layout, apart, count_tokens, shift

EMBEDDINGS = "prompt_embeddings"  # on disk: the vectors [P, H], all that peft reads
SAVED = "prompt_encoder."  # on disk: in front of the parameter names of what makes them


class PromptTuning(nn.Module):
    """The soft prompts of one decoder: all encoders by name, and which of them is in use.

    Args:
        decoder: The model whose embeddings they precede; the hooks stay on it as long as there is a soft prompt.
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict()
        self.active: list[str | None] = []
        self._names = list(inspect.signature(decoder.forward).parameters)
        self._columns: Tensor | None = None  # [B, S], where the tokens of the running call are
        # Before other hooks: a prefix then meets rows that are as long as they are going to be.
        self._hooks = [
            decoder.register_forward_pre_hook(self._put_in, prepend=True, with_kwargs=True),
            decoder.register_forward_hook(self._cut_off),
        ]

    def remove_hooks(self) -> None:
        """Leave the decoder as it was."""
        for hook in self._hooks:
            hook.remove()

    def rows(self, batch_size: int) -> list[str | None]:
        """The name of every row's prompt.

        One active name serves the whole batch. Several are one per row, None for a row without; a batch that is a
        multiple of them (beams, several sequences per prompt) repeats each.

        Raises:
            UserError: The batch is no multiple of the number of names.
        """
        if batch_size % len(self.active):
            raise UserError(
                f"a batch must have a multiple of as many rows as there are active adapters, got batch={batch_size!r}"
                f" and {len(self.active)} names; call set_adapter with one name a row"
            )
        return [name for name in self.active for _ in range(batch_size // len(self.active))]

    def size(self, name: str | None) -> int:
        """The number of virtual tokens of one prompt; 0 for none."""
        encoder: Any = self.encoders[name] if name is not None else None
        return encoder.config.num_virtual_tokens if encoder is not None else 0

    def forward(self, rows: Sequence[str | None], length: int) -> Tensor:
        """The vectors of every row, [B, length, H]; zeros after the end of a shorter prompt."""
        names = sorted({name for name in rows if name is not None})
        vectors = {name: self.encoders[name]() for name in names}
        padded = [F.pad(value, (0, 0, 0, length - len(value))) for value in vectors.values()]
        index = [names.index(name) if name is not None else 0 for name in rows]
        return torch.stack(padded)[torch.tensor(index, device=padded[0].device)]

    def _put_in(
        self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Lengthen a call of the decoder by the prompts, or by what the cache already holds of them.

        Raises:
            UserError: Mask or cache are of a form that has no room for a prompt, or positions are missing.
        """
        self._columns = None
        if not any(self.active):
            return args, kwargs
        # Every decoder of transformers has these five first; from 5.24 on the fourth is named "cache".
        call = dict(zip(self._names, args, strict=False)) | kwargs
        ids, mask, positions, cache, embeddings = map(call.get, self._names[:5])
        tokens: Any = ids if embeddings is None else embeddings
        check_room(mask, cache)
        rows = self.rows(tokens.shape[0])
        sizes = [self.size(name) for name in rows]
        longest, lengths = max(sizes), torch.tensor(sizes, device=tokens.device)
        past = cache.get_seq_length() if cache is not None else 0
        if mask is None:
            check_goes_on(positions, tokens.shape[1], past - longest if past else 0)
            real = tokens.shape[1] + (past - longest if past else 0)
            mask = torch.ones(tokens.shape[0], real, dtype=torch.long, device=tokens.device)
        # ChatGLM-6B: it tells examples apart
        has_own_positions = hasattr(decoder, "get_position_ids")
        if positions is None and not has_own_positions:
            positions = count_tokens(mask)[:, -tokens.shape[1] :]
        if past:
            if mask.shape[1] + longest != past + tokens.shape[1]:
                raise UserError(
                    f"attention_mask must cover the tokens of the cache and the new ones, got {mask.shape[1]} where the"
                    f" cache holds {past} with a soft prompt of {longest} and {tokens.shape[1]} are new; give the"
                    " whole conversation anew, without a cache"
                )
            seen = torch.arange(longest, device=mask.device) >= longest - lengths[:, None]
            call["attention_mask"] = torch.cat((seen.to(mask.dtype), mask), dim=1)
            call["position_ids"] = None if positions is None else shift(positions, lengths)
            return (), call
        if positions is None:
            if ids is None:
                raise UserError(
                    "position_ids must be given with inputs_embeds, got None; get_position_ids makes them from the ids"
                    " of the whole sequence"
                )
            positions = decoder.get_position_ids(ids, mask)  # type: ignore[operator]
        if embeddings is None:
            embeddings = decoder.get_input_embeddings()(ids)  # type: ignore[operator]
        layout = Layout.of(mask, lengths, longest)
        self._columns = layout.columns
        both = torch.cat((self(rows, longest).to(embeddings), embeddings), dim=1)
        return (), call | {
            "input_ids": None,
            "inputs_embeds": both.take_along_dim(layout.source[..., None], dim=1),
            "attention_mask": layout.mask if has_own_positions else apart(layout.mask, both.dtype),
            "position_ids": layout.number(shift(positions, lengths)),
        }

    def _cut_off(
        self, decoder: nn.Module, args: tuple, output: BaseModelOutputWithPast
    ) -> BaseModelOutputWithPast:
        """Keep the hidden states of the tokens; attention weights stay whole."""
        if self._columns is not None:
            columns, self._columns = self._columns[..., None], None
            output.last_hidden_state = output.last_hidden_state.take_along_dim(columns, dim=1)
            if output.hidden_states is not None:
                output.hidden_states = tuple(
                    states.take_along_dim(columns, dim=1) for states in output.hidden_states
                )
        return output


def check_room(mask: Tensor | None, cache: Any) -> None:
    """Refuse what was made for the tokens alone and cannot be lengthened.

    Raises:
        UserError: A four-dimensional mask, or a cache of fixed size.
    """
    if getattr(cache, "is_compileable", False):
        raise UserError(
            f"the cache must be able to grow for a soft prompt, got a {type(cache).__name__};"
            " leave cache_implementation out"
        )
    if mask is not None and mask.ndim != 2:
        raise UserError(
            f"attention_mask must be [batch, tokens] for a soft prompt, got the shape {tuple(mask.shape)!r};"
            " give 1 for a real token and 0 for padding"
        )


def check_goes_on(positions: Tensor | None, count: int, cached: int) -> None:
    """Refuse tokens without a mask that do not follow those of the cache.

    `generate()` on the cache of an earlier call takes the prompt's length for that of tokens, and so cuts off the wrong
    ones. Two axes do not tell how many came before, but a token at a time always follows.

    Args:
        positions: As the caller gave them; None if he did not.
        count: New tokens.
        cached: Tokens in the cache, without those of the prompt.

    Raises:
        UserError: They do not.
    """
    if not cached or positions is None:
        return
    if int(positions[0, 0]) != cached if positions.ndim == 2 else count > 1:
        raise UserError(
            f"new tokens must follow the {cached} of the cache, got {count} elsewhere; with a soft prompt give the"
            " whole conversation anew, without a cache"
        )


def prompt_tuning_of(model: PreTrainedModel) -> PromptTuning | None:
    """The soft prompts attached to a model; None if there are none."""
    return getattr(model.get_decoder(), "prompt_tuning", None)


def encoder_of(model: PreTrainedModel, name: str) -> PromptEmbedding:
    """What makes the vectors of one soft prompt."""
    return model.get_decoder().prompt_tuning.encoders[name]


def names(model: PreTrainedModel) -> list[str]:
    """Names of the soft prompts attached to a model."""
    tuning = prompt_tuning_of(model)
    return list(tuning.encoders) if tuning is not None else []


def attach(model: PreTrainedModel, name: str, config: SoftPromptConfig) -> None:
    """Put a freshly made soft prompt beside a model, trainable and not yet in use.

    Raises:
        UserError: It does not fit the model, or it is to start from a text whose ids are missing.
    """
    if not getattr(model.config, "position_encoding_2d", True):
        raise UserError(
            "position_encoding_2d must be true for a soft prompt, got False: one axis does not tell it from the answer;"
            " train a prefix (P-Tuning v2)"
        )
    config = config.fit(model.config)
    decoder = model.get_decoder()
    table = decoder.get_input_embeddings()
    if isinstance(config, PromptEncoderConfig):
        encoder: PromptEmbedding = PromptEncoder(config)
    else:
        encoder = PromptEmbedding(config)
    if isinstance(config, PromptTuningConfig) and (ids := first_ids(config, table.num_embeddings)):
        encoder.embedding.weight.data = embeddings_of(table, ids)
    encoder.to(device=table.weight.device, dtype=torch.float32)
    if prompt_tuning_of(model) is None:
        decoder.prompt_tuning = PromptTuning(decoder).train(model.training)
    decoder.prompt_tuning.encoders[name] = encoder.train(model.training)


def first_ids(config: PromptTuningConfig, vocab_size: int) -> list[int]:
    """The tokens whose embeddings a fresh prompt starts from; none where it is random or comes from a file.

    Raises:
        UserError: It is to start from a text whose ids are missing.
    """
    if config.init_token_ids == [] or config.prompt_tuning_init == "RANDOM":
        return []
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        return torch.randint(vocab_size, (config.num_virtual_tokens,)).tolist()
    if config.init_token_ids is None:
        raise UserError(
            "init_token_ids must be the ids of prompt_tuning_init_text, got None; encode it with the base's tokenizer"
        )
    return fill(config.init_token_ids, config.num_virtual_tokens)


@torch.no_grad()
def embeddings_of(table: nn.Embedding, ids: Sequence[int]) -> Tensor:
    """The embeddings of tokens, [len(ids), H] in float32.

    Raises:
        UserError: The table is sharded.
    """
    if table.weight.numel() == 0:
        raise UserError(
            "a soft prompt must start at random under ZeRO-3, which splits the word embeddings; make it in a run"
            " without, and go on from there with adapter.from"
        )
    return table(torch.tensor(ids, device=table.weight.device)).float()


def detach(model: PreTrainedModel, name: str) -> None:
    """Take one soft prompt away, and with the last one everything that came with it."""
    decoder = model.get_decoder()
    del decoder.prompt_tuning.encoders[name]
    if not decoder.prompt_tuning.encoders:
        decoder.prompt_tuning.remove_hooks()
        del decoder.prompt_tuning


def use(model: PreTrainedModel, rows: Sequence[str | None]) -> None:
    """One name for every row, one name per row, or none at all."""
    tuning = prompt_tuning_of(model)
    if tuning is not None:
        tuning.active = list(rows)


def parameters(model: PreTrainedModel, name: str) -> list[nn.Parameter]:
    """What is trained of a soft prompt."""
    return list(encoder_of(model, name).parameters())


@torch.no_grad()
def tensors(
    model: PreTrainedModel, name: str, trained: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The tensors of a soft prompt under the names they are saved by.

    The vectors are all that using it takes, and all that peft knows; the encoder is beside them so that training can
    go on.

    Args:
        model: The base with the soft prompt.
        name: Of the soft prompt.
        trained: Values by the model's parameter names, where the parameters themselves are sharded; None reads them.
    """
    encoder = encoder_of(model, name)
    state = encoder.state_dict()
    if trained is not None:
        path = next(path for path, module in model.named_modules() if module is encoder)
        state = {key: trained[f"{path}.{key}"] for key in state}
    was_training = encoder.training
    encoder.eval()  # no dropout
    vectors = functional_call(encoder, state, ())
    encoder.train(was_training)
    network = {f"{SAVED}{key}": value for key, value in state.items()}
    return {EMBEDDINGS: vectors} | (network if isinstance(encoder, PromptEncoder) else {})


def load_tensors(model: PreTrainedModel, name: str, saved: Mapping[str, Tensor]) -> None:
    """Fill a soft prompt with saved tensors; vectors without an encoder, as peft writes them, take its place.

    Raises:
        UserError: Names or shapes are not those of this soft prompt.
    """
    tuning, encoder = model.get_decoder().prompt_tuning, encoder_of(model, name)
    vectors = {"embedding.weight": saved[EMBEDDINGS]} if EMBEDDINGS in saved else {}
    state = {key.removeprefix(SAVED): value for key, value in saved.items() if key != EMBEDDINGS}
    if not state:
        state = vectors
        if isinstance(encoder, PromptEncoder):
            like = encoder.embedding.weight
            encoder = PromptEmbedding(encoder.config).to(like.device).train(encoder.training)
    own = encoder.state_dict()
    shapes = [{key: tuple(value.shape) for key, value in group.items()} for group in (state, own)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"the saved soft prompt must hold {shapes[1]}, got {shapes[0]}; load it with its own config on the model it"
            " was trained on"
        )
    for key, value in own.items():
        value.copy_(state[key])
    tuning.encoders[name] = encoder


def config_of(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """What adapter_config.json says of a soft prompt: peft's content."""
    config = encoder_of(model, name).config
    content = {"peft_type": config.peft_type, "task_type": "CAUSAL_LM", "inference_mode": True}
    content |= {"num_transformer_submodules": 1, **asdict(config)}
    content.pop("init_token_ids", None)
    if content.get("prompt_tuning_init_text") is not None:  # peft wants both, and opens neither
        content["tokenizer_name_or_path"] = os.path.abspath(model.config.name_or_path)
    return content


def read_config(content: dict[str, Any]) -> SoftPromptConfig:
    """A config from the content of adapter_config.json; keys of other writers are left out."""
    kinds = (PromptTuningConfig, PromptEncoderConfig)
    kind = next(kind for kind in kinds if kind.peft_type == content["peft_type"])
    known = {key: value for key, value in content.items() if key in {f.name for f in fields(kind)}}
    return kind(**known | ({"init_token_ids": []} if kind is PromptTuningConfig else {}))

"""ChatGLM-6B (the first generation) as a transformers model.

The network is GLM (Du et al., arXiv 2103.10360; scaled up in GLM-130B, arXiv 2210.02414): a decoder whose context is
seen in both directions and whose answer, from `<sop>` on, is causal. Module and state-dict names are the released ones.

Shapes: B batch, S new tokens, T tokens seen so far (cache and new ones), H heads, D channels of a head.

What differs from the released code on purpose:

- `attention_mask` is `[B, T]` with 1 for a real token, as everywhere in transformers. Several examples in one row are
  told apart by 1, 2, 3, ... (packing): each sees only itself.
- Positions and masks are computed on the device from ids and mask, for left and right padding alike.
- A row that is masked completely (padding) sees itself, so that no implementation of attention yields NaN there.
- Angles of the rotation are computed in float32 in every dtype. The frequencies are rounded to half precision as in
  the released code, which was trained that way.
- Where a row holds both `[MASK]` and `[gMASK]`, `[gMASK]` is the place of the answer (the released model's rule, not
  its tokenizer's).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.models.positions_chatglm import make_mask, make_position_ids


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al., arXiv 2104.09864) over one or two position axes.

    With two axes the head is cut in two: the first half turns by the position, the second by the block position.
    """

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.num_axes = 2 if config.position_encoding_2d else 1
        self.dim = config.head_dim // self.num_axes
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)
        self.inv_freq: Tensor

    def frequencies(self) -> Tensor:
        """10000^(-2i/dim), rounded to half precision as the released code does: [dim / 2]."""
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim
        return (1.0 / 10000**exponent).half().float()

    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every angle.

        Args:
            hidden_states: Gives dtype and device only.
            position_ids: [B, num_axes, S], or [B, S] for one axis.

        Returns:
            Two tensors [B, 1, S, num_axes, dim], the 1 standing for the heads.
        """
        positions = position_ids.reshape(position_ids.shape[0], self.num_axes, -1).transpose(1, 2)
        angles = positions[..., None].float() * self.inv_freq.to(
            hidden_states.device, torch.float32
        )
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys [B, H, S, D] by the angles [B, 1, S, num_axes, D / num_axes]."""
    parts = states.unflatten(-1, (cos.shape[-2], -1))
    first, second = parts.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (parts * cos + turned * sin).flatten(-2)


def attention_fn(
    module: "SelfAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out (the "eager" implementation), with the released code's guard against half overflow.

    Scores are divided by (layer index + 1) before the product and multiplied again in float32 (GLM-130B, section 3.2),
    which changes nothing but the range of the half-precision product.

    Args:
        module: The `SelfAttention`, for its layer index.
        query: [B, H, S, D].
        key: [B, H, T, D].
        value: [B, H, T, D].
        attention_mask: Boolean [B, 1, S, T], True where visible; None if everything is.
        scaling: Factor on the scores, D^-0.5.
        dropout: Probability of dropping an attention weight.
        kwargs: Not used here; other implementations take more.

    Returns:
        Context [B, S, H, D] and attention weights [B, H, S, T].
    """
    coefficient = module.layer_idx + 1
    scores = torch.matmul(query * (scaling / coefficient), key.transpose(-1, -2)).float()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min / coefficient)
    weights = (scores * coefficient).softmax(dim=-1).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


eager_attention_forward = attention_fn  # under this name others find a modeling file's eager form


class SelfAttention(nn.Module):
    """Multi-head self-attention; the fused projection is interleaved per head: q, k, v of head 0, of head 1, ..."""

    is_causal = False  # the mask says it all: bidirectional context, causal answer
    num_key_value_groups = 1

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from every new token to all visible ones.

        Args:
            hidden_states: [B, S, hidden_size].
            attention_mask: Boolean [B, 1, S, T], True where visible.
            position_embeddings: Cosine and sine from `RotaryEmbedding`.
            past_key_values: Cache that the new keys and values are added to.
            kwargs: Handed on to the implementation of attention.

        Returns:
            [B, S, hidden_size], and the attention weights where the implementation gives them.
        """
        fused = self.query_key_value(hidden_states).unflatten(-1, (-1, 3 * self.head_dim))
        query, key, value = fused.transpose(1, 2).chunk(3, dim=-1)
        query, key = (
            apply_rotary(query, *position_embeddings),
            apply_rotary(key, *position_embeddings),
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, attention_fn
        )
        context, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs
        )
        return self.dense(context.flatten(-2)), weights


class GLU(nn.Module):
    """The feed-forward part: Linear, GELU in its tanh form, Linear. Nothing is gated; the name is the released one."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN["gelu_pytorch_tanh"]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map [B, S, hidden_size] to [B, S, hidden_size]."""
        return self.dense_4h_to_h(self.activation(self.dense_h_to_4h(hidden_states)))


class GLMBlock(GradientCheckpointingLayer):
    """One layer: h = LN(x); h = alpha h + attention(h); h = LN(h); out = alpha h + GLU(h).

    The residual is the *normalised* input, times alpha = sqrt(2 n) (DeepNorm's factor: arXiv 2203.00555).
    """

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.alpha = math.sqrt(2 * config.alpha_num_layers)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(
            config.hidden_size, eps=config.layernorm_epsilon
        )
        self.mlp = GLU(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map [B, S, hidden_size] to [B, S, hidden_size]; the other arguments go to `SelfAttention`."""
        normed = self.input_layernorm(hidden_states)
        context, _ = self.attention(
            normed, attention_mask, position_embeddings, past_key_values, **kwargs
        )
        normed = self.post_attention_layernorm(normed * self.alpha + context)
        return normed * self.alpha + self.mlp(normed)


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What every ChatGLM-6B class tells transformers about itself."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    # No flash attention: its kernels know causal and full masks only, and a bidirectional context is neither.
    # sdpa picks the memory-efficient kernel for this mask.
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ("GLMBlock",)
    _skip_keys_device_placement = ("past_key_values",)
    _input_embed_layer = "word_embeddings"
    _can_record_outputs = {"hidden_states": GLMBlock, "attentions": SelfAttention}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = (r"rotary_emb\.inv_freq",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(
            module, RotaryEmbedding
        ):  # also reached by a model that was built on the meta device
            module.inv_freq.copy_(module.frequencies())


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Word embeddings, `num_layers` times `GLMBlock`, a final layer norm."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = RotaryEmbedding(config)
        self.layers = nn.ModuleList(GLMBlock(config, i) for i in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_position_ids(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Positions of a whole sequence [B, S]: see `positions_chatglm.make_position_ids`."""
        return make_position_ids(self.config, input_ids, attention_mask)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the layers.

        Args:
            input_ids: [B, S] new tokens.
            attention_mask: [B, T], 1 for a real token, 0 for padding; 1, 2, ... for the examples of a packed row.
            position_ids: [B, 2, S] (or [B, S] for one axis); made from the ids if None, which needs the whole sequence.
            past_key_values: Keys and values of earlier tokens.
            inputs_embeds: [B, S, hidden_size] instead of ids; needs position_ids.
            use_cache: Return a cache.
            kwargs: Handed on to the layers and the implementation of attention.

        Returns:
            The final hidden states [B, S, hidden_size] and the cache.

        Raises:
            ValueError: Ids and embeddings both or neither given, or positions missing where they cannot be made.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            length = inputs_embeds.shape[1]
            if input_ids is None or (
                attention_mask is not None and attention_mask.shape[-1] != length
            ):
                raise ValueError(
                    "position_ids must be given with inputs_embeds or a filled cache; get_position_ids makes them from"
                    " the ids of the whole sequence"
                )
            position_ids = self.get_position_ids(input_ids, attention_mask)
        mask = make_mask(self.config, input_ids, position_ids, attention_mask, past_key_values)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layernorm(hidden_states), past_key_values=past_key_values
        )


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM-6B with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, and the loss where labels are given.

        Args:
            input_ids: See `ChatGLMModel.forward`, as all arguments not named here.
            attention_mask: [B, T].
            position_ids: [B, 2, S] or [B, S].
            past_key_values: Keys and values of earlier tokens.
            inputs_embeds: [B, S, hidden_size].
            labels: [B, S], the ids themselves (shifted here), -100 where no loss is wanted. Only the labelled
                positions are turned into float32.
            use_cache: Return a cache.
            logits_to_keep: Compute logits for the last so many positions, or for these indices; 0 for all.
            num_items_in_batch: Divide the summed loss by this instead of by the number of labels of this batch.
            kwargs: Handed on to the layers.

        Returns:
            Logits [B, S, vocab_size], loss, cache.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)
            is_target = targets != -100
            loss = F.cross_entropy(logits[is_target].float(), targets[is_target], reduction="sum")
            loss = loss / (is_target.sum() if num_items_in_batch is None else num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict
    ) -> None:
        """None: `generate` would number the tokens 0, 1, 2, ...; `prepare_inputs_for_generation` does it right."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Number the whole sequence, then keep what the cache does not hold yet.

        Args:
            input_ids: [B, T], prompt and answer so far.
            next_sequence_length: How many of the last tokens to run; None for all.
            past_key_values: Cache of the earlier ones.
            attention_mask: [B, T].
            cache: What transformers calls `past_key_values` from 5.24 on.
            kwargs: What `generate` was given.

        Returns:
            Keyword arguments of `forward`.

        Raises:
            UserError: The ids of the cached tokens are missing, or the prompt comes in pieces.
        """
        past_key_values = cache if cache is not None else past_key_values
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if next_sequence_length is None and past:
            raise UserError(
                f"input_ids must be the whole sequence, got {input_ids.shape[1]} tokens to follow {past} of a cache;"
                " give those too, and leave prefill_chunk_size out: every token of the context sees all of it"
            )
        position_ids = self.transformer.get_position_ids(input_ids, attention_mask)
        new = slice(None) if next_sequence_length is None else slice(-next_sequence_length, None)
        return {
            "input_ids": input_ids[:, new].contiguous(),
            "position_ids": position_ids[..., new].contiguous(),
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
            "output_attentions": kwargs.get("output_attentions"),
            "output_hidden_states": kwargs.get("output_hidden_states"),
        }


AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
AutoModel.register(ChatGLMConfig, ChatGLMModel, exist_ok=True)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)

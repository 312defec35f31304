"""Configuration of ChatGLM-6B (the first generation), under the released key names.

ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B say `model_type: chatglm` in their `config.json` too, but are other networks:
`models.loading` recognises them, this class refuses them.
"""

from typing import Any

from transformers import PreTrainedConfig

from chatglm_ptuning.errors import UserError


class ChatGLMConfig(PreTrainedConfig):
    """Shape and special ids of a ChatGLM-6B network; the defaults are those of the released 6B checkpoint.

    Both released vocabularies fit: 130528 ids with `<sop>` 130004, and the older 150528 ids with `<sop>` 150004.

    Args:
        vocab_size: Rows of the word embeddings; larger than the tokenizer's vocabulary.
        hidden_size: Width of the residual stream.
        num_layers: Number of `GLMBlock`s.
        num_attention_heads: Attention heads of `hidden_size / num_attention_heads` channels each.
        inner_hidden_size: Width inside the feed-forward part; 4 * hidden_size if None.
        max_sequence_length: Longest sequence of the pre-training, in tokens.
        layernorm_epsilon: Added to the variance in every layer norm.
        position_encoding_2d: Two rotations of half a head each, by position and by block position (GLM, arXiv
            2103.10360, section 2.3); False rotates the whole head by one position.
        alpha_num_layers: The number n in the residual factor alpha = sqrt(2 n). The released code always computes it
            with 28, whatever num_layers says, so that is the default.
        bos_token_id: `<sop>`, which starts the answer.
        eos_token_id: `<eop>`, which ends it.
        mask_token_id: `[MASK]`, the place of a short blank.
        gmask_token_id: `[gMASK]`, the place of the answer in a chat prompt.
        pad_token_id: `<pad>`.
        initializer_range: Standard deviation of freshly made weights.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012 - transformers reads a plain dict here
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "layer_norm_eps": "layernorm_epsilon",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int | None = None
    max_sequence_length: int = 2048
    layernorm_epsilon: float = 1e-5
    position_encoding_2d: bool = True
    alpha_num_layers: int = 28
    use_cache: bool = True
    bos_token_id: int = 130004
    eos_token_id: int | list[int] | None = 130005
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    pad_token_id: int | None = 3
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill what depends on other fields and refuse what is not a ChatGLM-6B.

        Raises:
            UserError: The keys belong to ChatGLM2-6B or a later model, or the heads do not divide the width.
        """
        if "multi_query_attention" in kwargs or "ffn_hidden_size" in kwargs:
            raise UserError(
                "ChatGLMConfig must describe a ChatGLM-6B network, got the keys of ChatGLM2-6B or later;"
                " open the directory with chatglm_ptuning.load_model"
            )
        if self.inner_hidden_size is None:
            self.inner_hidden_size = 4 * self.hidden_size
        rotary_parts = 4 if self.position_encoding_2d else 2
        if self.hidden_size % (self.num_attention_heads * rotary_parts):
            raise UserError(
                f"hidden_size must be a multiple of {rotary_parts} * num_attention_heads,"
                f" got hidden_size={self.hidden_size!r} and num_attention_heads={self.num_attention_heads!r}"
            )
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads; every head has its own here."""
        return self.num_attention_heads

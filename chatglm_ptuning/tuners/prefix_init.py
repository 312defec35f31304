"""A prefix of P-Tuning v2 that starts as a text: the keys and values the frozen base computes for it.

The text takes the positions just before 0, -P to -1, where the rotation of its keys is part of them; a prefix is not
rotated again. What such a prefix does before its first step of training, dropout off:

- A causal decoder (ChatGLM2-6B, ChatGLM3-6B, GLM-4, Llama, ...) computes exactly what it would if the text's tokens
  stood in front of the prompt's: no earlier token sees a later one, and scores depend on differences of positions.
- ChatGLM-6B, whose context is seen in both directions, computes what it would if the text stood in front of the prompt
  *and its tokens did not see the prompt's*. Within the text, every token sees all of it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.tuners.adapters import disable_adapters
from chatglm_ptuning.tuners.peft_prefix import flatten
from chatglm_ptuning.tuners.prefix import encoder_of


@torch.no_grad()
def init_from_text(model: PreTrainedModel, name: str, token_ids: Sequence[int]) -> None:
    """Fill a prefix without projection with the keys and values of a text.

    Args:
        model: The base that has it.
        name: Of the prefix.
        token_ids: The text, one id a virtual token, no control tokens among them.

    Raises:
        UserError: The prefix is of another length or has a projection, or the base is sharded.
    """
    encoder = encoder_of(model, name)
    config = encoder.config
    if config.prefix_projection:
        raise UserError(
            "a prefix that starts as a text must be the keys and values themselves, got prefix_projection=True;"
            " leave it out"
        )
    if len(token_ids) != config.num_virtual_tokens:
        raise UserError(
            f"a prefix that starts as a text must be as long as the text, got num_virtual_tokens="
            f"{config.num_virtual_tokens!r} and {len(token_ids)} tokens of text; leave num_virtual_tokens out"
        )
    if hasattr(model.get_input_embeddings().weight, "ds_id"):
        raise UserError(
            "a prefix must start as a text on a base that is whole, got one sharded by ZeRO-3; train with ZeRO-2, or"
            " make the prefix in a run of one step without DeepSpeed and give its directory as adapter.from"
        )
    encoder.embedding.weight.copy_(flatten(text_key_values(model, token_ids)))


def text_key_values(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    """What the base alone computes for P tokens at the positions -P to -1: [L, 2, K, P, D], keys first."""
    decoder = model.get_decoder()
    ids = torch.tensor([token_ids], device=model.get_input_embeddings().weight.device)
    if hasattr(decoder, "get_position_ids"):  # ChatGLM-6B's, on two axes: the first one counts
        positions = decoder.get_position_ids(ids)
        positions.view(-1, ids.shape[1])[0] -= ids.shape[1]
    else:
        positions = torch.arange(-ids.shape[1], 0, device=ids.device)[None]
    return key_values(model, input_ids=ids, position_ids=positions)


def vector_key_values(model: PreTrainedModel, vectors: Tensor) -> Tensor:
    """As `text_key_values`, of embeddings [P, H]: what a soft prompt is to a causal decoder with rotary positions."""
    embeddings = vectors.to(model.get_input_embeddings().weight)[None]
    positions = torch.arange(-len(vectors), 0, device=embeddings.device)[None]
    return key_values(model, inputs_embeds=embeddings, position_ids=positions)


def key_values(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """The cache that the base alone makes of one row: [L, 2, K, tokens, D], keys first."""
    was_training = model.training
    model.eval()
    with disable_adapters(model):
        cache = model.get_decoder()(**inputs, use_cache=True).past_key_values
    model.train(was_training)
    return torch.stack([torch.cat((layer.keys, layer.values)) for layer in cache.layers])

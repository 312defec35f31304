"""A prefix that starts as a text does what the text in front of the prompt does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models import modeling_chatglm
from chatglm_ptuning.tuners import LoraConfig, PrefixTuningConfig, active_adapters, add_adapter
from chatglm_ptuning.tuners.prefix import encoder_of
from chatglm_ptuning.tuners.prefix_init import init_from_text
from tests.checkpoints import tiny_model

TEXT = [7, 9, 5, 11, 6]
LEFT_PADDED = torch.tensor([[5, 6, 7, 8, 21, 22, 9], [0, 0, 0, 17, 5, 21, 22]])
MASK = (LEFT_PADDED > 0).long()


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, initializer_range=0.2, pad_token_id=0, **sizes, **heads)
    return LlamaForCausalLM(config).eval()


CAUSAL: dict[str, Callable[[], PreTrainedModel]] = {
    "chatglm3": lambda: tiny_model("chatglm3"),
    "glm4": lambda: tiny_model("glm4"),
    "llama": llama,
}


def with_text_prefix(model: PreTrainedModel, text: list[int]) -> PreTrainedModel:
    """The model with the text as its prefix, ready for inference."""
    add_adapter(model, PrefixTuningConfig(num_virtual_tokens=len(text)), "text")
    init_from_text(model, "text", text)
    return model.eval()


def behind_text(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows with the text between padding and prompt, and their mask."""
    text, ones = torch.tensor(TEXT), torch.ones(len(TEXT), dtype=torch.long)
    pairs = [(row, int((seen == 0).sum()), seen) for row, seen in zip(rows, mask, strict=True)]
    ids = [torch.cat((row[:pads], text, row[pads:])) for row, pads, _ in pairs]
    masks = [torch.cat((seen[:pads], ones, seen[pads:])) for _, pads, seen in pairs]
    return torch.stack(ids), torch.stack(masks)


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_causal_logits_are_those_of_the_text_in_front(family: str) -> None:
    model = CAUSAL[family]()
    ids, mask = behind_text(LEFT_PADDED, MASK)
    expected = model(input_ids=ids, attention_mask=mask).logits[:, len(TEXT) :]
    alone = model(input_ids=LEFT_PADDED, attention_mask=MASK).logits
    with_text_prefix(model, TEXT)
    logits = model(input_ids=LEFT_PADDED, attention_mask=MASK).logits
    assert_close(logits[MASK > 0], expected[MASK > 0], atol=1e-4, rtol=0)
    assert (alone - expected)[MASK > 0].abs().max() > 0.1


@pytest.mark.parametrize("family", CAUSAL)
def test_causal_answers_are_those_to_the_text_in_front(family: str) -> None:
    model = CAUSAL[family]()
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids, mask = behind_text(LEFT_PADDED, MASK)
    expected = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    alone = model.generate(input_ids=LEFT_PADDED, attention_mask=MASK, **settings)
    with_text_prefix(model, TEXT)
    answers = model.generate(input_ids=LEFT_PADDED, attention_mask=MASK, **settings)
    length = LEFT_PADDED.shape[1]
    assert answers[:, length:].tolist() == expected.tolist()
    assert alone[:, length:].tolist() != expected.tolist()


@pytest.mark.parametrize("two_axes", [True, False])
@torch.no_grad()
def test_chatglm_is_the_text_in_front_that_does_not_see_the_prompt(
    two_axes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("chatglm")
    model.config.position_encoding_2d = two_axes
    model = type(model)(model.config).eval()
    gmask, sop = model.config.gmask_token_id, model.config.bos_token_id
    prompt = torch.tensor([[5, 6, 7, 8, gmask, sop, 9, 10, 12]])
    ids = torch.cat((torch.tensor([TEXT]), prompt), dim=1)
    bidirectional = model(input_ids=ids).logits[:, len(TEXT) :]
    make_mask = modeling_chatglm.make_mask

    def without_prompt(*args: object) -> Tensor:
        mask = make_mask(*args).clone()
        mask[:, :, : len(TEXT), len(TEXT) :] = False
        return mask

    with monkeypatch.context() as patch:
        patch.setattr(modeling_chatglm, "make_mask", without_prompt)
        expected = model(input_ids=ids).logits[:, len(TEXT) :]
    with_text_prefix(model, TEXT)
    assert_close(model(input_ids=prompt).logits, expected, atol=1e-4, rtol=0)
    padded = torch.cat((torch.full((1, 3), model.config.pad_token_id), prompt), dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    logits = model(input_ids=padded, attention_mask=mask).logits[:, 3:]
    assert_close(logits, expected, atol=1e-4, rtol=0)
    assert (bidirectional - expected).abs().max() > 0.01


@torch.no_grad()
def test_the_base_alone_is_asked_whatever_is_in_use() -> None:
    model = llama()
    expected = encoder_of(with_text_prefix(llama(), TEXT), "text").embedding.weight
    add_adapter(model, LoraConfig(r=2, init_lora_weights=False, target_modules=["v_proj"]), "lora")
    add_adapter(model, PrefixTuningConfig(num_virtual_tokens=3), "other")
    add_adapter(model, PrefixTuningConfig(num_virtual_tokens=len(TEXT)), "text")
    model.train()
    init_from_text(model, "text", TEXT)
    assert torch.equal(encoder_of(model, "text").embedding.weight, expected)
    assert model.training
    assert active_adapters(model) == ["text"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_virtual_tokens": 4}, "num_virtual_tokens=4 and 5 tokens of text; leave"),
        ({"num_virtual_tokens": 5, "prefix_projection": True}, "got prefix_projection=True"),
    ],
)
def test_what_cannot_start_as_a_text_is_refused(settings: dict, message: str) -> None:
    model = llama()
    add_adapter(model, PrefixTuningConfig(**settings), "text")
    with pytest.raises(UserError, match=message):
        init_from_text(model, "text", TEXT)


def test_a_sharded_base_is_refused() -> None:
    model = llama()
    add_adapter(model, PrefixTuningConfig(num_virtual_tokens=5), "text")
    model.get_input_embeddings().weight.ds_id = 0
    with pytest.raises(UserError, match="got one sharded by ZeRO-3; train with ZeRO-2"):
        init_from_text(model, "text", TEXT)

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import DynamicCache

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.models.modeling_chatglm import ChatGLMForConditionalGeneration

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPTS = ["gen_b1", "gen_b3", "gen_mask"]


@pytest.fixture(scope="module")
def loaded():
    config = json.loads((GOLDEN / "v1_plain.json").read_text())["config"]
    tensors = load_file(GOLDEN / "v1_plain.safetensors")
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**config)).eval()
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    return model, tensors


@pytest.fixture
def model(loaded):
    loaded[0].set_attn_implementation("sdpa")
    return loaded[0]


@pytest.fixture
def tensors(loaded):
    return loaded[1]


def prompt(tensors, batch):
    """Ids, and the mask `[batch, seq_len]` that the recorded one, of who sees whom, was made from."""
    mask = (~tensors[f"in.{batch}.attention_mask"][:, 0, -1]).long()
    return {"input_ids": tensors[f"in.{batch}.input_ids"], "attention_mask": mask}


def new_tokens(model, inputs, **options):
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": [-1]} | options
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("batch", PROMPTS)
def test_recorded_greedy_tokens_and_step_logits(model, tensors, batch, cache, attention):
    model.set_attn_implementation(attention)
    inputs = prompt(tensors, batch)
    generated = model.generate(
        **inputs,
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=[-1],  # the recording does not stop
        use_cache=cache is not None,
        cache_implementation=cache,
        disable_compile=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = tensors[f"gen.{batch}.step_logits"]
    logits = torch.stack(generated.logits, dim=1)[:, : expected.shape[1]]
    assert_close(logits, expected, rtol=0, atol=1e-4)
    tokens = generated.sequences[:, inputs["input_ids"].shape[1] :]
    assert tokens.tolist() == tensors[f"gen.{batch}.new_tokens"].tolist()


@pytest.mark.parametrize("batch", PROMPTS)
def test_generation_stops_at_eop_and_pads(model, tensors, batch):
    expected = tensors[f"gen.{batch}.official_generate_with_eos"].tolist()
    assert new_tokens(model, prompt(tensors, batch), eos_token_id=None) == expected


def test_prompt_in_two_pieces_gives_the_logits_of_one(model, tensors):
    """A longer answer goes on from the cache of a shorter one, several tokens at a time."""
    inputs = prompt(tensors, "gen_b3")
    answer = tensors["gen.gen_b3.new_tokens"][:, :6]
    ids = torch.cat((inputs["input_ids"], answer), dim=1)
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(answer)), dim=1)
    positions = model.transformer.get_position_ids(ids, mask)
    cache, length = DynamicCache(config=model.config), inputs["input_ids"].shape[1]
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        model(**inputs, past_key_values=cache)
        rest = model(
            answer,
            attention_mask=mask,
            position_ids=positions[..., length:],
            past_key_values=cache,
        ).logits
    assert_close(rest, whole[:, length:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch", PROMPTS)
def test_prompt_in_pieces_is_refused(model, tensors, batch):
    """A context seen in both directions cannot be run piece by piece, nor numbered without its beginning."""
    inputs = prompt(tensors, batch)
    with pytest.raises(UserError, match="input_ids must be the whole sequence, got 3 tokens"):
        new_tokens(model, inputs, prefill_chunk_size=3)
    first = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    inputs = {"input_ids": first.sequences[:, -1:], "attention_mask": first.sequences * 0 + 1}
    with pytest.raises(UserError, match="input_ids must be the whole sequence, got 1 tokens"):
        new_tokens(model, inputs, past_key_values=first.past_key_values)


def test_beams_of_a_batch_are_those_of_each_row_alone_with_and_without_cache(model, tensors):
    inputs = prompt(tensors, "gen_b3")
    together = new_tokens(model, inputs, num_beams=3, max_new_tokens=8)
    assert new_tokens(model, inputs, num_beams=3, max_new_tokens=8, use_cache=False) == together
    for row, tokens in enumerate(together):
        seen = inputs["attention_mask"][row].bool()
        alone = {"input_ids": inputs["input_ids"][row : row + 1, seen]}
        assert new_tokens(model, alone, num_beams=3, max_new_tokens=8) == [tokens]


def test_several_samples_of_a_prompt_are_repeatable(model, tensors):
    inputs = prompt(tensors, "gen_b3")
    options = {"do_sample": True, "num_return_sequences": 2, "temperature": 2.0}
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        draws.append(new_tokens(model, inputs, **options))
    assert draws[0] == draws[1]
    assert len({tuple(row) for row in draws[0]}) == 6


def test_the_cache_has_either_name(model, tensors):
    inputs = prompt(tensors, "gen_b1")
    cache = model(**inputs, past_key_values=DynamicCache()).past_key_values
    ids = torch.cat((inputs["input_ids"], inputs["input_ids"][:, -1:]), dim=1)
    for name in ("past_key_values", "cache"):  # until and from transformers 5.24
        prepared = model.prepare_inputs_for_generation(ids, 1, **{name: cache})
        assert prepared["past_key_values"] is cache

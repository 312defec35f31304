"""P-Tuning v2 against the released code of ChatGLM-6B (v1), ChatGLM2-6B (v2) and ChatGLM3-6B (v3)."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import DynamicCache

from chatglm_ptuning.tuners.prefix import encoder_of
from tests.tuners.recordings import GOLDEN, PREFIX, Recording

CASES = ["v1_ptuning", "v2_ptuning_proj"]


@pytest.fixture(scope="module", params=CASES)
def recording(request, tmp_path_factory):
    return Recording(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request, recording):
    return recording.model(request.param)


@pytest.fixture
def trained(recording, model):
    """The same model with no gradients yet; its prefix is put back afterwards."""
    encoder = encoder_of(model, "default")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    yield model
    encoder.load_state_dict(before)
    encoder.zero_grad()
    model.gradient_checkpointing_disable()


def assert_gradients(encoder, expected):
    assert expected.keys() == dict(encoder.named_parameters()).keys()
    for name, parameter in encoder.named_parameters():
        largest = expected[name].abs().max().item()
        assert_close(parameter.grad, expected[name], rtol=0, atol=1e-4 * largest)


def test_logits_and_loss(recording, model):
    assert recording.batches("logits")
    for batch in recording.batches("logits"):
        with torch.no_grad():
            outputs = model(**recording.inputs(batch))
        valid = recording.tensors[f"in.{batch}.valid"].bool()
        expected = recording.tensors[f"out.{batch}.logits"]
        assert_close(outputs.logits[valid], expected[valid], **recording.tolerance)
        expected = recording.tensors[f"out.{batch}.loss"].squeeze()
        assert_close(outputs.loss, expected, rtol=1e-5, atol=0)


def test_recorded_positions_give_the_same(recording, model):
    for batch in recording.batches("logits"):
        inputs = recording.inputs(batch)
        positions = recording.tensors[f"in.{batch}.position_ids"]
        with torch.no_grad():
            logits = model(**inputs, position_ids=positions).logits
        valid = recording.tensors[f"in.{batch}.valid"].bool()
        expected = recording.tensors[f"out.{batch}.logits"]
        assert_close(logits[valid], expected[valid], **recording.tolerance)


def test_ids_and_labels_alone_give_the_training_loss(recording, model):
    with torch.no_grad():
        loss = model(**recording.inputs("train_rp")).loss
    assert_close(loss, recording.tensors["out.train_rp.loss"].squeeze(), rtol=1e-5, atol=0)


def test_right_padding_hidden_by_the_mask_gives_the_same_loss(recording, model):
    mask = recording.tensors["in.train_rp.valid"]
    with torch.no_grad():
        loss = model(**recording.inputs("train_rp"), attention_mask=mask).loss
    assert_close(loss, recording.tensors["out.train_rp.loss"].squeeze(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("recording", ["v1_ptuning"], indirect=True)
def test_long_row(recording, model):
    with torch.no_grad():
        logits = model(recording.tensors["in.b1_long.input_ids"]).logits[:, -8:]
    assert_close(logits, recording.tensors["out.b1_long.logits_last8"], **recording.tolerance)


def test_hidden_states_of_every_layer(recording, model):
    batch = next(b for b in ("b1", "b1_gmask") if f"hid.{b}.embedding" in recording.tensors)
    inputs = recording.inputs(batch)
    del inputs["labels"]
    with torch.no_grad():
        outputs = model.get_decoder()(**inputs, output_hidden_states=True)
    embedding, *after = outputs.hidden_states
    assert len(after) == model.config.num_hidden_layers
    assert_close(embedding, recording.tensors[f"hid.{batch}.embedding"], rtol=0, atol=0)
    for layer, states in enumerate(after[:-1]):  # the last one is normalised
        expected = recording.tensors[f"hid.{batch}.after_layer_{layer}"]
        assert_close(states, expected, **recording.tolerance)
    expected = recording.tensors[f"hid.{batch}.final_norm"]
    assert_close(outputs.last_hidden_state, expected, **recording.tolerance)


def test_cache_and_prefix_after_the_prompt(recording, model):
    batch = next(b for b in ("gen_b3", "gen_b1") if f"past.{b}.0.key" in recording.tensors)
    inputs, cache = recording.inputs(batch), DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        prefix = encoder_of(model, "default")()
    virtual, valid = prefix.shape[3], inputs["attention_mask"].bool()
    for index, layer in enumerate(cache.layers):
        for kind, states in enumerate((layer.keys, layer.values)):
            expected = recording.tensors[f"past.{batch}.{index}.{('key', 'value')[kind]}"]
            expected = expected.transpose(0, 1)  # [batch, prefix and prompt, heads, head_dim]
            own = prefix[index, kind].transpose(0, 1).expand(len(valid), -1, -1, -1)
            assert_close(own, expected[:, :virtual], rtol=0, atol=1e-6)
            states = states.transpose(1, 2)[valid]
            assert_close(states, expected[:, virtual:][valid], **recording.tolerance)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_greedy_tokens_and_the_logits_that_chose_them(recording, model, cache):
    prompts = {k.split(".")[1] for k in recording.tensors if k.startswith("gen.")}
    assert prompts
    for batch in prompts:
        inputs = recording.inputs(batch)
        options = {
            "max_new_tokens": 20,
            "do_sample": False,
            "use_cache": cache is not None,
            "cache_implementation": cache,
            "disable_compile": True,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        generated = model.generate(**inputs, **options, eos_token_id=[-1])  # it did not stop
        expected = recording.tensors[f"gen.{batch}.step_logits"]
        logits = torch.stack(generated.logits, dim=1)[:, : expected.shape[1]]
        assert_close(logits, expected, **recording.tolerance)
        length = inputs["input_ids"].shape[1]
        expected = recording.tensors[f"gen.{batch}.new_tokens"]
        assert generated.sequences[:, length:].tolist() == expected.tolist()
        stopped = model.generate(**inputs, **options).sequences[:, length:]
        expected = recording.tensors[f"gen.{batch}.official_generate_with_eos"]
        assert stopped.tolist() == expected.tolist()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_the_prefix(recording, trained, checkpointing):
    if checkpointing:  # happens in training mode only
        trained.gradient_checkpointing_enable({"use_reentrant": False})
        trained.train()
        encoder_of(trained, "default").config.prefix_dropout = 0.0
    encoder = encoder_of(trained, "default")
    batches = {key.split(".")[1] for key in recording.tensors if key.startswith("grad.")}
    assert batches
    for batch in batches:
        encoder.zero_grad()
        trained(**recording.inputs(batch)).loss.backward()
        assert_gradients(encoder, recording.gradients(batch))
    trained.eval()


def test_training_steps(recording, trained, request):
    case = request.node.callspec.params["recording"]
    recorded = json.loads((GOLDEN / "train_steps.json").read_text())[case]["adamw"]
    optimizer = torch.optim.AdamW(
        encoder_of(trained, "default").parameters(), lr=1e-2, weight_decay=0.0
    )
    for expected in recorded:
        loss = trained(**recording.inputs("train_rp")).loss
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


HALF_CASES = ["v1_ptuning"]


@pytest.mark.parametrize("case", HALF_CASES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_half_precision_base_under_a_float32_prefix(case, attention, tmp_path):
    """Rounding alone moves logits by up to 0.09 and gradients by 1.2 % of the largest; a wrong mask by over 1."""
    recording = Recording(case, tmp_path)
    half = load_file(GOLDEN / f"{case}_half.safetensors")
    model = recording.model(attention, dtype="float16")
    encoder = encoder_of(model, "default")
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.float16
    for batch in {key.split(".")[1] for key in half if key.startswith("grad.")}:
        encoder.zero_grad()
        outputs = model(**recording.inputs(batch))
        outputs.loss.backward()
        assert outputs.loss.item() == pytest.approx(half[f"out.{batch}.loss"].item(), rel=2e-3)
        expected = half[f"grad.{batch}.{PREFIX}embedding.weight"]
        largest = expected.abs().max().item()
        assert_close(encoder.embedding.weight.grad, expected, rtol=0, atol=0.015 * largest)
        if (expected := half.get(f"out.{batch}.logits")) is not None:
            valid = recording.tensors[f"in.{batch}.valid"].bool()
            assert_close(outputs.logits[valid], expected[valid], rtol=0, atol=0.15)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_one_position_axis(attention, tmp_path):
    recording = Recording("v1_1d_positions", tmp_path)
    with torch.no_grad():
        logits = recording.model(attention)(recording.tensors["in.input_ids"]).logits
    assert_close(logits, recording.tensors["out.logits"], **recording.tolerance)

import json
import math
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import DynamicCache

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.models.modeling_chatglm import (
    ChatGLMForConditionalGeneration,
    GLMBlock,
    RotaryEmbedding,
    SelfAttention,
    apply_rotary,
    attention_fn,
)

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = {"atol": 1e-4, "rtol": 0.0}  # the recording's own noise is 5e-5
GMASK, MASK, SOP, PAD = 21, 20, 22, 3
TINY = {
    "vocab_size": 24,
    "hidden_size": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": SOP,
    "eos_token_id": 23,
    "mask_token_id": MASK,
    "gmask_token_id": GMASK,
    "pad_token_id": PAD,
}


def tiny_model(**changes: object) -> ChatGLMForConditionalGeneration:
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**TINY | changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="module")
def plain():
    config = json.loads((GOLDEN / "v1_plain.json").read_text())["config"]
    tensors = load_file(GOLDEN / "v1_plain.safetensors")
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**config)).eval()
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    return model, tensors


@pytest.fixture(params=["eager", "sdpa"])
def recorded(request, plain):
    plain[0].set_attn_implementation(request.param)
    return plain


def inputs_of(tensors, batch):
    inputs = {key: tensors[f"in.{batch}.{key}"] for key in ("input_ids", "labels")}
    return inputs | {"attention_mask": tensors[f"in.{batch}.valid"]}


class TestRecorded:
    def test_logits_and_loss(self, recorded):
        model, tensors = recorded
        for batch in ("b3_gmask", "b3_mask"):
            with torch.no_grad():
                outputs = model(**inputs_of(tensors, batch))
            valid = tensors[f"in.{batch}.valid"].bool()
            expected = tensors[f"out.{batch}.logits"]
            assert_close(outputs.logits[valid], expected[valid], **TOLERANCE)
            expected = tensors[f"out.{batch}.loss"].squeeze()
            assert_close(outputs.loss, expected, rtol=1e-5, atol=0)

    def test_ids_and_labels_alone_give_the_training_loss(self, recorded):
        model, tensors = recorded
        inputs = inputs_of(tensors, "train_rp")
        del inputs["attention_mask"]
        with torch.no_grad():
            loss = model(**inputs).loss
        assert_close(loss, tensors["out.train_rp.loss"].squeeze(), rtol=1e-5, atol=0)

    def test_long_row(self, recorded):
        """Shows frequencies that are not rounded to half precision."""
        model, tensors = recorded
        with torch.no_grad():
            logits = model(tensors["in.b1_long.input_ids"]).logits[:, -8:]
        assert_close(logits, tensors["out.b1_long.logits_last8"], **TOLERANCE)

    def test_hidden_states(self, recorded):
        model, tensors = recorded
        with torch.no_grad():
            outputs = model.transformer(tensors["in.b1_gmask.input_ids"], output_hidden_states=True)
        embedding, *after = outputs.hidden_states
        assert len(after) == 3
        assert_close(embedding, tensors["hid.b1_gmask.embedding"], rtol=0, atol=0)
        for layer, states in enumerate(after[:-1]):  # the last one is normalised
            assert_close(states, tensors[f"hid.b1_gmask.after_layer_{layer}"], **TOLERANCE)
        assert_close(outputs.last_hidden_state, tensors["hid.b1_gmask.final_norm"], **TOLERANCE)

    def test_cache_after_the_prompt(self, recorded):
        model, tensors = recorded
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tensors["in.gen_b1.input_ids"], past_key_values=cache)
        for index, layer in enumerate(cache.layers):
            for kind, states in (("key", layer.keys), ("value", layer.values)):
                expected = tensors[f"past.gen_b1.{index}.{kind}"].permute(1, 2, 0, 3)
                assert_close(states, expected, **TOLERANCE)

    def test_gradient(self, recorded):
        model, tensors = recorded
        model.zero_grad()
        model(**inputs_of(tensors, "b3_gmask")).loss.backward()
        weight = model.transformer.layers[1].attention.query_key_value.weight
        expected = tensors["grad.b3_gmask.transformer.layers.1.attention.query_key_value.weight"]
        assert_close(weight.grad, expected, rtol=0, atol=1e-4 * expected.abs().max().item())

    @pytest.mark.parametrize("batch", ["b1_gmask", "b3_gmask", "b3_mask", "train_rp"])
    def test_positions(self, plain, batch):
        model, tensors = plain
        name = "model_position_ids" if batch == "train_rp" else "position_ids"
        mask = tensors[f"in.{batch}.valid"]
        positions = model.transformer.get_position_ids(tensors[f"in.{batch}.input_ids"], mask)
        valid = mask.bool()[:, None].expand(-1, 2, -1)
        assert positions[valid].tolist() == tensors[f"in.{batch}.{name}"][valid].tolist()


class TestRecordedParts:
    """One GLMBlock, one attention and its rotation, of layer 1 of `v1_ptuning` after the prefix."""

    @pytest.fixture
    def parts(self):
        return load_file(GOLDEN / "v1_parts.safetensors")

    @pytest.fixture
    def config(self):
        return ChatGLMConfig(**json.loads((GOLDEN / "v1_ptuning.json").read_text())["config"])

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_block(self, parts, config, attention):
        config._attn_implementation = attention
        block = GLMBlock(config, layer_idx=1)
        state = load_file(GOLDEN / "v1_ptuning.safetensors")
        start = "transformer.layers.1."
        block.load_state_dict({k: state[start + k] for k in block.state_dict()})
        hidden_states = parts["block_in.hidden_states"].transpose(0, 1)
        cache = DynamicCache()
        past = (parts[f"block_in.past_{kind}"].permute(1, 2, 0, 3) for kind in ("key", "value"))
        cache.update(*past, layer_idx=1)
        with torch.no_grad():
            outputs = block(
                hidden_states,
                ~parts["block_in.attention_mask"],
                RotaryEmbedding(config)(hidden_states, parts["block_in.position_ids"]),
                cache,
            )
        expected = parts["block_out.hidden_states"].transpose(0, 1)
        # Rows of padding see nothing there and are not compared.
        seen = ~parts["block_in.attention_mask"][:, 0, :, 8:].all(-1)
        assert_close(outputs[seen], expected[seen], **TOLERANCE)
        for kind, states in (("key", cache.layers[1].keys), ("value", cache.layers[1].values)):
            expected = parts[f"block_out.present_{kind}"].permute(1, 2, 0, 3)
            assert_close(states, expected, **TOLERANCE)

    def test_attention_fn(self, parts, config):
        query, key, value = (
            parts[f"attn_in.{n}"].permute(1, 2, 0, 3) for n in ("query", "key", "value")
        )
        past_key, past_value = (
            parts[f"attn_in.past_{n}"].permute(1, 2, 0, 3) for n in ("key", "value")
        )
        context, weights = attention_fn(
            SelfAttention(config, layer_idx=1),
            query,
            torch.cat((past_key, key), dim=2),
            torch.cat((past_value, value), dim=2),
            ~parts["attn_in.mask"],
            scaling=16**-0.5,
        )
        seen = ~parts["attn_in.mask"][:, 0, :, 8:].all(-1)
        expected = parts["attn_out.probs"].unflatten(0, (3, 4)).transpose(1, 2)
        assert_close(weights.transpose(1, 2)[seen], expected[seen], rtol=0, atol=1e-6)
        expected = parts["attn_out.context"].transpose(0, 1)
        assert_close(context.flatten(-2)[seen], expected[seen], rtol=0, atol=1e-5)

    def test_rotation_of_both_halves(self, parts, config):
        axes = ("rope_pos", "rope_block")
        positions = torch.stack([parts[f"{a}_in.position_id"].T for a in axes], dim=1)
        for name in ("q", "k"):
            states, expected = (
                torch.cat([parts[f"{a}_{way}.{name}"] for a in axes], dim=-1).permute(1, 2, 0, 3)
                for way in ("in", "out")
            )
            angles = RotaryEmbedding(config)(states, positions)
            assert_close(apply_rotary(states, *angles), expected, rtol=0, atol=1e-6)

    def test_angles(self, parts, config):
        positions = torch.arange(64).expand(1, 2, -1)
        cos, sin = RotaryEmbedding(config)(torch.zeros(1), positions)
        for axis in (0, 1):
            expected = parts["rope_table.cos_float"][:, 0]
            assert_close(cos[0, 0, :, axis], expected, rtol=0, atol=1e-6)
            expected = parts["rope_table.sin_float"][:, 0]
            assert_close(sin[0, 0, :, axis], expected, rtol=0, atol=1e-6)


def prompts() -> tuple[list[list[int]], list[list[int]]]:
    """Rows of three lengths, with both kinds of blank, and their labels."""
    rows = [
        [5, 6, 7, 8, GMASK, SOP, 9, 10, 23],
        [5, MASK, 7, SOP, 9, 23],
        [GMASK, SOP, 11, 12],
    ]
    labels = [[t if i > r.index(SOP) else -100 for i, t in enumerate(r)] for r in rows]
    return rows, labels


def padded(rows: list[list[int]], side: str, fill: int = PAD) -> torch.Tensor:
    length = max(map(len, rows)) + 2
    pads = [[fill] * (length - len(row)) for row in rows]
    both = zip(pads, rows, strict=True) if side == "left" else zip(rows, pads, strict=True)
    return torch.tensor([first + second for first, second in both])


ROWS, LABELS = prompts()
ATTENTION = pytest.mark.parametrize("attention", ["eager", "sdpa"])
AXES = pytest.mark.parametrize("two_axes", [True, False])


@ATTENTION
@AXES
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_each_row_alone(side, two_axes, attention):
    model = tiny_model(position_encoding_2d=two_axes)
    model.set_attn_implementation(attention)
    mask = padded([[1] * len(row) for row in ROWS], side, fill=0)
    with torch.no_grad():
        together = model(padded(ROWS, side), attention_mask=mask).logits
        for row, ids, seen in zip(together, ROWS, mask.bool(), strict=True):
            alone = model(torch.tensor([ids])).logits[0]
            assert_close(row[seen], alone, rtol=0, atol=1e-5)


@ATTENTION
def test_row_of_padding_alone_is_finite(attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    mask = torch.zeros(2, 9, dtype=torch.long)
    mask[0] = 1
    labels = torch.tensor([LABELS[0], [-100] * 9])
    outputs = model(torch.tensor([ROWS[0], [PAD] * 9]), attention_mask=mask, labels=labels)
    outputs.loss.backward()
    assert outputs.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert_close(outputs.logits[:1], model(torch.tensor(ROWS[:1])).logits, rtol=0, atol=1e-5)


@AXES
def test_packed_row_gives_the_losses_and_gradients_of_its_examples(two_axes):
    model = tiny_model(position_encoding_2d=two_axes)
    segments = [[i] * len(row) for i, row in enumerate(ROWS, 1)]
    packed = {
        "input_ids": torch.tensor([[*chain(*ROWS), PAD]]),
        "attention_mask": torch.tensor([[*chain(*segments), 0]]),
        "labels": torch.tensor([[*chain(*LABELS), -100]]),
    }
    apart = {
        "input_ids": padded(ROWS, "right"),
        "attention_mask": padded([[1] * len(row) for row in ROWS], "right", fill=0),
        "labels": padded(LABELS, "right", fill=-100),
    }
    results = []
    for batch in (packed, apart):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    (loss, gradients), (expected_loss, expected) = results
    assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    for gradient, other in zip(gradients, expected, strict=True):
        assert_close(gradient, other, rtol=0, atol=1e-5 * max(1.0, other.abs().max().item()))


def test_checkpointed_gradients_equal_unchecked():
    model = tiny_model().train()
    batch = {
        "input_ids": padded(ROWS, "right"),
        "attention_mask": padded([[1] * len(row) for row in ROWS], "right", fill=0),
        "labels": padded(LABELS, "right", fill=-100),
    }
    model(**batch).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.transformer.layers[0].gradient_checkpointing
    model.zero_grad()
    model(**batch).loss.backward()
    for parameter, other in zip(model.parameters(), expected, strict=True):
        assert_close(parameter.grad, other, rtol=0, atol=0)


def test_logits_to_keep_and_items_in_batch():
    model = tiny_model()
    ids, labels = torch.tensor(ROWS[:1]), torch.tensor(LABELS[:1])
    with torch.no_grad():
        whole = model(ids, labels=labels)
        assert_close(model(ids, logits_to_keep=2).logits, whole.logits[:, -2:])
        assert_close(
            model(ids, logits_to_keep=torch.tensor([1, 3])).logits, whole.logits[:, [1, 3]]
        )
        summed = model(ids, labels=labels, num_items_in_batch=12).loss
    assert_close(summed * 12, whole.loss * 3)


def test_embeddings_instead_of_ids():
    model = tiny_model()
    ids = torch.tensor(ROWS[:1])
    embeds, positions = model.get_input_embeddings()(ids), model.transformer.get_position_ids(ids)
    with torch.no_grad():
        logits = model(inputs_embeds=embeds, position_ids=positions).logits
        assert_close(logits, model(ids).logits)
    with pytest.raises(ValueError, match="position_ids must be given with inputs_embeds"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=embeds)


def test_alpha_is_of_28_layers_unless_said_otherwise():
    assert tiny_model().transformer.layers[0].alpha == math.sqrt(56)
    assert tiny_model(alpha_num_layers=2).transformer.layers[0].alpha == 2.0


def test_both_released_vocabularies_and_no_later_model():
    assert ChatGLMConfig().bos_token_id == 130004
    older = ChatGLMConfig(vocab_size=150528, bos_token_id=150004, gmask_token_id=150001)
    assert (older.vocab_size, older.bos_token_id) == (150528, 150004)
    with pytest.raises(UserError, match="keys of ChatGLM2-6B or later"):
        ChatGLMConfig(multi_query_attention=True)
    with pytest.raises(UserError, match="hidden_size must be a multiple of 4"):
        ChatGLMConfig(hidden_size=10, num_attention_heads=2)


def test_state_dict_has_the_released_keys(plain):
    model, tensors = plain
    released = {k for k in tensors if k.startswith(("transformer.", "lm_head."))}
    assert set(model.state_dict()) == {k for k in released if not k.endswith("inv_freq")}

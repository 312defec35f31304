"""What a prefix keeps true on every family of models: ChatGLM-6B, Glm, Llama, Qwen3."""

import pytest
import torch
from torch.testing import assert_close
from transformers import GlmConfig, LlamaConfig, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.tuners import (
    PrefixTuningConfig,
    add_adapter,
    delete_adapter,
    disable_adapters,
    list_adapters,
    load_adapter,
    save_adapter,
    set_adapter,
)
from chatglm_ptuning.tuners.prefix import encoder_of, prefix_tuning_of

GMASK, SOP, END, PAD = 21, 22, 23, 3
SHAPE = {"vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = SHAPE | {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
DECODER |= {"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": SOP}
CONFIGS = {
    "chatglm": ChatGLMConfig(
        vocab_size=24,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        bos_token_id=SOP,
        eos_token_id=END,
        gmask_token_id=GMASK,
        mask_token_id=20,
        pad_token_id=PAD,
    ),
    "glm": GlmConfig(**DECODER),
    "llama": LlamaConfig(**DECODER),
    "qwen3": Qwen3Config(**DECODER),
}
NATIVE = [family for family in CONFIGS if family != "chatglm"]
ROWS = [[5, 6, 7, 8, GMASK, SOP, 9, 10, 23], [7, 5, GMASK, SOP, 9, 23], [GMASK, SOP, 11, 12]]
FAMILY = pytest.mark.parametrize("family", CONFIGS)
ATTENTION = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def base(family, attention="sdpa", dtype=torch.float32):
    torch.manual_seed(0)
    config = CONFIGS[family].__class__(**CONFIGS[family].to_dict())
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.to(dtype)


def tuned(family, attention="sdpa", dtype=torch.float32, names=("a",)):
    """A model with prefixes of 3, 4, ... tokens, the first of them in use."""
    model = base(family, attention, dtype)
    for index, name in enumerate(names):
        config = PrefixTuningConfig(num_virtual_tokens=3 + index, prefix_dropout=0.0)
        add_adapter(model, config, name)
    set_adapter(model, names[0])
    return model.eval()


def padded(rows, side, fill=PAD, extra=2):
    length = max(map(len, rows)) + extra
    pads = [[fill] * (length - len(row)) for row in rows]
    both = zip(pads, rows, strict=True) if side == "left" else zip(rows, pads, strict=True)
    return torch.tensor([first + second for first, second in both])


def mask_of(rows, side, extra=2):
    return padded([[1] * len(row) for row in rows], side, 0, extra)


@FAMILY
@ATTENTION
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_each_row_alone(family, attention, side):
    model = tuned(family, attention)
    mask = mask_of(ROWS, side)
    with torch.no_grad():
        together = model(padded(ROWS, side), attention_mask=mask).logits
        for logits, ids, seen in zip(together, ROWS, mask.bool(), strict=True):
            alone = model(torch.tensor([ids])).logits[0]
            assert_close(logits[seen], alone, rtol=0, atol=1e-4)
        with disable_adapters(model):
            assert not torch.allclose(model(torch.tensor(ROWS[:1])).logits[0], alone[:1], atol=0.1)


@FAMILY
@ATTENTION
def test_each_row_has_its_own_prefix_or_none(family, attention):
    model = tuned(family, attention, names=("a", "b"))
    rows = ["b", None, "a"]
    set_adapter(model, rows)
    for side in ("left", "right"):
        mask = mask_of(ROWS, side)
        with torch.no_grad():
            set_adapter(model, rows)
            together = model(padded(ROWS, side), attention_mask=mask).logits
            for name, logits, ids, seen in zip(rows, together, ROWS, mask.bool(), strict=True):
                set_adapter(model, name)
                alone = model(torch.tensor([ids])).logits[0]
                assert_close(logits[seen], alone, rtol=0, atol=1e-4)
    set_adapter(model, rows)
    with pytest.raises(UserError, match=r"batch=2 and 3 names"):
        model(torch.tensor([[5, GMASK, SOP]] * 2))


@FAMILY
@pytest.mark.parametrize("names", [["a"], ["b", None, "a"]])
def test_cached_equals_uncached_with_beams_and_a_static_cache(family, names):
    model = tuned(family, names=("a", "b"))
    set_adapter(model, names if len(names) > 1 else names[0])
    prompts = [row[: row.index(SOP) + 1] for row in ROWS]
    inputs = {"input_ids": padded(prompts, "left"), "attention_mask": mask_of(prompts, "left")}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": [-1], "pad_token_id": PAD}
    options |= {"disable_compile": True}
    for beams in (1, 2):
        plain = model.generate(**inputs, **options, num_beams=beams, use_cache=False)
        cached = model.generate(**inputs, **options, num_beams=beams)
        assert cached.tolist() == plain.tolist()
    plain = model.generate(**inputs, **options, use_cache=False)
    static = model.generate(**inputs, **options, cache_implementation="static")
    assert static.tolist() == plain.tolist()


@FAMILY
@ATTENTION
def test_row_of_padding_alone_is_finite(family, attention):
    model = tuned(family, attention)
    mask = torch.tensor([[1] * 9, [0] * 9])
    ids = torch.tensor([ROWS[0], [PAD] * 9])
    labels = torch.where(mask.bool(), ids, -100)
    outputs = model(ids, attention_mask=mask, labels=labels)
    outputs.loss.backward()
    assert outputs.logits.isfinite().all()
    assert encoder_of(model, "a").embedding.weight.grad.isfinite().all()


@FAMILY
@ATTENTION
def test_gradient_reaches_keys_and_values_of_every_layer_through_checkpointing(family, attention):
    model = tuned(family, attention).train()
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    weight = encoder_of(model, "a").embedding.weight
    ids, mask = padded(ROWS, "right"), mask_of(ROWS, "right")
    batch = {"input_ids": ids, "attention_mask": mask}
    batch["labels"] = torch.where(mask.bool(), ids, -100)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        weight.grad = None
        model(**batch).loss.backward()
        gradients.append(weight.grad.clone())
    assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6)
    of_layers = gradients[0].view(3, 2, 2, -1)  # token, layer, key or value, channel
    assert (of_layers.abs().amax(-1) > 1e-7).all()
    torch.optim.AdamW(model.parameters()).step()
    assert all(p.grad is None for name, p in model.named_parameters() if name in before)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def packed(as_mask):
    """Examples one after another in a row: ids, block-diagonal mask [1, 1, S, S], positions that begin anew."""
    segment = torch.tensor([i for i, row in enumerate(ROWS) for _ in row])
    visible = (segment[:, None] == segment).tril()[None, None]
    if as_mask == "float":
        visible = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    positions = torch.tensor([[i for row in ROWS for i in range(len(row))]])
    ids = torch.tensor([[token for row in ROWS for token in row]])
    return {"input_ids": ids, "attention_mask": visible, "position_ids": positions}


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize(
    ("attention", "as_mask"), [("eager", "float"), ("sdpa", "float"), ("sdpa", "boolean")]
)
def test_four_dimensional_mask_and_given_positions_are_kept(family, attention, as_mask):
    """So a packed row gives what its examples give alone. (Eager attention adds its mask, so it takes numbers only.)"""
    model = tuned(family, attention)
    weight = encoder_of(model, "a").embedding.weight
    together = model(**packed(as_mask)).logits[0]
    together.square().sum().backward()
    gradient, weight.grad = weight.grad, None
    alone = torch.cat([model(torch.tensor([row])).logits[0] for row in ROWS])
    assert_close(together, alone, rtol=0, atol=1e-4)
    alone.square().sum().backward()
    assert_close(gradient, weight.grad, rtol=0, atol=1e-5 * weight.grad.abs().max().item())


@ATTENTION
def test_packed_row_of_chatglm_6b(attention):
    model = tuned("chatglm", attention)
    weight = encoder_of(model, "a").embedding.weight
    segments = [i for i, row in enumerate(ROWS, 1) for _ in row]
    ids = [token for row in ROWS for token in row]
    labels = [t if i > row.index(SOP) else -100 for row in ROWS for i, t in enumerate(row)]
    packed_loss = model(
        torch.tensor([[*ids, PAD]]),
        attention_mask=torch.tensor([[*segments, 0]]),
        labels=torch.tensor([[*labels, -100]]),
    ).loss
    packed_loss.backward()
    gradient, weight.grad = weight.grad, None
    apart = [[t if i > row.index(SOP) else -100 for i, t in enumerate(row)] for row in ROWS]
    loss = model(
        padded(ROWS, "right"),
        attention_mask=mask_of(ROWS, "right"),
        labels=padded(apart, "right", -100),
    ).loss
    loss.backward()
    assert_close(packed_loss, loss, rtol=1e-5, atol=0)
    assert_close(gradient, weight.grad, rtol=0, atol=1e-5 * weight.grad.abs().max().item())


@FAMILY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prefix_stays_in_float32_beside_a_half_precision_base(family, dtype):
    model = tuned(family, dtype=dtype)
    ids = torch.tensor(ROWS[:1])
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    weight = encoder_of(model, "a").embedding.weight
    assert (outputs.logits.dtype, weight.dtype, weight.grad.dtype) == (dtype, *[torch.float32] * 2)
    assert weight.grad.abs().max() > 0


@FAMILY
@pytest.mark.parametrize("projection", [False, True])
def test_saved_and_loaded(family, projection, tmp_path):
    model = base(family)
    add_adapter(model, PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=projection))
    save_adapter(model, tmp_path)
    other = base(family)
    load_adapter(other, tmp_path, "again")
    ids = torch.tensor(ROWS[:1])
    with torch.no_grad():
        assert_close(other(ids).logits, model.eval()(ids).logits, rtol=0, atol=0)
    assert not any(p.requires_grad for p in encoder_of(other, "again").parameters())


@pytest.mark.parametrize("start", ["transformer.prefix_encoder.", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("family", ["chatglm", "glm"])
def test_released_prefix_is_read(family, projection, dtype, start, tmp_path):
    model = base(family)
    add_adapter(model, PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=projection))
    own = encoder_of(model, "default").state_dict()
    state = {f"{start}{key}": value.to(dtype) for key, value in own.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    other = base(family)
    load_adapter(other, tmp_path)
    read = encoder_of(other, "default").state_dict()
    assert read.keys() == own.keys()
    for key, value in own.items():
        assert read[key].dtype == torch.float32
        assert torch.equal(read[key], value.to(dtype).float())


def test_prefix_for_another_base_is_one_sentence_and_changes_nothing(tmp_path):
    save_adapter(tuned("llama"), tmp_path, "a")
    model = base("chatglm")
    with pytest.raises(UserError, match="must fit its base model") as caught:
        load_adapter(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert prefix_tuning_of(model) is None
    assert model.config._attn_implementation == "sdpa"


@FAMILY
def test_switch_disable_and_delete(family):
    plain, model = base(family), tuned(family, names=("a", "b"))
    ids = torch.tensor(ROWS[:1])
    with torch.no_grad():
        expected, a = plain(ids).logits, model(ids).logits
        set_adapter(model, "b")
        b = model(ids).logits
        with disable_adapters(model):
            assert_close(model(ids).logits, expected, rtol=0, atol=0)
        assert_close(model(ids).logits, b, rtol=0, atol=0)
        assert (a - b).abs().max() > 0.01
        delete_adapter(model, "b")
        assert_close(model(ids).logits, expected, rtol=0, atol=0)
        set_adapter(model, "a")
        assert_close(model(ids).logits, a, rtol=0, atol=0)
        delete_adapter(model, "a")
        assert_close(model(ids).logits, expected, rtol=0, atol=0)
    assert model.config._attn_implementation == "sdpa"
    assert not list_adapters(model)
    assert not any("prefix" in name for name, _ in model.named_modules())


def test_add_that_fails_leaves_the_model_as_it_was():
    model = base("glm")
    wrong = PrefixTuningConfig(num_virtual_tokens=3, num_layers=7)
    with pytest.raises(UserError, match="num_layers=7"):
        add_adapter(model, wrong)
    assert prefix_tuning_of(model) is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match="num_virtual_tokens must be at least 1"):
        PrefixTuningConfig(num_virtual_tokens=0)


@FAMILY
def test_arguments_by_position_are_those_by_name(family):
    model = tuned(family)
    decoder = model.get_decoder()
    ids = torch.tensor(ROWS[:1])
    positions = torch.arange(ids.shape[1])[None]
    if family == "chatglm":
        positions = decoder.get_position_ids(ids)
    whole = decoder(ids, None, positions).last_hidden_state
    cache = decoder(ids[:, :-1], None, positions[..., :-1], use_cache=True).past_key_values
    step = decoder(ids[:, -1:], torch.ones_like(ids), positions[..., -1:], cache).last_hidden_state
    assert_close(step, whole[:, -1:], atol=1e-5, rtol=0)


@FAMILY
def test_attention_chosen_later_takes_the_prefix_too(family):
    model = tuned(family)
    ids = torch.tensor(ROWS[:1])
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    outputs = model(ids, output_attentions=True)
    assert_close(outputs.logits, expected, atol=1e-5, rtol=0)
    assert outputs.attentions[0].shape[-1] == 3 + ids.shape[1]
    delete_adapter(model, "a")
    assert model.config._attn_implementation == "eager"


@torch.inference_mode()
def test_loaded_under_inference_mode(tmp_path):
    save_adapter(tuned("llama"), tmp_path, "a")
    model = base("llama")
    load_adapter(model, tmp_path)
    ids = torch.tensor(ROWS[:1])
    assert_close(model(ids).logits, tuned("llama")(ids).logits, atol=0, rtol=0)


@torch.no_grad()
def test_compiled_in_one_graph():
    ids = torch.tensor(ROWS[:1])
    compiled = torch.compile(tuned("glm"), backend="eager", fullgraph=True)
    expected = tuned("glm")(ids).logits
    assert_close(compiled(ids, use_cache=False).logits, expected, atol=1e-5, rtol=0)

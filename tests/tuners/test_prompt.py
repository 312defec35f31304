"""Soft prompts: what they do on every family, and that peft means the same by its files."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.p_tuning import PromptEncoder as PeftPromptEncoder
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.models.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.training.packed_rows import examples_apart
from chatglm_ptuning.tuners import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    add_adapter,
    delete_adapter,
    disable_adapters,
    load_adapter,
    save_adapter,
    set_adapter,
)
from chatglm_ptuning.tuners.prompt import encoder_of
from chatglm_ptuning.tuners.prompt_encoder import PromptEncoder
from tests.checkpoints import tiny_model

TEXT = [7, 9, 5, 11, 6]
GMASK, SOP, PAD = 2001, 2004, 3  # of the tiny ChatGLM-6B; elsewhere tokens like others
ROWS = [[5, 6, 7, 8, GMASK, SOP, 9, 10], [17, 5, GMASK, SOP, 9], [12, 8, 15, GMASK, SOP, 4]]


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=2016, initializer_range=0.2, **sizes, **heads)
    ).eval()


MODELS = {
    "chatglm": lambda: tiny_model("chatglm"),
    "glm": lambda: tiny_model("chatglm3"),
    "llama": llama,
}
FAMILY = pytest.mark.parametrize("family", MODELS)
CONFIGS: dict[str, Any] = {
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=5),
    "mlp": PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=12),
    "lstm": PromptEncoderConfig(3, encoder_reparameterization_type="LSTM", encoder_hidden_size=12),
}


def text_config(length: int = len(TEXT), ids: list[int] | None = TEXT) -> PromptTuningConfig:
    return PromptTuningConfig(
        length, prompt_tuning_init="TEXT", prompt_tuning_init_text="text", init_token_ids=ids
    )


def with_text(family: str) -> PreTrainedModel:
    """A model whose soft prompt is TEXT."""
    model = MODELS[family]()
    add_adapter(model, text_config())
    return model.eval()


def padded(rows: list[list[int]], side: str, fill: int = PAD) -> Tensor:
    longest = max(map(len, rows)) + 1
    pads = [[fill] * (longest - len(row)) for row in rows]
    both = zip(pads, rows, strict=True) if side == "left" else zip(rows, pads, strict=True)
    return torch.tensor([first + second for first, second in both])


def mask_of(rows: list[list[int]], side: str) -> Tensor:
    return padded([[1] * len(row) for row in rows], side, fill=0)


@torch.no_grad()
def alone(model: PreTrainedModel, row: list[int], text: list[int] = TEXT) -> Tensor:
    """Logits of a row behind real tokens."""
    with disable_adapters(model):
        return model(torch.tensor([text + row])).logits[0, len(text) :]


@FAMILY
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_a_text_as_prompt_is_the_text_in_front(family: str, side: str, attention: str) -> None:
    model = with_text(family)
    model.set_attn_implementation(attention)
    ids, mask = padded(ROWS, side), mask_of(ROWS, side)
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert logits.shape[:2] == ids.shape
    for row, row_logits, seen in zip(ROWS, logits, mask.bool(), strict=True):
        assert_close(row_logits[seen], alone(model, row), rtol=0, atol=1e-4)


@FAMILY
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generated_tokens_are_those_behind_the_text(family: str, beams: int) -> None:
    model = with_text(family)
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    rows = [row[:-2] for row in ROWS] if family != "chatglm" else [row[:-1] for row in ROWS]
    ids, mask = padded(rows, "left"), mask_of(rows, "left")
    together = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    without = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(together, without[:, ids.shape[1] :])
    for row, answer in zip(rows, together, strict=True):
        single = torch.tensor([row])
        own = model.generate(input_ids=single, **settings)  # without padding, so without a mask
        assert torch.equal(own[0, len(row) :], answer)
        with disable_adapters(model):
            text = torch.tensor([TEXT + row])
            expected = model.generate(input_ids=text, **settings)[0, text.shape[1] :]
        assert torch.equal(answer, expected)


@FAMILY
def test_packed_row_is_its_examples(family: str) -> None:
    model = with_text(family)
    weight = encoder_of(model, "default").embedding.weight
    ids = torch.tensor([[*(token for row in ROWS for token in row), PAD], [*ROWS[0], *[PAD] * 12]])
    numbers = [number for number, row in enumerate(ROWS, 1) for _ in row]
    mask = torch.tensor([[*numbers, 0], [*[1] * 8, *[0] * 12]])
    logits = model(input_ids=ids, attention_mask=mask).logits
    together = torch.cat((logits[0, :-1], logits[1, :8]))
    apart = torch.cat([model(torch.tensor([row])).logits[0] for row in [*ROWS, ROWS[0]]])
    assert_close(together, apart, rtol=0, atol=1e-4)
    (expected,) = torch.autograd.grad(apart.square().sum(), weight)
    (gradient,) = torch.autograd.grad(together.square().sum(), weight)
    assert_close(gradient, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@FAMILY
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_every_row_has_its_own(family: str, beams: int) -> None:
    """Two soft prompts of different lengths, a prefix and none, in one left-padded batch, generation included."""
    model = MODELS[family]()
    add_adapter(model, text_config(), "a")
    add_adapter(model, PromptEncoderConfig(num_virtual_tokens=2), "b")
    add_adapter(model, PrefixTuningConfig(num_virtual_tokens=3, prefix_dropout=0), "p")
    model.eval()
    rows, names = [*ROWS, ROWS[0]], ["a", "b", "p", None]
    rows = [row[: row.index(SOP) + 1] for row in rows]
    ids, mask = padded(rows, "left"), mask_of(rows, "left")
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    set_adapter(model, names)
    logits = model(input_ids=ids, attention_mask=mask).logits
    answers = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    for row, name, row_logits, answer in zip(rows, names, logits, answers, strict=True):
        set_adapter(model, name)
        single = torch.tensor([row])
        assert_close(row_logits[-len(row) :], model(single).logits[0], rtol=0, atol=1e-4)
        assert torch.equal(answer, model.generate(input_ids=single, **settings)[0, len(row) :])
    set_adapter(model, ["a", "b"])
    with pytest.raises(UserError, match="multiple of as many rows"):
        model(input_ids=ids[:3])


@FAMILY
@torch.no_grad()
def test_packed_rows_have_their_own(family: str) -> None:
    """As they are trained: where positions alone part the examples, so must they part what a shorter prompt leaves."""
    model = MODELS[family]()
    add_adapter(model, text_config(), "a")
    add_adapter(model, PromptEncoderConfig(num_virtual_tokens=2), "b")
    model.eval()
    set_adapter(model, ["a", "b", None])
    first, second = (torch.tensor([row] * 3) for row in ROWS[:2])
    mask = torch.tensor([[1] * len(ROWS[0]) + [2] * len(ROWS[1])] * 3)
    inputs = {"input_ids": torch.cat((first, second), dim=1), "attention_mask": mask}
    with examples_apart(model, inputs) as given:
        together = model(**given).logits
    apart = torch.cat((model(first).logits, model(second).logits), dim=1)
    assert_close(together, apart, rtol=0, atol=1e-4)


@FAMILY
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_prompt_alone_learns(family: str, kind: str) -> None:
    model = MODELS[family]()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    add_adapter(model, CONFIGS[kind])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained == list(encoder_of(model, "default").parameters())
    optimizer = torch.optim.Adam(trained, lr=0.01)
    ids, mask = padded(ROWS, "right"), mask_of(ROWS, "right")
    labels = ids.masked_fill(mask == 0, -100)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name])


@FAMILY
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    model = with_text(family).train()
    weight, ids = encoder_of(model, "default").embedding.weight, torch.tensor(ROWS[:1])
    (expected,) = torch.autograd.grad(model(ids, labels=ids).loss, weight)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    (gradient,) = torch.autograd.grad(model(ids, labels=ids).loss, weight)
    assert_close(gradient, expected, rtol=0, atol=1e-6)


@FAMILY
@torch.no_grad()
def test_hidden_states_are_the_tokens(family: str) -> None:
    model, ids = with_text(family), torch.tensor(ROWS[:1])
    states = model(ids, output_hidden_states=True).hidden_states
    with disable_adapters(model):
        behind = model(torch.tensor([TEXT + ROWS[0]]), output_hidden_states=True).hidden_states
    for own, expected in zip(states, behind, strict=True):
        assert_close(own, expected[:, len(TEXT) :], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("length", "ids"), [(3, TEXT[:3]), (12, [*TEXT, *TEXT, *TEXT[:2]])])
def test_a_text_is_repeated_or_cut(length: int, ids: list[int]) -> None:
    model = MODELS["glm"]()
    add_adapter(model, text_config(length))
    expected = model.get_input_embeddings().weight[ids]
    assert_close(encoder_of(model, "default").embedding.weight, expected, rtol=0, atol=0)


def test_sampled_tokens_are_tokens() -> None:
    model = MODELS["glm"]()
    add_adapter(model, PromptTuningConfig(3, prompt_tuning_init="SAMPLE_VOCAB"))
    table, prompt = model.get_input_embeddings().weight, encoder_of(model, "default")()
    assert (prompt[:, None] == table).all(-1).any(-1).all()


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_encoder_is_pefts(kind: str) -> None:
    shape = {"num_virtual_tokens": 4, "token_dim": 16, "encoder_hidden_size": 12}
    shape["encoder_reparameterization_type"] = kind
    ours = PromptEncoder(PromptEncoderConfig(**shape))
    theirs = PeftPromptEncoder(peft.PromptEncoderConfig(num_transformer_submodules=1, **shape))
    theirs.load_state_dict(ours.state_dict())
    assert_close(ours(), theirs(torch.arange(4)[None])[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [*CONFIGS, "text"])
@torch.no_grad()
def test_peft_reads_ours(kind: str, tmp_path: Path) -> None:
    model = MODELS["glm"]()
    add_adapter(model, CONFIGS[kind] if kind != "text" else text_config())
    save_adapter(model.eval(), tmp_path)
    ids, mask = padded(ROWS, "right"), mask_of(ROWS, "right")
    other = peft.PeftModel.from_pretrained(MODELS["glm"](), str(tmp_path))
    size = other.active_peft_config.num_virtual_tokens
    theirs = other(input_ids=ids, attention_mask=mask).logits[:, size:]
    ours = model(input_ids=ids, attention_mask=mask).logits
    assert_close(ours[mask > 0], theirs[mask > 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_ours_reads_pefts(kind: str, tmp_path: Path) -> None:
    cls = peft.PromptTuningConfig if kind == "prompt tuning" else peft.PromptEncoderConfig
    settings = {key: value for key, value in vars(CONFIGS[kind]).items() if value is not None}
    other = peft.get_peft_model(MODELS["glm"](), cls(task_type="CAUSAL_LM", **settings)).eval()
    for (
        parameter
    ) in other.prompt_encoder.parameters():  # else a fresh encoder of ours may have drawn the same
        parameter.data += torch.randn_like(parameter)
    other.save_pretrained(tmp_path)
    model = MODELS["glm"]()
    load_adapter(model, tmp_path)
    ids, mask = padded(ROWS, "right"), mask_of(ROWS, "right")
    theirs = other(input_ids=ids, attention_mask=mask).logits[:, settings["num_virtual_tokens"] :]
    ours = model(input_ids=ids, attention_mask=mask).logits
    assert_close(ours[mask > 0], theirs[mask > 0], rtol=0, atol=1e-5)


@FAMILY
@pytest.mark.parametrize("kind", [*CONFIGS, "text"])
@torch.no_grad()
def test_saved_and_loaded_is_the_same(family: str, kind: str, tmp_path: Path) -> None:
    model, ids = MODELS[family](), torch.tensor(ROWS[:1])
    add_adapter(model, CONFIGS[kind] if kind != "text" else text_config())
    save_adapter(model.eval(), tmp_path / "one")
    other = MODELS[family]()
    load_adapter(other, tmp_path / "one", "other")
    assert_close(other(ids).logits, model(ids).logits, rtol=0, atol=0)
    save_adapter(other, tmp_path / "two", "other")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    configs = [
        json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("one", "two")
    ]
    assert configs[0] == configs[1]
    has_encoder = any(key.startswith("prompt_encoder.") for key in one)
    assert has_encoder == (kind in ("mlp", "lstm"))


@torch.no_grad()
def test_gathered_values_are_saved(tmp_path: Path) -> None:
    """Under ZeRO-3 the parameters themselves are empty: the values come by name, the vectors are made of them."""
    model = MODELS["glm"]()
    add_adapter(model, CONFIGS["lstm"])
    trained = {n: torch.randn_like(p) for n, p in model.named_parameters() if p.requires_grad}
    save_adapter(model, tmp_path, trained=trained)
    encoder, saved = encoder_of(model, "default"), load_file(tmp_path / "adapter_model.safetensors")
    encoder.load_state_dict({n.split("default.")[1]: value for n, value in trained.items()})
    assert_close(saved["prompt_embeddings"], encoder(), rtol=0, atol=1e-6)


def test_vectors_are_saved_without_dropout_and_trained_in_float32(tmp_path: Path) -> None:
    model = MODELS["glm"]().to(torch.bfloat16).train()
    shape = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8}
    add_adapter(model, PromptEncoderConfig(3, encoder_dropout=0.5, **shape))
    model(torch.tensor(ROWS[:1]), labels=torch.tensor(ROWS[:1])).loss.backward()
    encoder = encoder_of(model, "default")
    assert {parameter.grad.dtype for parameter in encoder.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder().dtype == torch.float32
    save_adapter(model, tmp_path)
    assert encoder.training
    saved = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    assert_close(saved, encoder.eval()().detach(), rtol=0, atol=1e-6)


def test_last_one_taken_away_leaves_the_base() -> None:
    model, ids = with_text("glm"), torch.tensor(ROWS[:1])
    add_adapter(model, PromptTuningConfig(2), "b")
    with disable_adapters(model):
        expected = model(ids).logits
    delete_adapter(model, "default")
    delete_adapter(model, "b")
    decoder = model.get_decoder()
    assert not decoder._forward_pre_hooks
    assert not decoder._forward_hooks
    assert_close(model(ids).logits, expected, rtol=0, atol=0)


@torch.no_grad()
def test_lora_beside_it_counts_only_when_used() -> None:
    model, ids = with_text("glm"), torch.tensor(ROWS[:1])
    expected = model(ids).logits
    add_adapter(model, LoraConfig(init_lora_weights=False), "lora")
    assert (model(ids).logits - expected).abs().max() > 0.01
    set_adapter(model, "default")
    assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


def cached(model: PreTrainedModel) -> DynamicCache:
    return model(torch.tensor([[5, 6]]), use_cache=True).past_key_values


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: m(torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 1, 2, 2)),
            r"attention_mask must be \[batch, tokens\]",
        ),
        (
            lambda m: m.generate(torch.tensor([[5]]), cache_implementation="static"),
            "the cache must be able to grow",
        ),
        (
            lambda m: m(
                torch.tensor([[7]]), attention_mask=torch.ones(1, 8), past_key_values=cached(m)
            ),
            "attention_mask must cover the tokens of the cache",
        ),
        (lambda m: add_adapter(m, text_config(ids=None), "b"), "init_token_ids must be the ids"),
        (lambda m: add_adapter(m, PromptTuningConfig(2, token_dim=7), "b"), "got token_dim=7 in"),
    ],
)
def test_one_sentence_where_it_does_not_fit(call: Any, message: str) -> None:
    model = with_text("glm")
    with pytest.raises(UserError, match=message):
        call(model)


@FAMILY
def test_the_cache_of_an_earlier_answer_is_refused(family: str) -> None:
    """`generate()` would take the prompt's length for that of tokens, and run on others than the new ones."""
    model, settings = with_text(family), {"max_new_tokens": 4, "eos_token_id": None}
    first = model.generate(torch.tensor(ROWS[:1]), return_dict_in_generate=True, **settings)
    ids = torch.cat((first.sequences, torch.tensor([[7, 8]])), dim=1)
    with pytest.raises(UserError, match="give the whole conversation anew, without a cache"):
        model.generate(ids, past_key_values=first.past_key_values, **settings)


def test_one_position_axis_is_refused() -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "num_layers": 1, "num_attention_heads": 4}
    config = ChatGLMConfig(position_encoding_2d=False, tie_word_embeddings=False, **shape)
    with pytest.raises(UserError, match="position_encoding_2d must be true for a soft prompt"):
        add_adapter(ChatGLMForConditionalGeneration(config), PromptTuningConfig(2))


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    model = MODELS["glm"]()
    add_adapter(model, CONFIGS["mlp"])
    save_adapter(model, tmp_path)
    add_adapter(model, CONFIGS["lstm"], "b")
    with pytest.raises(UserError, match="the saved soft prompt must hold"):
        load_adapter(model, tmp_path, "b")


@pytest.mark.parametrize("family", ["chatglm", "glm"])
@torch.no_grad()
def test_embeddings_instead_of_ids(family: str) -> None:
    model, ids = with_text(family), torch.tensor(ROWS[:1])
    embeddings, positions = model.get_input_embeddings()(ids), None
    if family == "chatglm":
        with pytest.raises(UserError, match="position_ids must be given with inputs_embeds"):
            model(inputs_embeds=embeddings)
        positions = model.get_decoder().get_position_ids(ids)
    logits = model(inputs_embeds=embeddings, position_ids=positions).logits
    assert_close(logits, model(ids).logits, rtol=0, atol=1e-6)
    step = model.get_decoder()(ids, None, None, None, None, True)
    assert step.past_key_values is not None

"""LoRA and its relatives against plain peft, merged weights and fused released modules."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.training.adalora import AdaLoraSteps
from chatglm_ptuning.training.trainer import AdapterTrainer
from chatglm_ptuning.tuners import (
    add_adapter,
    combine_adapters,
    delete_adapter,
    disable_adapters,
    list_adapters,
    load_adapter,
    merge_adapter,
    merged_adapter,
    save_adapter,
)
from chatglm_ptuning.tuners import lora as kind
from tests.training.conftest import MODELS, train  # noqa: F401 - a fixture

IDS = torch.randint(4, 60, (3, 7), generator=torch.Generator().manual_seed(0))
EMBEDDINGS = {"chatglm": "word_embeddings", "glm": "embed_tokens"}
CONFIGS: dict[str, Callable[[str], Any]] = {
    "lora": lambda family: LoraConfig(r=4),
    "all-linear rslora": lambda family: LoraConfig(
        r=4, use_rslora=True, target_modules="all-linear"
    ),
    "dora": lambda family: LoraConfig(r=4, use_dora=True),
    "head": lambda family: LoraConfig(r=4, modules_to_save=["lm_head"]),
    "embeddings": lambda family: LoraConfig(r=4, target_modules=[EMBEDDINGS[family]]),
    "adalora": lambda family: AdaLoraConfig(init_r=6, target_r=3, total_step=100, lora_alpha=64),
    "ia3": lambda family: IA3Config(),
}


def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def shake(model: PreTrainedModel, name: str, seed: int = 1) -> None:
    """Move every trained value: nothing hides behind LoRA's zeros or IA3's ones."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in kind.parameters(model, name):
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3


def tuned(family: str, method: str) -> tuple[PreTrainedModel, Tensor]:
    model = MODELS[family]().eval()
    add_adapter(model, CONFIGS[method](family), "own")
    shake(model, "own")
    return model, logits(model)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", CONFIGS)
def test_fresh_adapter_changes_nothing_and_freezes_the_base(family: str, method: str) -> None:
    model = MODELS[family]().eval()
    base = logits(model)
    add_adapter(model, CONFIGS[method](family), "own")
    assert_close(logits(model), base, atol=1e-6, rtol=0)
    own = {id(parameter) for parameter in kind.parameters(model, "own")}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", CONFIGS)
def test_peft_reads_what_is_saved_and_the_reverse(family: str, method: str, tmp_path: Path) -> None:
    model, expected = tuned(family, method)
    save_adapter(model, tmp_path / "ours", "own")
    theirs = PeftModel.from_pretrained(MODELS[family]().eval(), tmp_path / "ours")
    assert_close(logits(theirs), expected, atol=1e-6, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    again = MODELS[family]().eval()
    load_adapter(again, tmp_path / "theirs", "again")
    assert_close(logits(again), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", CONFIGS)
def test_merged_equals_unmerged(family: str, method: str) -> None:
    model, expected = tuned(family, method)
    base = MODELS[family]().eval()
    kept = {name: p.detach().clone() for name, p in base.named_parameters()}
    with merged_adapter(model, "own"):
        assert_close(logits(model), expected, atol=1e-4, rtol=0)
    assert_close(logits(model), expected, atol=1e-4, rtol=0)
    merge_adapter(model, "own")
    assert list_adapters(model) == {}
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert_close(logits(model), expected, atol=1e-4, rtol=0)
    assert any(not torch.equal(p, kept[n]) for n, p in model.named_parameters() if n in kept)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", CONFIGS)
def test_training_moves_the_adapter_only(
    family: str,
    method: str,
    train: Callable[..., AdapterTrainer],  # noqa: F811
    tmp_path: Path,
) -> None:
    model = MODELS[family]()
    before = {id(p): p.detach().clone() for p in model.parameters()}
    add_adapter(model, CONFIGS[method](family), "own")
    steps = [AdaLoraSteps(model, "own")] if method == "adalora" else []
    run = train(
        model,
        adapter_name="own",
        callbacks=steps,
        max_steps=20,
        learning_rate=0.3 if method == "ia3" else 3e-2,
        lr_scheduler_type="constant",
    )
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    for parameter in model.parameters():
        if id(parameter) in before:
            assert torch.equal(parameter, before[id(parameter)])
    model.eval()
    save_adapter(model, tmp_path / "own", "own")
    fresh = MODELS[family]().eval()
    load_adapter(fresh, tmp_path / "own", "own")
    assert_close(logits(fresh), logits(model), atol=1e-5, rtol=0)


def test_adalora_gives_up_ranks(train: Callable[..., AdapterTrainer]) -> None:  # noqa: F811
    model = MODELS["glm"]()
    config = AdaLoraConfig(init_r=4, target_r=1, tinit=2, tfinal=4, deltaT=5, total_step=12)
    add_adapter(model, config, "own")
    train(model, adapter_name="own", callbacks=[AdaLoraSteps(model, "own")], max_steps=12)
    left = [
        (p != 0).sum().item()
        for inside, _, p in kind.placed_parameters(model, "own")
        if ".lora_E." in inside
    ]
    assert sum(left) == 1 * len(left)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3"])
def test_resumed_run_is_the_run_that_was_not_stopped(
    method: str,
    train: Callable[..., AdapterTrainer],  # noqa: F811
) -> None:
    config = (
        AdaLoraConfig(init_r=4, target_r=1, tinit=1, tfinal=2, deltaT=1, total_step=10)
        if method == "adalora"
        else CONFIGS[method]("glm")
    )
    states = []
    for resume in (None, "checkpoint-5"):
        model = MODELS["glm"]()
        add_adapter(model, config, "own")
        steps = [AdaLoraSteps(model, "own")] if method == "adalora" else []
        run = train(
            model,
            start=False,
            adapter_name="own",
            callbacks=steps,
            max_steps=10,
            save_strategy="steps",
            save_steps=5,
        )
        run.train(resume_from_checkpoint=resume and f"{run.args.output_dir}/{resume}")
        states.append(kind.tensors(model, "own", None))
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value)


def test_adalora_penalty_is_the_gradient_of_the_distance() -> None:
    from chatglm_ptuning.tuners.adalora import RankBudget

    model = MODELS["glm"]()
    add_adapter(model, AdaLoraConfig(init_r=3, total_step=10, orth_reg_weight=0.5), "own")
    shake(model, "own")
    theirs = get_peft_model(
        MODELS["glm"](),
        AdaLoraConfig(
            task_type="CAUSAL_LM",  # else peft leaves the penalty out
            target_modules=["q_proj", "k_proj", "v_proj"],
            init_r=3,
            total_step=10,
            orth_reg_weight=0.5,
        ),
    )
    ours = kind.tensors(model, "own", None)
    theirs.load_state_dict({k + ".default": v for k, v in ours.items()}, strict=False)
    theirs.eval()
    theirs(input_ids=IDS, labels=IDS).loss.backward()
    plain = {n: p.grad.clone() for n, p in theirs.named_parameters() if p.requires_grad}
    model.eval()
    model(input_ids=IDS, labels=IDS).loss.backward()
    RankBudget(model, "own", {}).add_penalty()
    for _, saved, parameter in kind.placed_parameters(model, "own"):
        assert_close(parameter.grad, plain[saved + ".default"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", [m for m in CONFIGS if m != "all-linear rslora"])
def test_half_base_beside_float32_adapter(family: str, method: str) -> None:
    model = MODELS[family]().to(torch.bfloat16)
    add_adapter(model, CONFIGS[method](family), "own")
    shake(model, "own")
    assert {p.dtype for p in kind.parameters(model, "own")} == {torch.float32}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in kind.parameters(model, "own"))
    model.eval()
    whole = model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert whole.shape == (3, 10)


def test_a_merge_that_fails_leaves_the_base_as_it_was() -> None:
    model, _ = tuned("glm", "lora")
    kind.parameters(model, "own")[-1].data[0, 0] = torch.nan
    with pytest.raises(UserError, match="merged weights must be finite"):
        merge_adapter(model, "own")
    delete_adapter(model, "own")
    assert_close(logits(model), logits(MODELS["glm"]().eval()), atol=1e-5, rtol=0)


def test_tied_head_is_separate_after_a_merge_into_it() -> None:
    model = MODELS["chatglm"]().eval()
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    table = model.lm_head.weight.detach().clone()
    add_adapter(model, CONFIGS["embeddings"]("chatglm"), "own")
    shake(model, "own")
    expected = logits(model)
    merge_adapter(model, "own")
    assert torch.equal(model.lm_head.weight, table)
    assert not model.config.tie_word_embeddings
    assert_close(logits(model), expected, atol=1e-5, rtol=0)


def two_loras(ranks: tuple[int, int]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Native Glm with LoRAs a and b, and each one's difference of weights by place."""
    model = MODELS["glm"]().eval()
    deltas = {}
    for seed, (name, r) in enumerate(zip("ab", ranks, strict=True)):
        add_adapter(model, LoraConfig(r=r, lora_alpha=2 * r), name)
        shake(model, name, seed)
        for path, layer in model.named_modules():
            if kind.is_peft_layer(layer):
                deltas[f"{name} {path}"] = layer.get_delta_weight(name).detach()
    return model, deltas


@pytest.mark.parametrize(
    ("method", "ranks"), [("cat", (2, 3)), ("svd", (2, 3)), ("linear", (3, 3))]
)
def test_combined_loras(method: str, ranks: tuple[int, int]) -> None:
    model, deltas = two_loras(ranks)
    trained = [p for p in model.parameters() if p.requires_grad]
    combine_adapters(model, ["a", "b"], [0.5, -2.0], "sum", method)
    assert [p for p in model.parameters() if p.requires_grad] == trained
    for path, layer in model.named_modules():
        if not kind.is_peft_layer(layer):
            continue
        own, exact = (
            layer.get_delta_weight("sum"),
            0.5 * deltas[f"a {path}"] - 2 * deltas[f"b {path}"],
        )
        if method == "cat":
            assert_close(own, exact, atol=1e-5, rtol=0)
        elif method == "svd":
            u, s, v = torch.linalg.svd(exact)
            best = u[:, :3] * s[:3] @ v[:3]
            assert_close(own, best, atol=1e-4, rtol=0)
        else:
            assert own.shape == exact.shape
            assert layer.r["sum"] == 3


def test_loras_of_other_ranks_are_not_added_linearly() -> None:
    model, _ = two_loras((2, 3))
    before = logits(model)
    with pytest.raises(UserError, match=r"adapters must fit one another, got an error: .*same r"):
        combine_adapters(model, ["a", "b"], [1.0, 1.0], "sum", "linear")
    assert sorted(list_adapters(model)) == ["a", "b"]
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "all"}, r"adapter\.bias must leave the weights of the base alone, got 'all'"),
        ({"init_lora_weights": "pissa"}, r"adapter\.init_lora_weights must leave .* got 'pissa'"),
        ({"target_modules": "("}, r"adapter must be one that peft can put into glm"),
        ({"target_modules": ["nowhere"]}, r"adapter must be one that peft can put into glm"),
        ({"target_modules": ["q_proj", "norm"]}, r"adapter must be one that peft can put into glm"),
    ],
)
def test_failing_to_add_leaves_the_model_as_it_was(options: dict[str, Any], message: str) -> None:
    model = MODELS["glm"]().eval()
    for existing in (False, True):
        if existing:
            add_adapter(model, LoraConfig(r=2), "first")
            shake(model, "first")
        before = logits(model)
        modules = [(n, type(m)) for n, m in model.named_modules()]
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        with pytest.raises(UserError, match=message):
            add_adapter(model, LoraConfig(r=2, **options), "second")
        assert [(n, type(m)) for n, m in model.named_modules()] == modules
        assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
        assert torch.equal(logits(model), before)


def test_deleting_all_leaves_the_base_and_no_layer_of_peft() -> None:
    model = MODELS["glm"]().eval()
    base, modules = logits(model), [(n, type(m)) for n, m in model.named_modules()]
    for name in CONFIGS:
        add_adapter(model, CONFIGS[name]("glm"), name.replace(" ", "_"))
        shake(model, name.replace(" ", "_"))
    with disable_adapters(model):
        assert torch.equal(logits(model), base)
    for name in list(list_adapters(model)):
        delete_adapter(model, name)
    assert [(n, type(m)) for n, m in model.named_modules()] == modules
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("groups", [2, 4])
def test_adapter_on_released_modules_is_turned_into_native_ones(
    method: str, groups: int, tmp_path: Path
) -> None:
    from chatglm_ptuning.models.glm_checkpoint import fuse_qkv

    heads, head_dim = 4, 8
    model = MODELS["glm"]()
    model.config.num_key_value_heads = groups
    model = type(model)(model.config).eval()
    interleaved = groups == heads
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    fused = {}  # released module -> its merged weight [out, in]
    tensors = {}
    for layer in range(2):
        native = model.model.layers[layer]
        parts = [native.self_attn.q_proj, native.self_attn.k_proj, native.self_attn.v_proj]
        whole = {
            "self_attention.query_key_value": fuse_qkv(
                [p.weight.detach() for p in parts], head_dim, interleaved
            ),
            "self_attention.dense": native.self_attn.o_proj.weight.detach(),
            "mlp.dense_h_to_4h": native.mlp.gate_up_proj.weight.detach(),
            "mlp.dense_4h_to_h": native.mlp.down_proj.weight.detach(),
        }
        for module, weight in whole.items():
            place = f"base_model.model.transformer.encoder.layers.{layer}.{module}"
            if method == "ia3":
                into = module.endswith("4h_to_h")
                scale = 1 + random(1, weight.shape[1]) if into else 1 + random(len(weight), 1)
                tensors[f"{place}.ia3_l"] = scale
                fused[f"{layer}.{module}"] = weight * scale
                continue
            a, b = random(2, weight.shape[1]), random(len(weight), 2)
            tensors |= {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
            merged = weight + 5 / 2 * b @ a
            if method == "dora":
                magnitude = 1 + random(len(weight)).abs()
                tensors[f"{place}.lora_magnitude_vector"] = magnitude
                merged = merged * (magnitude / merged.norm(dim=1))[:, None]
            fused[f"{layer}.{module}"] = merged
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    modules = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    config: dict[str, Any] = {"target_modules": modules}
    if method == "ia3":
        config |= {"peft_type": "IA3", "feedforward_modules": ["dense_4h_to_h"]}
    else:
        config |= {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "use_dora": method == "dora"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    load_adapter(model, tmp_path, "own")
    by_adapter = logits(model)
    merge_adapter(model, "own")
    for layer in range(2):
        native = model.model.layers[layer]
        parts = [native.self_attn.q_proj, native.self_attn.k_proj, native.self_attn.v_proj]
        together = fuse_qkv([p.weight for p in parts], head_dim, interleaved)
        assert_close(
            together, fused[f"{layer}.self_attention.query_key_value"], atol=1e-6, rtol=1e-5
        )
        for module, linear in {
            "self_attention.dense": native.self_attn.o_proj,
            "mlp.dense_h_to_4h": native.mlp.gate_up_proj,
            "mlp.dense_4h_to_h": native.mlp.down_proj,
        }.items():
            assert_close(linear.weight, fused[f"{layer}.{module}"], atol=1e-6, rtol=1e-5)
    assert_close(logits(model), by_adapter, atol=1e-4, rtol=0)


def test_patterns_of_released_names() -> None:
    from chatglm_ptuning.tuners.lora_names import native_modules

    assert native_modules(["query_key_value", "dense"]) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    pattern = r".*layers\.1\.self_attention\.query_key_value"
    assert native_modules(pattern) == r".*layers\.1\.self_attn\.[qkv]_proj"
    ranks = {"transformer.encoder.layers.0.mlp.dense_4h_to_h": 4}
    assert native_modules(ranks) == {"model.layers.0.mlp.down_proj": 4}


def test_saved_directory_holds_the_adapter_only(tmp_path: Path) -> None:
    model, _ = tuned("glm", "embeddings")
    save_adapter(model, tmp_path, "own")
    assert sorted(load_file(tmp_path / "adapter_model.safetensors")) == [
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.lora_embedding_B",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_adapter_of_another_shape_is_refused_with_both(tmp_path: Path) -> None:
    model, _ = tuned("glm", "lora")
    save_adapter(model, tmp_path, "own")
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(content | {"r": 6}))
    fresh = MODELS["glm"]().eval()
    before = logits(fresh)
    with pytest.raises(UserError, match=r"got \(4, 32\) in the file and \(6, 32\) in the base"):
        load_adapter(fresh, tmp_path)
    assert list_adapters(fresh) == {}
    assert torch.equal(logits(fresh), before)

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GlmConfig, GlmForCausalLM, PreTrainedModel

from chatglm_ptuning import cli
from chatglm_ptuning.config import RunConfig
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.models.loading import load_base_model
from chatglm_ptuning.models.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.training import estimate as module
from chatglm_ptuning.training.estimate import Batch, Estimate, estimate, layer_bytes
from chatglm_ptuning.tuners import LoraConfig, PrefixTuningConfig, add_adapter
from tests.training.conftest import GMASK, MASK, SOP

Estimated = Callable[..., Estimate]


@pytest.fixture
def estimated(checkpoint: Callable[..., Path], tmp_path: Path) -> Estimated:
    """`estimated(family, override, ...)`, of a directory that holds config.json and nothing else."""

    def run(family: str, *overrides: str) -> Estimate:
        shutil.copy(checkpoint(family) / "config.json", tmp_path)
        settings = [f"model.path={tmp_path}", "model.device=cpu", "model.dtype=float32"]
        return estimate(RunConfig.load(None, [*settings, *overrides]))

    return run


def trained_count(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["chatglm", "chatglm2", "glm4-hf"])
@pytest.mark.parametrize(
    ("kind", "tuner"),
    [
        ("ptuning_v2", PrefixTuningConfig()),
        ("ptuning_v2 adapter.prefix_projection=true", PrefixTuningConfig(prefix_projection=True)),
        ("lora adapter.r=4", LoraConfig(r=4)),
        ("lora adapter.target_modules=all-linear", LoraConfig(target_modules="all-linear")),
    ],
)
def test_parameters_are_those_of_the_real_model(
    checkpoint: Callable[..., Path],
    estimated: Estimated,
    family: str,
    kind: str,
    tuner: PrefixTuningConfig | LoraConfig,
) -> None:
    name, *overrides = kind.split()
    model = load_base_model(checkpoint(family), "float32", "cpu")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    add_adapter(model, tuner)
    trained = trained_count(model)
    result = estimated(family, f"adapter.type={name}", *overrides)
    # the tiny released files hold a head that differs from the embeddings: two tensors, where config.json says one
    head = model.get_output_embeddings().weight.nbytes if family == "chatglm" else 0
    assert result.weights in (weights, weights - head)
    assert (result.adapter, result.gradients, result.optimizer) == (
        4 * trained,
        4 * trained,
        8 * trained,
    )


def test_every_weight_is_trained_in_float32(
    checkpoint: Callable[..., Path], estimated: Estimated
) -> None:
    model = load_base_model(checkpoint("chatglm2"), "float32", "cpu")
    result = estimated("chatglm2", "adapter.type=full", "model.dtype=auto")
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert (result.weights, result.adapter, result.gradients) == (size, 0, size)
    assert result.optimizer == 2 * size
    last = estimated("chatglm2", "adapter.type=full", "adapter.train_last_layers=1")
    assert last.gradients < size
    assert last.activations < result.activations


def test_four_bits(estimated: Estimated) -> None:
    whole = estimated("chatglm2").weights
    quantized = estimated("chatglm2", "model.quantization_bit=4").weights
    # q, k, v, o, gate and up, down of both layers, as in tests/checkpoints.py
    linear = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 2 * 32 * 48 + 48 * 32)
    assert whole - quantized == round(linear * (4 - 0.5 - 1 / 64 - 1 / 4096))


@pytest.mark.parametrize(("stage", "divided"), [(1, (1, 1)), (2, (1, 4)), (3, (4, 4))])
def test_zero_divides_among_the_processes(
    estimated: Estimated, monkeypatch: pytest.MonkeyPatch, stage: int, divided: tuple[int, int]
) -> None:
    alone = estimated("chatglm2")
    monkeypatch.setenv("NUM_GPUS", "4")
    config = f"training.deepspeed={{zero_optimization: {{stage: {stage}}}}}"
    shared = estimated("chatglm2", config)
    assert shared.gradients == alone.gradients // divided[1]
    assert shared.optimizer == (alone.optimizer + alone.gradients) // 4
    if stage < 3:
        assert shared.weights == alone.weights
    else:
        assert alone.weights // 4 < shared.weights < alone.weights
    parts = (shared.weights, shared.adapter, shared.gradients, shared.optimizer)
    assert shared.total == sum(parts) + shared.activations + shared.libraries


@pytest.mark.parametrize(("optimizer", "share"), [("sgd", 0), ("adamw_8bit", 2), ("rmsprop", 4)])
def test_state_of_other_optimizers(estimated: Estimated, optimizer: str, share: int) -> None:
    result = estimated("chatglm", f"training.optim={optimizer}")
    assert result.optimizer == share * result.gradients // 4


def test_adafactor_keeps_rows_and_columns(estimated: Estimated) -> None:
    result = estimated("chatglm", "training.optim=adafactor")  # a prefix [128, 2 * 2 * 32]
    assert result.optimizer == 4 * (128 + 128)


def test_an_optimizer_that_is_not_known(estimated: Estimated) -> None:
    with pytest.raises(UserError, match=r"training\.optim must be one of .*optim='galore_adamw'"):
        estimated("chatglm", "training.optim=galore_adamw")


def wide_model(family: str) -> PreTrainedModel:
    """Three layers with heads of 64 channels, which the fused kernels take as they are."""
    if family == "glm":
        config = GlmConfig(
            vocab_size=64,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            pad_token_id=3,
            attention_bias=True,
        )
        return GlmForCausalLM(config).train()
    return ChatGLMForConditionalGeneration(
        ChatGLMConfig(
            vocab_size=64,
            hidden_size=256,
            num_layers=3,
            num_attention_heads=4,
            bos_token_id=SOP,
            eos_token_id=61,
            mask_token_id=MASK,
            gmask_token_id=GMASK,
        )
    ).train()


def saved_bytes(model: PreTrainedModel, rows: int, length: int) -> int:
    """What autograd keeps of the layers in one forward pass, each storage once, parameters left out."""
    ids = torch.randint(4, 60, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, length // 2], ids[:, length // 2 + 1] = GMASK, SOP
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("family", ["chatglm", "glm"])
@pytest.mark.parametrize("kind", ["prefix", "lora", "lora with dropout", "full"])
def test_layers_keep_what_autograd_keeps(family: str, kind: str) -> None:
    model = wide_model(family)
    rows, length, prefix = 2, 128, 16 if kind == "prefix" else 0
    if prefix:
        add_adapter(model, PrefixTuningConfig(num_virtual_tokens=prefix))
    elif kind != "full":
        add_adapter(model, LoraConfig(r=2, lora_dropout=0.1 if "dropout" in kind else 0.0))
    batch = Batch(rows, length, prefix, 0, 4, 4, 4, is_on_gpu=False)
    layers = model.get_decoder().layers
    expected = sum(layer_bytes(layer, model.config, batch) for layer in layers)
    expected += rows * length * 256 * 4  # the last norm's input
    assert saved_bytes(model, rows, length) == pytest.approx(expected, rel=0.08)


def test_checkpointing_keeps_less(estimated: Estimated) -> None:
    whole = estimated("chatglm2").activations
    assert estimated("chatglm2", "training.gradient_checkpointing=true").activations < whole


def test_the_command_loads_and_writes_nothing(
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "peak_resident", lambda: 2**30)
    shutil.copy(checkpoint("chatglm") / "config.json", tmp_path)
    overrides = [
        f"model.path={tmp_path}",
        "model.device=cpu",
        f"training.output_dir={tmp_path / 'out'}",
    ]
    assert cli.main(["train", "--estimate", *overrides]) == 0
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    parts = ["weights", "adapter", "gradients", "optimizer", "activations", "libraries", "total"]
    assert words == ["memory", *parts, "not"]
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]

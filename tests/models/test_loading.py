import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GlmForCausalLM, LlamaConfig, LlamaForCausalLM

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models import loading
from chatglm_ptuning.models.glm_checkpoint import glm_config, released_names, save_released
from chatglm_ptuning.models.loading import load_base_model, model_family, resolve_dtype
from chatglm_ptuning.models.modeling_chatglm import ChatGLMForConditionalGeneration

CHATGLM = {
    "model_type": "chatglm",
    "vocab_size": 40,
    "hidden_size": 32,
    "inner_hidden_size": 48,
    "num_layers": 2,
    "num_attention_heads": 2,
    "max_sequence_length": 64,
    "position_encoding_2d": True,
    "bos_token_id": 34,
    "eos_token_id": 35,
    "mask_token_id": 30,
    "gmask_token_id": 31,
    "pad_token_id": 3,
    "torch_dtype": "float16",
    "quantization_bit": 0,
    "pre_seq_len": None,
    "prefix_projection": False,
}
CHATGLM2 = {
    "model_type": "chatglm",
    "padded_vocab_size": 40,
    "hidden_size": 32,
    "ffn_hidden_size": 24,
    "num_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "seq_length": 64,
    "add_qkv_bias": True,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
}
EMBEDDINGS, HEAD = "transformer.word_embeddings.weight", "lm_head.weight"
QKV = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
IDS = torch.tensor([[5, 6, 31, 34, 7]])


def released_state(config: dict) -> dict[str, Tensor]:
    """Random weights under the released names, and the tables that the released files carry."""
    model = loading.build_released(Path("unused"), config, torch.float32)
    shapes = {name: parameter.shape for name, parameter in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, natives in released_names(model).items():
        rows = sum(shapes[native][0] for native in natives)
        state[name] = torch.randn(rows, *shapes[natives[0]][1:], generator=generator)
    if HEAD in state:
        state[HEAD] = state[EMBEDDINGS].clone()
        return state | {"transformer.layers.0.attention.rotary_emb.inv_freq": torch.ones(4)}
    return state | {"transformer.rotary_pos_emb.inv_freq": torch.ones(2)}


def write(directory: Path, state: dict[str, Tensor], config: dict, layout: str = "bin") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = list(state)
    if layout == "bin":
        torch.save(state, directory / "pytorch_model.bin")
    elif layout == "old bin":
        file = directory / "pytorch_model.bin"
        torch.save(state, file, _use_new_zipfile_serialization=False)
    elif layout == "safetensors":
        save_file(state, directory / "model.safetensors")
    else:
        suffix = layout.removeprefix("sharded ")
        stem = "pytorch_model" if suffix == "bin" else "model"
        weight_map = {}
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            file = f"{stem}-{number:05d}-of-00002.{suffix}"
            shard = {name: state[name] for name in part}
            torch.save(shard, directory / file) if suffix == "bin" else save_file(
                shard, directory / file
            )
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture
def chatglm2(tmp_path: Path) -> Path:
    return write(tmp_path / "chatglm2", released_state(CHATGLM2), CHATGLM2, "sharded bin")


LAYOUTS = ["bin", "old bin", "safetensors", "sharded bin", "sharded safetensors"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", [CHATGLM, CHATGLM2], ids=["chatglm", "chatglm2"])
def test_every_layout_gives_every_tensor(tmp_path, config, layout):
    state = released_state(config)
    model = load_base_model(write(tmp_path, state, config, layout), "float32", "cpu")
    assert not model.training
    loaded = model.state_dict()
    for name, natives in released_names(model).items():
        rows = torch.cat([loaded[native] for native in natives])
        assert torch.equal(rows, state[name]), name
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("config", [CHATGLM, CHATGLM2], ids=["chatglm", "chatglm2"])
def test_tables_are_computed_not_read(tmp_path, config):
    model = load_base_model(write(tmp_path, released_state(config), config), "bfloat16", "cpu")
    inner = model.transformer if config is CHATGLM else model.model
    exponents = (
        torch.arange(0, inner.rotary_emb.inv_freq.numel()) / inner.rotary_emb.inv_freq.numel()
    )
    expected = 10000**-exponents
    if config is CHATGLM:
        expected = expected.half().float()
    assert inner.rotary_emb.inv_freq.dtype == torch.float32
    torch.testing.assert_close(inner.rotary_emb.inv_freq, expected, rtol=1e-6, atol=0)


def test_same_logits_as_the_model_built_directly(tmp_path):
    torch.manual_seed(0)
    model = GlmForCausalLM(glm_config(CHATGLM2)).eval()
    save_released(model, tmp_path)
    again = load_base_model(tmp_path, "float32", "cpu")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", ["float32", "float16", torch.bfloat16])
def test_dtype(chatglm2, dtype):
    model = load_base_model(chatglm2, dtype, "cpu")
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert model.dtype == model.config.dtype == wanted


class TestAutoDtype:
    @pytest.mark.parametrize(
        ("abilities", "expected"),
        [
            ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
            ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
            ({"avx512_bf16": False, "amx_bf16": False}, torch.float32),
            ({}, torch.float32),
        ],
    )
    def test_cpu(self, monkeypatch, abilities, expected):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
        assert resolve_dtype("auto", torch.device("cpu")) == expected

    @pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.half)])
    def test_gpu(self, monkeypatch, native, expected):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
        assert resolve_dtype("auto", torch.device("cuda")) == expected


class TestHeadOfChatGLM:
    def test_equal_head_is_shared(self, tmp_path):
        model = load_base_model(write(tmp_path, released_state(CHATGLM), CHATGLM), "float32", "cpu")
        assert model.lm_head.weight is model.transformer.word_embeddings.weight

    def test_missing_head_is_shared(self, tmp_path):
        state = released_state(CHATGLM)
        del state[HEAD]
        model = load_base_model(write(tmp_path, state, CHATGLM), "float32", "cpu")
        assert model.lm_head.weight is model.transformer.word_embeddings.weight
        assert torch.equal(model.lm_head.weight, state[EMBEDDINGS])

    @pytest.mark.parametrize("key", [{}, {"tie_word_embeddings": False}])
    def test_other_head_stays_separate(self, tmp_path, key):
        state = released_state(CHATGLM)
        state[HEAD] = state[HEAD] + 1
        model = load_base_model(write(tmp_path / "in", state, CHATGLM | key), "float32", "cpu")
        assert torch.equal(model.lm_head.weight, state[HEAD])
        assert torch.equal(model.transformer.word_embeddings.weight, state[EMBEDDINGS])
        model.save_pretrained(tmp_path / "out")
        again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "out")
        assert torch.equal(again.lm_head.weight, state[HEAD])

    def test_separate_head_must_be_there(self, tmp_path):
        state = released_state(CHATGLM)
        del state[HEAD]
        write(tmp_path, state, CHATGLM | {"tie_word_embeddings": False})
        with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
            load_base_model(tmp_path, "float32", "cpu")


def test_oldest_chatglm_config_names_sop_only(tmp_path):
    config = {k: v for k, v in CHATGLM.items() if k not in ("mask_token_id", "gmask_token_id")}
    model = load_base_model(write(tmp_path, released_state(config), config), "float32", "cpu")
    assert (model.config.mask_token_id, model.config.gmask_token_id) == (30, 31)


def test_pruned_keys_of_chatglm_are_not_kept(tmp_path):
    config = CHATGLM | {"quantization_bit": 4, "pre_seq_len": 128}
    model = load_base_model(write(tmp_path, released_state(CHATGLM), config), "float32", "cpu")
    assert not hasattr(model.config, "quantization_bit")
    assert not hasattr(model.config, "pre_seq_len")


def test_generation_config_is_read(chatglm2):
    (chatglm2 / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, 8], "do_sample": True, "top_p": 0.8})
    )
    generation = load_base_model(chatglm2, "float32", "cpu").generation_config
    assert (generation.eos_token_id, generation.top_p) == ([7, 8], 0.8)


def test_weights_are_a_copy_of_the_file(chatglm2):
    model = load_base_model(chatglm2, "float32", "cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for file in chatglm2.glob("*.bin"):
        with file.open("r+b") as stream:
            stream.write(b"\0" * file.stat().st_size)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


class TestPrefixInside:
    PREFIX = {"transformer.prefix_encoder.embedding.weight": torch.ones(3, 64)}  # noqa: RUF012

    def test_is_left_out_with_one_line(self, tmp_path, caplog):
        write(tmp_path, released_state(CHATGLM2) | self.PREFIX, CHATGLM2 | {"pre_seq_len": 3})
        with caplog.at_level(logging.WARNING):
            load_base_model(tmp_path, "float32", "cpu")
        assert [r.message for r in caplog.records if "prefix" in r.message] == [
            f"{tmp_path} also holds a P-Tuning prefix, which was left out;"
            f" load_adapter(model, '{tmp_path}') loads it"
        ]

    def test_alone_is_no_base_model(self, tmp_path):
        write(tmp_path, self.PREFIX, CHATGLM2 | {"pre_seq_len": 3})
        with pytest.raises(UserError, match="got a P-Tuning prefix only; give the base model's"):
            load_base_model(tmp_path, "float32", "cpu")


class TestFamily:
    @pytest.mark.parametrize(
        ("config", "family"),
        [
            (CHATGLM, "chatglm"),
            (CHATGLM2, "glm"),
            ({"model_type": "glm"}, "glm"),
            ({"model_type": "qwen3"}, "qwen3"),
        ],
    )
    def test_known(self, tmp_path, config, family):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert model_family(tmp_path) == family

    def test_model_type_is_needed(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(UserError, match=r"config\.json must name a model_type, got .*None"):
            model_family(tmp_path)


class TestNative:
    def test_glm_directory(self, tmp_path):
        torch.manual_seed(0)
        model = GlmForCausalLM(glm_config(CHATGLM2)).eval()
        model.save_pretrained(tmp_path, max_shard_size="8KB")
        again = load_base_model(tmp_path, torch.float32, "cpu")
        assert not again.training
        assert torch.equal(again(IDS).logits, model(IDS).logits)

    def test_any_other_decoder(self, tmp_path):
        config = LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        assert isinstance(load_base_model(tmp_path, "float32", "cpu"), LlamaForCausalLM)

    def test_missing_tensor(self, tmp_path):
        model = GlmForCausalLM(glm_config(CHATGLM2))
        model.save_pretrained(tmp_path)
        state = model.state_dict()
        del state["model.norm.weight"]
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"got missing: model\.norm\.weight"):
            load_base_model(tmp_path, "float32", "cpu")

    def test_unknown_model_type(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
        with pytest.raises(UserError, match=r"must be a complete checkpoint .*nonesuch"):
            load_base_model(tmp_path, "float32", "cpu")

    def test_missing_shard(self, tmp_path):
        GlmForCausalLM(glm_config(CHATGLM2)).save_pretrained(tmp_path, max_shard_size="8KB")
        next(iter(sorted(tmp_path.glob("model-*.safetensors")))).unlink()
        with pytest.raises(UserError, match="model-00001-of"):
            load_base_model(tmp_path, "float32", "cpu")


def test_works_offline(chatglm2):
    code = f"""
import socket
def refuse(*arguments, **keywords): raise SystemExit("the network was used")
socket.socket.connect = socket.create_connection = refuse
from chatglm_ptuning.models.loading import load_base_model
load_base_model({str(chatglm2)!r}, "float32", "cpu")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_memory_peak_is_the_model_and_one_shard(tmp_path):
    """A 160 MB checkpoint of 8 files, loaded in half the size: 80 MB of model and 20 MB of shard."""
    large = CHATGLM2 | {"hidden_size": 512, "ffn_hidden_size": 2560, "num_layers": 8}
    large |= {"num_attention_heads": 8, "kv_channels": 64, "padded_vocab_size": 400}
    torch.manual_seed(0)
    save_released(GlmForCausalLM(glm_config(large)), tmp_path, shard_bytes=21 * 10**6)
    assert len(list(tmp_path.glob("*.bin"))) == 8
    code = f"""
import re, pathlib, torch
from chatglm_ptuning.models.loading import load_base_model
status = pathlib.Path("/proc/self/status")
read = lambda field: int(re.search(field + r":\\s+(\\d+) kB", status.read_text())[1]) / 1000
load_base_model({str(tmp_path)!r}, "bfloat16", "cpu")  # once, so that libraries are loaded
pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = read("VmRSS")
model = load_base_model({str(tmp_path)!r}, "bfloat16", "cpu")
size = sum(tensor.nbytes for tensor in model.parameters()) / 1e6
print(size, read("VmHWM") - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size, peak = map(float, run.stdout.split())
    assert 70 < size < 90
    assert peak < size + 45


def replace(file: Path, content: str | bytes) -> None:
    file.write_bytes(content.encode() if isinstance(content, str) else content)


class TestErrors:
    """Each is one sentence, without a line break."""

    def refused(self, directory: Path | str, message: str, **arguments: object) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_base_model(directory, **({"dtype": "float32", "device": "cpu"} | arguments))
        assert "\n" not in str(caught.value)

    def test_hub_name(self):
        self.refused("zai-org/chatglm3-6b", "must be a directory .* nothing is downloaded here")

    def test_no_config(self, tmp_path):
        self.refused(tmp_path, r"must hold a config\.json")

    def test_adapter_directory(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        self.refused(tmp_path, r"got the adapter .*; open it with chatglm_ptuning\.load_model")

    @pytest.mark.parametrize("content", ["{", "", b"\xff\xfe{}", "[1]"])
    def test_broken_config(self, chatglm2, content):
        replace(chatglm2 / "config.json", content)
        self.refused(chatglm2, r"config\.json must (be JSON|hold a JSON object)")

    def test_broken_generation_config(self, chatglm2):
        replace(chatglm2 / "generation_config.json", "{")
        self.refused(chatglm2, r"generation_config\.json must be JSON")

    def test_no_weights(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(CHATGLM2))
        self.refused(tmp_path, r"must hold weights .*, got none")

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}'])
    def test_broken_index(self, chatglm2, content):
        replace(chatglm2 / "pytorch_model.bin.index.json", content)
        self.refused(chatglm2, r"pytorch_model\.bin\.index\.json must ")

    def test_missing_shard(self, chatglm2):
        (chatglm2 / "pytorch_model-00002-of-00002.bin").unlink()
        self.refused(chatglm2, r"got no pytorch_model-00002-of-00002\.bin")

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
    def test_truncated_file(self, tmp_path, layout, kept):
        write(tmp_path, released_state(CHATGLM2), CHATGLM2, layout)
        file = max(p for p in tmp_path.iterdir() if p.suffix in (".bin", ".safetensors"))
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * kept)])
        self.refused(tmp_path, f"{file.name} must be a complete file of weights")

    def test_pickle_that_would_run_code(self, tmp_path):
        write(tmp_path, {"weight": Path("code")}, CHATGLM2)
        self.refused(tmp_path, r"pytorch_model\.bin must be a complete file of weights")

    @pytest.mark.parametrize("content", [[torch.ones(1)], {"module": {"weight": torch.ones(1)}}])
    def test_no_flat_dictionary(self, tmp_path, content):
        write(tmp_path, content, CHATGLM2)
        self.refused(tmp_path, "must hold a flat dictionary of tensors")

    def test_all_wrong_tensors_are_in_one_sentence(self, tmp_path):
        state = released_state(CHATGLM2)
        del state["transformer.encoder.final_layernorm.weight"]
        state["transformer.encoder.layers.2.mlp.dense_4h_to_h.weight"] = torch.ones(2, 2)
        state[QKV] = state[QKV][:-1]
        self.refused(
            write(tmp_path, state, CHATGLM2),
            r"missing: transformer\.encoder\.final_layernorm\.weight;"
            r" unexpected: transformer\.encoder\.layers\.2\.mlp\.dense_4h_to_h\.weight;"
            r" misshapen: transformer\.encoder\.layers\.1\.self_attention\.query_key_value\.weight"
            r" is torch\.float32 \(63, 32\), not \(64, 32\)",
        )

    def test_long_lists_are_cut(self, tmp_path):
        write(tmp_path, {"other": torch.ones(1)}, CHATGLM2)
        self.refused(tmp_path, r"missing: .* and \d+ more; unexpected: other")

    def test_whole_numbers_are_no_weights(self, tmp_path):
        state = released_state(CHATGLM2)
        state[QKV] = state[QKV].to(torch.int8)
        self.refused(write(tmp_path, state, CHATGLM2), r"is torch\.int8")

    def test_config_of_another_size(self, chatglm2):
        replace(chatglm2 / "config.json", json.dumps(CHATGLM2 | {"num_layers": 3}))
        self.refused(chatglm2, r"missing: transformer\.encoder\.layers\.2\.")

    def test_unsupported_switch(self, chatglm2):
        replace(chatglm2 / "config.json", json.dumps(CHATGLM2 | {"rmsnorm": False}))
        self.refused(chatglm2, "rmsnorm=False")

    @pytest.mark.parametrize("dtype", ["half", "int8", torch.int8, None])
    def test_dtype(self, chatglm2, dtype):
        self.refused(chatglm2, "dtype must be auto, float32, float16, bfloat16", dtype=dtype)

    @pytest.mark.parametrize("device", ["gpu", "cuda:99"])
    def test_device(self, chatglm2, device):
        self.refused(
            chatglm2,
            f"device must be one that this machine has, got device='{device}'",
            device=device,
        )

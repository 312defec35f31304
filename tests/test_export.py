import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from chatglm_ptuning import cli, load_model, load_tokenizer
from chatglm_ptuning.config import ModelSection, RunConfig
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.export import export, stored_dtype
from chatglm_ptuning.models.loading import read_json, shard_files
from chatglm_ptuning.tensor_files import read_tensors
from chatglm_ptuning.tuners import (
    LoraConfig,
    PrefixTuningConfig,
    add_adapter,
    load_adapter,
    save_adapter,
)
from chatglm_ptuning.tuners.released_prefix import read_released_prefix
from tests.checkpoints import FAMILIES, copy_of, write_released

Checkpoint = Callable[..., Path]
LAYOUTS = ["bin", "sharded bin", "sharded safetensors"]
IDS = torch.tensor([[10, 97, 200, 33, 250]])
PROMPT = ({"role": "user", "content": "你好"},)


def stored(directory: Path) -> dict[str, Tensor]:
    return {name: t for file in shard_files(directory) for name, t in read_tensors(file)}


def assert_same_tensors(first: Path, second: Path) -> None:
    one, other = stored(first), stored(second)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def logits(directory: Path) -> Tensor:
    with torch.no_grad():
        model = load_model(directory, "float32", "cpu")
        bos = model.config.bos_token_id if model.config.model_type == "chatglm" else 1
        return model(torch.cat((IDS, torch.tensor([[2001, bos]])), 1) if bos > 1 else IDS).logits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_released_files_come_back_bit_for_bit(checkpoint, tmp_path, family, layout):
    source = checkpoint(family, layout)
    dtype = torch.bfloat16 if layout == "sharded safetensors" else torch.float16
    assert stored_dtype(source) == dtype
    said = export(source, tmp_path / "native", "native")
    assert said.startswith(f"{source}: written to {tmp_path / 'native'} in the native layout, ")
    export(tmp_path / "native", tmp_path / "back", "released")
    assert_same_tensors(source, tmp_path / "back")
    back = read_json(tmp_path / "back" / "config.json")
    assert back == back | read_json(source / "config.json")
    export(source, tmp_path / "again", "released")
    assert_same_tensors(source, tmp_path / "again")


@pytest.mark.parametrize("family", [*FAMILIES, "glm4-hf"])
@pytest.mark.parametrize("layout", ["native", "released"])
def test_the_tokenizer_comes_along(checkpoint, tmp_path, family, layout):
    source, out = checkpoint(family), tmp_path / "out"
    export(source, out, layout)
    tokenizer, again = load_tokenizer(source), load_tokenizer(out)
    for text in ("你好，世界 1234", "<|user|>[gMASK]"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.encode_ordinary(text) == tokenizer.encode_ordinary(text)
    ids = tokenizer.apply_chat_template(PROMPT)["input_ids"]
    assert again.apply_chat_template(PROMPT)["input_ids"] == ids
    torch.testing.assert_close(logits(out), logits(source), atol=0, rtol=0)


def test_native_glm_is_written_as_released(checkpoint, tmp_path):
    export(checkpoint("glm4-hf"), tmp_path / "out", "released")
    assert_same_tensors(tmp_path / "out", checkpoint("glm4"))
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["model_type"], config["rope_ratio"]) == ("chatglm", 500)


def test_what_stood_beside_the_weights_stays(checkpoint, tmp_path):
    source = copy_of(checkpoint("chatglm2"), tmp_path / "source")
    config = read_json(source / "config.json")
    config |= {"auto_map": {"AutoModel": "modeling_chatglm.X"}, "pre_seq_len": 8}
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_chatglm.py").write_text("raise SystemExit('the code was run')")
    settings = {"do_sample": True, "top_p": 0.8, "eos_token_id": 2}
    (source / "generation_config.json").write_text(json.dumps(settings))
    for layout in ("released", "native"):
        export(source, tmp_path / layout, layout)
        assert read_json(tmp_path / layout / "generation_config.json") == settings
    assert (tmp_path / "released" / "modeling_chatglm.py").is_file()
    written = read_json(tmp_path / "released" / "config.json")
    assert written["auto_map"] == {"AutoModel": "modeling_chatglm.X"}
    assert "pre_seq_len" not in written


def test_the_dtype_is_that_of_the_files(checkpoint, tmp_path):
    source = copy_of(checkpoint("chatglm3", "sharded bin"), tmp_path / "source")
    last = shard_files(source)[-1]
    torch.save({n: t.float() for n, t in torch.load(last).items()}, last)
    assert stored_dtype(source) == torch.float32
    export(source, tmp_path / "out", "native")
    file = next((tmp_path / "out").glob("*.safetensors"))
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}


class TestMerge:
    @pytest.fixture(params=["chatglm", "chatglm3", "glm4"])
    def adapter(self, checkpoint, tmp_path, request) -> Path:
        model = load_model(checkpoint(request.param), "float32", "cpu")
        torch.manual_seed(0)
        add_adapter(model, LoraConfig(r=2, init_lora_weights=False))
        save_adapter(model, tmp_path / "adapter")
        section = ModelSection(path=str(checkpoint(request.param)), template=request.param)
        RunConfig(model=section).save(tmp_path / "adapter")
        return tmp_path / "adapter"

    @pytest.mark.parametrize("layout", ["released", "native"])
    def test_is_the_base_with_the_adapter(self, adapter, checkpoint, tmp_path, layout):
        said = export(adapter, tmp_path / "out", layout, merge=True)
        assert f"{adapter} merged into it: written to {tmp_path / 'out'}" in said
        base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        moved = (logits(adapter) - logits(Path(base))).abs().max()
        rounding = (logits(tmp_path / "out") - logits(adapter)).abs().max()
        assert stored_dtype(tmp_path / "out") == torch.float16
        assert rounding < 0.02 * moved
        assert load_tokenizer(tmp_path / "out").apply_chat_template(PROMPT)

    def test_is_asked_for(self, adapter, tmp_path):
        with pytest.raises(UserError, match=r"must be merged .* add --merge, or write a prefix"):
            export(adapter, tmp_path / "out", "native")
        with pytest.raises(UserError, match=r"must be given a P-Tuning v2 adapter, got .*'LORA'"):
            export(adapter, tmp_path / "out", "prefix")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["released", "native"])
@pytest.mark.parametrize("template", ["chatglm2", "chatglm3"])
def test_the_template_of_a_run_stays_with_the_model(checkpoint, tmp_path, template, layout):
    """Nothing in the files tells ChatGLM2 from ChatGLM3; the run that trained the adapter did."""
    base = copy_of(checkpoint("chatglm2"), tmp_path / "base")
    (base / "tokenizer_config.json").write_text("{}")
    (base / "tokenizer_config.json").chmod(0o444)  # as people protect a checkpoint
    model = load_model(base, "float32", "cpu")
    add_adapter(model, LoraConfig(r=1))
    save_adapter(model, tmp_path / "adapter")
    RunConfig(model=ModelSection(template=template)).save(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out", layout, merge=True)
    ids = load_tokenizer(tmp_path / "out").apply_chat_template(PROMPT)["input_ids"]
    assert ids == load_tokenizer(base, template).apply_chat_template(PROMPT)["input_ids"]
    assert all(file.stat().st_mode & 0o200 for file in (tmp_path / "out").glob("tokenizer*"))


class TestPrefix:
    @pytest.fixture(
        params=[("chatglm", False), ("chatglm", True), ("chatglm3", False), ("chatglm3", True)]
    )
    def adapter(self, checkpoint, tmp_path, request) -> Path:  # fmt: skip
        family, projection = request.param
        model = load_model(checkpoint(family), "float32", "cpu")
        torch.manual_seed(0)
        config = PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=projection)
        add_adapter(model, config)
        save_adapter(model, tmp_path / "adapter")
        return tmp_path / "adapter"

    def test_comes_back_bit_for_bit(self, adapter, tmp_path):
        said = export(adapter, tmp_path / "out", "prefix")
        written = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
        assert all(name.startswith("transformer.prefix_encoder.") for name in written)
        shape = list(written["transformer.prefix_encoder.embedding.weight"].shape)
        assert f"transformer.prefix_encoder.embedding.weight {shape}" in said
        own = load_file(adapter / "adapter_model.safetensors")
        _, again = read_released_prefix(tmp_path / "out")
        assert own.keys() == again.keys()
        assert all(torch.equal(own[name], again[name]) for name in own)

    def test_flat(self, adapter, tmp_path):
        config = read_json(adapter / "adapter_config.json")
        if not config["prefix_projection"]:
            with pytest.raises(UserError, match="got one that is flat already"):
                export(adapter, tmp_path / "out", "prefix", flatten=True)
            return
        export(adapter, tmp_path / "out", "prefix", flatten=True)
        written = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
        assert [*written] == ["transformer.prefix_encoder.embedding.weight"]
        base = Path(config["base_model_name_or_path"])
        model = load_model(base, "float32", "cpu")
        load_adapter(model, tmp_path / "out", "flat")
        load_adapter(model, adapter, "projected")
        ids = torch.cat((IDS, torch.tensor([[2001, 2004]])), 1)
        with torch.no_grad():
            projected = model(ids).logits
            model.get_decoder().prefix_tuning.active = ["flat"]
            torch.testing.assert_close(model(ids).logits, projected, atol=1e-4, rtol=0)

    def test_is_not_merged(self, adapter, tmp_path):
        with pytest.raises(
            UserError, match=r"got peft_type='P_TUNING_V2'; a prefix fits no weight"
        ):
            export(adapter, tmp_path / "out", "native", merge=True)
        with pytest.raises(UserError, match="--merge must come with --format released or native"):
            export(adapter, tmp_path / "out", "prefix", merge=True)


class TestRefused:
    def test_directory_with_weights(self, checkpoint, tmp_path):
        source = write_released(tmp_path / "source", "chatglm3")
        for layout in ("released", "native", "prefix"):
            with pytest.raises(
                UserError, match=r"must not hold weights yet, got .* a new directory"
            ):
                export(checkpoint("chatglm3"), source, layout)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"layout": "native", "flatten": True}, "--flatten must come with --format prefix"),
            ({"layout": "native", "merge": True}, "--merge must be given with an adapter directory"),
            ({"layout": "prefix"}, "an adapter must be .*; give the directory that training wrote"),
        ],
    )  # fmt: skip
    def test_option(self, checkpoint, tmp_path, options, message):
        with pytest.raises(UserError, match=message):
            export(checkpoint("chatglm3", "sharded safetensors"), tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    def test_no_directory(self, tmp_path):
        with pytest.raises(UserError, match="what is exported must be a directory"):
            export(tmp_path / "nothing", tmp_path / "out", "native")

    def test_a_family_that_was_never_released(self, tmp_path):
        sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16}
        config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
        with pytest.raises(UserError, match="got model_type='llama'; export it in the native"):
            export(tmp_path / "llama", tmp_path / "out", "released")
        assert not (tmp_path / "out").exists()


def test_command(checkpoint, tmp_path, capsys):
    source, out = checkpoint("chatglm2"), tmp_path / "out"
    assert cli.main(["export", str(source), str(out), "--format", "native"]) == 0
    assert f"{source}: written to {out} in the native layout, float16, 0.3 MB of weights\n" == (
        capsys.readouterr().out
    )
    assert cli.main(["export", str(source), str(out), "--format", "native"]) == 1
    assert capsys.readouterr().err.startswith("error: the export directory must not hold weights")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", str(source), str(out), "--format", "gguf"])

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, GlmForCausalLM, LlamaConfig, LlamaForCausalLM

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.models.glm_checkpoint import (
    fuse_qkv,
    glm_config,
    released_config,
    released_names,
    save_released,
    split_qkv,
)
from chatglm_ptuning.models.loading import load_base_model, shard_files
from chatglm_ptuning.models.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.tensor_files import read_tensors

GOLDEN = Path(__file__).parent.parent / "golden"
TOLERANCE = {"atol": 2e-4, "rtol": 0}  # the recording's own noise is 5e-5, a wrong epsilon 3e-4

CHATGLM2 = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 13696,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 32768,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.27.1",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GLM4 = CHATGLM2 | {
    "num_layers": 40,
    "padded_vocab_size": 151552,
    "seq_length": 131072,
    "layernorm_epsilon": 1.5625e-07,
    "rope_ratio": 500,
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
    "classifier_dropout": None,
    "attn_implementation": "eager",
}
TINY = CHATGLM2 | {
    "padded_vocab_size": 40,
    "hidden_size": 32,
    "ffn_hidden_size": 24,
    "num_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "seq_length": 64,
}


def recorded(case: str) -> tuple[dict[str, torch.Tensor], dict]:
    config = json.loads((GOLDEN / f"{case}.json").read_text())["config"]
    return load_file(GOLDEN / f"{case}.safetensors"), config


def write_checkpoint(directory: Path, state: dict[str, torch.Tensor], config: dict) -> Path:
    directory.mkdir(exist_ok=True)
    torch.save(state, directory / "pytorch_model.bin")
    (directory / "config.json").write_text(json.dumps({"model_type": "chatglm"} | config))
    return directory


def weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("transformer.")}


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in shard_files(directory) for name, t in read_tensors(file)}


def tiny_model(**changes: object) -> GlmForCausalLM:
    torch.manual_seed(0)
    model = GlmForCausalLM(glm_config(TINY | changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module", params=["v2_plain"])
def case(request, tmp_path_factory):
    tensors, config = recorded(request.param)
    directory = write_checkpoint(tmp_path_factory.mktemp("released"), weights(tensors), config)
    return load_base_model(directory, dtype="float32", device="cpu"), tensors, directory


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
class TestRecorded:
    def test_logits_and_loss(self, case, attention):
        model, tensors, _ = case
        model.set_attn_implementation(attention)
        for batch in [name for name in ("b1", "b3") if f"out.{name}.logits" in tensors]:
            inputs = {key: tensors[f"in.{batch}.{key}"] for key in ("input_ids", "labels")}
            inputs["position_ids"] = tensors[f"in.{batch}.position_ids"]
            with torch.no_grad():
                outputs = model(**inputs, attention_mask=tensors[f"in.{batch}.attention_mask"])
            valid = tensors[f"in.{batch}.valid"].bool()
            expected = tensors[f"out.{batch}.logits"]
            torch.testing.assert_close(outputs.logits[valid], expected[valid], **TOLERANCE)
            torch.testing.assert_close(
                outputs.loss, tensors[f"out.{batch}.loss"].squeeze(), rtol=1e-5, atol=0
            )

    def test_ids_and_labels_alone_give_the_training_loss(self, case, attention):
        model, tensors, _ = case
        model.set_attn_implementation(attention)
        with torch.no_grad():
            loss = model(
                tensors["in.train_rp.input_ids"], labels=tensors["in.train_rp.labels"]
            ).loss
        torch.testing.assert_close(loss, tensors["out.train_rp.loss"].squeeze(), rtol=1e-5, atol=0)

    def test_long_row(self, case, attention):
        model, tensors, _ = case
        model.set_attn_implementation(attention)
        with torch.no_grad():
            logits = model(tensors["in.b1_long.input_ids"]).logits[:, -8:]
        torch.testing.assert_close(logits, tensors["out.b1_long.logits_last8"], **TOLERANCE)

    @pytest.mark.parametrize("cache", ["dynamic", "static", None])
    def test_greedy_tokens(self, case, attention, cache):
        model, tensors, _ = case
        model.set_attn_implementation(attention)
        prompt = tensors["in.gen_b3.input_ids"]
        generated = model.generate(
            prompt,
            attention_mask=tensors["in.gen_b3.attention_mask"],
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=[-1],  # the recording does not stop
            use_cache=cache is not None,
            cache_implementation=cache,
            disable_compile=True,
        )
        expected = tensors["gen.gen_b3.new_tokens"]
        assert generated[:, prompt.shape[1] :].tolist() == expected.tolist()

    def test_cache_after_the_prompt(self, case, attention):
        model, tensors, _ = case
        model.set_attn_implementation(attention)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(
                tensors["in.gen_b3.input_ids"],
                attention_mask=tensors["in.gen_b3.attention_mask"],
                position_ids=tensors["in.gen_b3.position_ids"],
                past_key_values=cache,
            )
        valid = tensors["in.gen_b3.attention_mask"].bool()
        for index, layer in enumerate(cache.layers):
            for kind, states in (("key", layer.keys), ("value", layer.values)):
                expected = tensors[f"past.gen_b3.{index}.{kind}"].permute(1, 0, 2, 3)
                torch.testing.assert_close(
                    states.transpose(1, 2)[valid], expected[valid], **TOLERANCE
                )


def test_recorded_hidden_states_and_gradient(tmp_path):
    tensors, config = recorded("v2_plain")
    model = load_base_model(write_checkpoint(tmp_path, weights(tensors), config), "float32", "cpu")
    inner = model.model(tensors["in.b1.input_ids"], output_hidden_states=True)
    embedding, *after = inner.hidden_states[:-1]
    torch.testing.assert_close(embedding, tensors["hid.b1.embedding"], rtol=0, atol=0)
    for layer, states in enumerate(after):
        expected = tensors[f"hid.b1.after_layer_{layer}"]
        torch.testing.assert_close(states, expected, **TOLERANCE)
    torch.testing.assert_close(inner.last_hidden_state, tensors["hid.b1.final_norm"], **TOLERANCE)
    batch = {key: tensors[f"in.b3.{key}"] for key in ("input_ids", "labels", "position_ids")}
    model(**batch, attention_mask=tensors["in.b3.attention_mask"]).loss.backward()
    attention = model.model.layers[1].self_attn
    rows = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    gradient = torch.cat([part.grad for part in rows])
    expected = tensors["grad.b3.transformer.encoder.layers.1.self_attention.query_key_value.weight"]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("variant", ["no_qkv_bias_noscale", "mha_noscale_prefix"])
def test_recorded_variants(tmp_path, variant):
    """Without biases; with one key and value head per query head, whose rows are interleaved, and a prefix."""
    config = json.loads((GOLDEN / "v3_flag_variants.json").read_text())["variants"][variant]
    tensors = load_file(GOLDEN / "v3_flag_variants.safetensors")
    tensors = {k.split("/")[1]: v for k, v in tensors.items() if k.startswith(f"{variant}/")}
    model = load_base_model(write_checkpoint(tmp_path, weights(tensors), config), "float32", "cpu")
    mask, cache = tensors["in.attention_mask"], None
    valid = mask.bool()
    if (table := tensors.get("transformer.prefix_encoder.embedding.weight")) is not None:
        prefix = table.view(1, 3, 4, 4, 8).permute(2, 0, 3, 1, 4).expand(-1, 2, -1, -1, -1)
        cache = DynamicCache([(prefix[0], prefix[1]), (prefix[2], prefix[3])])
        mask = torch.cat((mask.new_ones(2, 3), mask), dim=1)
    with torch.no_grad():
        logits = model(
            tensors["in.input_ids"],
            attention_mask=mask,
            position_ids=tensors["in.position_ids"],
            past_key_values=cache,
        ).logits
    torch.testing.assert_close(logits[valid], tensors["out.logits"][valid], **TOLERANCE)
    if cache is None:
        save_released(model, tmp_path / "out")
        assert_same_tensors(read_all(tmp_path / "out"), weights(tensors))


def assert_same_tensors(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


class TestConfig:
    def test_chatglm2(self):
        config = glm_config(CHATGLM2)
        expected = {
            "vocab_size": 65024,
            "hidden_size": 4096,
            "intermediate_size": 13696,
            "num_hidden_layers": 28,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "hidden_act": "silu",
            "attention_bias": True,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        }
        assert {key: getattr(config, key) for key in expected} == expected
        assert config.rope_parameters == {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        }

    def test_glm4(self):
        config = glm_config(GLM4)
        assert config.rope_parameters["rope_theta"] == 5_000_000.0
        assert config.rms_norm_eps == 1.5625e-07
        assert config.eos_token_id == [151329, 151336, 151338]
        assert config.pad_token_id == 151329

    def test_chatglm3_32k_raises_the_base(self):
        rope = glm_config(CHATGLM2 | {"rope_ratio": 50}).rope_parameters
        assert (rope["rope_type"], rope["rope_theta"]) == ("default", 500_000.0)

    def test_chatglm2_32k_interpolates_positions(self):
        config = glm_config(TINY | {"num_layers": 28, "rope_ratio": 16})
        frequencies = GlmForCausalLM(config).model.rotary_emb.inv_freq
        plain = 10000 ** -(torch.arange(0, 4, 2) / 4)
        torch.testing.assert_close(frequencies, plain / 16)
        assert released_config(config)["rope_ratio"] == 16

    def test_missing_keys_take_the_released_defaults(self):
        config = glm_config({"model_type": "chatglm", "multi_query_attention": True})
        assert (config.num_hidden_layers, config.vocab_size) == (28, 65024)
        assert (config.num_key_value_heads, config.attention_bias) == (1, False)
        assert (config.eos_token_id, config.pad_token_id) == (2, 0)
        assert config.rope_parameters["rope_theta"] == 10000.0
        heads = glm_config({"model_type": "chatglm", "kv_channels": 128}).num_key_value_heads
        assert heads == 32

    @pytest.mark.parametrize("released", [CHATGLM2, GLM4, TINY, TINY | {"rope_ratio": 1.5}])
    def test_way_back(self, released):
        back = released_config(glm_config(released))
        unread = {"auto_map", "torch_dtype", "transformers_version", "classifier_dropout"}
        expected = {k: v for k, v in released.items() if k not in unread | {"attn_implementation"}}
        assert {key: back.get(key) for key in expected} == expected
        assert glm_config(back).to_dict() == glm_config(released).to_dict()

    def test_way_back_of_chatglm(self):
        config = ChatGLMConfig(num_layers=2, hidden_size=64, num_attention_heads=2)
        back = released_config(config)
        assert back["model_type"] == "chatglm"
        assert back["vocab_size"] == 130528  # the released class has another default
        assert (back["inner_hidden_size"], back["gmask_token_id"]) == (256, 130001)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("rmsnorm", False),
            ("post_layer_norm", False),
            ("add_bias_linear", True),
            ("apply_residual_connection_post_layernorm", True),
            ("fp32_residual_connection", True),
            ("original_rope", False),
            ("interleaved_qkv", True),
            ("hidden_dropout", 0.1),
            ("use_alibi", True),
            ("vision_config", {"hidden_size": 8}),
        ],
    )
    def test_unsupported_switches_are_named(self, key, value):
        with pytest.raises(UserError, match=f"{key}={value!r}"):
            glm_config(CHATGLM2 | {key: value})

    def test_all_unsupported_switches_are_in_one_sentence(self):
        with pytest.raises(UserError, match=r"rmsnorm=False .*add_bias_linear=True"):
            glm_config(CHATGLM2 | {"rmsnorm": False, "add_bias_linear": True})

    @pytest.mark.parametrize(
        "standard", [{"return_dict": True}, {"do_sample": True}, {"_commit": True}, {"note": "x"}]
    )
    def test_keys_that_change_nothing_are_accepted(self, standard):
        assert glm_config(CHATGLM2 | standard).to_dict() == glm_config(CHATGLM2).to_dict()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_layers": "28"}, "num_layers='28'"),
            ({"hidden_size": 0}, "hidden_size=0"),
            ({"multi_query_group_num": 5}, "must divide num_attention_heads=32"),
            ({"pad_token_id": 65024}, "pad_token_id=65024"),
        ],
    )
    def test_wrong_sizes(self, changes, message):
        with pytest.raises(UserError, match=message):
            glm_config(CHATGLM2 | changes)


@pytest.mark.parametrize("bias", [True, False])
def test_names_cover_every_tensor_once(bias):
    model = tiny_model(add_qkv_bias=bias)
    natives = [native for group in released_names(model).values() for native in group]
    assert sorted(natives) == sorted(model.state_dict())


def test_split_qkv():
    fused = torch.arange(8.0)[:, None].expand(-1, 3)  # 2 heads and 1 group of 2 channels
    query, key, value = split_qkv(fused, [4, 2, 2], head_dim=2, interleaved=False)
    assert query[:, 0].tolist() == [0, 1, 2, 3]
    assert key[:, 0].tolist() == [4, 5]
    assert value[:, 0].tolist() == [6, 7]
    assert torch.equal(fuse_qkv([query, key, value], head_dim=2, interleaved=False), fused)


def test_split_qkv_interleaved():
    fused = torch.arange(12.0)  # head 0: q q k k v v, head 1: q q k k v v
    query, key, value = split_qkv(fused, [4, 4, 4], head_dim=2, interleaved=True)
    assert query.tolist() == [0, 1, 6, 7]
    assert key.tolist() == [2, 3, 8, 9]
    assert value.tolist() == [4, 5, 10, 11]
    assert torch.equal(fuse_qkv([query, key, value], head_dim=2, interleaved=True), fused)


class TestSaveReleased:
    def test_recorded_checkpoint_comes_back_bit_for_bit(self, case, tmp_path):
        model, tensors, _ = case
        save_released(model, tmp_path / "out", shard_bytes=100_000)
        files = shard_files(tmp_path / "out")
        assert len(files) > 5
        assert files[0].name == f"pytorch_model-00001-of-{len(files):05d}.bin"
        assert_same_tensors(read_all(tmp_path / "out"), weights(tensors))

    @pytest.mark.parametrize("groups", [2, 4])
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_native_model_comes_back_bit_for_bit(self, tmp_path, groups, dtype):
        model = tiny_model(multi_query_group_num=groups).to(getattr(torch, dtype))
        save_released(model, tmp_path, shard_bytes=10_000)
        again = load_base_model(tmp_path, dtype=dtype, device="cpu")
        assert_same_tensors(again.state_dict(), model.state_dict())
        assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype

    @pytest.mark.parametrize("tie", [True, False])
    def test_chatglm_comes_back_bit_for_bit(self, tmp_path, tie):
        config = ChatGLMConfig(
            vocab_size=30,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=tie,
        )
        model = ChatGLMForConditionalGeneration(config).half()
        save_released(model, tmp_path)
        written = read_all(tmp_path)
        assert "lm_head.weight" in written
        table = written["transformer.layers.1.attention.rotary_emb.inv_freq"]
        assert torch.equal(table, (1 / 10000 ** (torch.arange(0, 8, 2) / 8)).half())
        again = load_base_model(tmp_path, dtype=torch.float16, device="cpu")
        assert_same_tensors(again.state_dict(), model.state_dict())
        assert (again.lm_head.weight is again.transformer.word_embeddings.weight) is tie

    def test_files_are_copied(self, tmp_path):
        (tmp_path / "tokenizer.model").write_bytes(b"pieces")
        save_released(tiny_model(), tmp_path / "out", [tmp_path / "tokenizer.model"])
        assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"

    def test_one_file_has_no_index(self, tmp_path):
        save_released(tiny_model(), tmp_path)
        assert [f.name for f in sorted(tmp_path.iterdir())] == ["config.json", "pytorch_model.bin"]

    def test_weights_in_the_way(self, tmp_path):
        save_released(tiny_model(), tmp_path)
        with pytest.raises(UserError, match="must not hold weights yet"):
            save_released(tiny_model(), tmp_path)

    def test_adapters_must_go_first(self, tmp_path):
        peft = pytest.importorskip("peft")
        model = tiny_model()
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]), "ads")
        with pytest.raises(UserError, match="merge or delete its adapters"):
            save_released(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_other_networks_have_no_released_layout(self, tmp_path):
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        with pytest.raises(UserError, match="model_type='llama'"):
            save_released(LlamaForCausalLM(config), tmp_path)

    def test_another_rotation_has_no_released_layout(self, tmp_path):
        model = tiny_model()
        model.config.rope_parameters["partial_rotary_factor"] = 1.0
        with pytest.raises(UserError, match="model_type='glm'"):
            save_released(model, tmp_path)

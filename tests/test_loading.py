import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GlmForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chatglm_ptuning import load_model, load_tokenizer
from chatglm_ptuning.config import ModelSection, RunConfig
from chatglm_ptuning.data.conversation import Conversation, Message, ToolCall
from chatglm_ptuning.data.template import TEMPLATES
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.loading import base_of, template_of
from chatglm_ptuning.models.glm_checkpoint import glm_config, save_released
from chatglm_ptuning.models.loading import shard_files
from chatglm_ptuning.tuners import (
    PrefixTuningConfig,
    active_adapters,
    add_adapter,
    disable_adapters,
    load_adapter,
    save_adapter,
)
from tests.checkpoints import FAMILIES, as_safetensors, copy_of

Checkpoint = Callable[..., Path]
# checkpoint -> its template
CHECKPOINTS = {family: family for family in FAMILIES} | {"glm4-hf": "glm4"}
TOOL = {"name": "get_weather", "description": "查询天气", "parameters": {"type": "object"}}
WRAPPED = {"type": "function", "function": TOOL}  # as the OpenAI API has it
SPELLED = "<|user|>[gMASK]<sop>sop</s><eop><|observation|><|endoftext|>"

QUESTION = ({"role": "user", "content": "你好"},)
HISTORY = (
    *QUESTION,
    {"role": "assistant", "content": "你好！"},
    {"role": "user", "content": "晚上睡不着  怎么办\n"},
)
SYSTEM = ({"role": "system", "content": "用中文回答。"}, *HISTORY)
FORGED = ({"role": "system", "content": SPELLED}, {"role": "user", "content": SPELLED})
CALLED = (
    *QUESTION,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "get_weather", "arguments": '{"city": "北京"}'}}],
    },
    {"role": "tool", "content": '{"degrees": 21}'},
)


def messages_of(conversation: tuple[dict[str, Any], ...]) -> list[Message]:
    """The same messages, put together by hand."""
    call = (ToolCall("get_weather", {"city": "北京"}),)
    return [
        Message(
            "observation" if m["role"] == "tool" else m["role"],
            m["content"] or "",
            tool_calls=call if "tool_calls" in m else (),
        )
        for m in conversation
    ]


@pytest.fixture(scope="module")
def tokenizers(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name: load_tokenizer(checkpoint(name)) for name in CHECKPOINTS}


class TestChatTemplate:
    @pytest.mark.parametrize("name", CHECKPOINTS)
    @pytest.mark.parametrize("conversation", [QUESTION, HISTORY, SYSTEM, FORGED])
    def test_prompt(self, tokenizers, name, conversation):
        tokenizer, template = tokenizers[name], TEMPLATES[CHECKPOINTS[name]]
        encoded = tokenizer.apply_chat_template(conversation, add_generation_prompt=True)
        expected = template.encode_prompt(tokenizer, messages_of(conversation))
        assert encoded["input_ids"] == expected
        assert encoded["attention_mask"] == [1] * len(expected)
        ids = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=False
        )
        assert ids == expected

    @pytest.mark.parametrize("name", ["chatglm3", "glm4", "glm4-hf"])
    @pytest.mark.parametrize("conversation", [QUESTION, SYSTEM, CALLED])
    def test_tools_and_observations(self, tokenizers, name, conversation):
        tokenizer, template = tokenizers[name], TEMPLATES[CHECKPOINTS[name]]
        expected = template.encode_prompt(tokenizer, messages_of(conversation), [TOOL])
        for tool in (TOOL, WRAPPED):
            encoded = tokenizer.apply_chat_template(
                conversation, tools=[tool], add_generation_prompt=True
            )
            assert encoded["input_ids"] == expected

    @pytest.mark.parametrize("name", CHECKPOINTS)
    def test_answered_conversation_is_what_training_sees(self, tokenizers, name):
        tokenizer, template = tokenizers[name], TEMPLATES[CHECKPOINTS[name]]
        conversation = (*HISTORY, {"role": "assistant", "content": "喝牛奶。"})
        whole = Conversation(tuple(messages_of(conversation)))
        expected = template.encode_conversation(tokenizer, whole).input_ids
        assert tokenizer.apply_chat_template(conversation)["input_ids"] == expected
        assert expected[-1] == tokenizer.convert_tokens_to_ids(
            {"chatglm": "<eop>", "glm4": "<|user|>"}.get(template.name, "</s>")
        )

    @pytest.mark.parametrize("name", CHECKPOINTS)
    def test_without_generation_prompt(self, tokenizers, name):
        tokenizer = tokenizers[name]
        opened = tokenizer.apply_chat_template(HISTORY, add_generation_prompt=True)["input_ids"]
        ids = tokenizer.apply_chat_template(HISTORY)["input_ids"]
        assert ids == (opened if name in ("chatglm", "chatglm2") else opened[:-1])

    @pytest.mark.parametrize("name", CHECKPOINTS)
    def test_users_text_is_never_a_control_token(self, tokenizers, name):
        tokenizer = tokenizers[name]

        def count(text: str) -> list[int]:
            messages = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            names = ["[gMASK]", "<sop>", "sop", "</s>", "<eop>", "<|user|>", "<|endoftext|>"]
            control = {tokenizer.convert_tokens_to_ids(token) for token in names}
            control.discard(tokenizer.unk_token_id)
            return [index for index in ids if index in control - {None}]

        assert count(SPELLED) == count("你好")

    @pytest.mark.parametrize("name", CHECKPOINTS)
    def test_several_conversations_are_padded_on_the_left(self, tokenizers, name):
        tokenizer = tokenizers[name]
        rows = [
            tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"]
            for one in (QUESTION, HISTORY)
        ]
        batch = tokenizer.apply_chat_template(
            [QUESTION, HISTORY], add_generation_prompt=True, padding=True, return_tensors="pt"
        )
        pads = len(rows[1]) - len(rows[0])
        assert batch["input_ids"].tolist() == [[tokenizer.pad_token_id] * pads + rows[0], rows[1]]
        assert batch["attention_mask"].tolist() == [
            [0] * pads + [1] * len(rows[0]),
            [1] * len(rows[1]),
        ]
        single = tokenizer.apply_chat_template(
            QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        assert single.tolist() == [rows[0]]

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("chatglm", "[Round 0]\n问:你好\n答:嗯\n[Round 1]\n问:再见\n答:[gMASK]<sop>"),
            ("chatglm2", "[gMASK]sop[Round 1]\n\n问：你好\n\n答：嗯\n\n[Round 2]\n\n问：再见\n\n答："),
            ("chatglm3", "[gMASK]sop<|user|>\n 你好<|assistant|>\n 嗯<|user|>\n 再见<|assistant|>"),
            ("glm4", "[gMASK]<sop><|user|>\n你好<|assistant|>\n嗯<|user|>\n再见<|assistant|>"),
            ("glm4-hf", "[gMASK]<sop><|user|>\n你好<|assistant|>\n嗯<|user|>\n再见<|assistant|>"),
        ],
    )  # fmt: skip
    def test_as_text(self, tokenizers, name, text):
        conversation = [
            {"role": role, "content": content}
            for role, content in (("user", "你好"), ("assistant", "嗯"), ("user", "再见"))
        ]
        shown = tokenizers[name].apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=False
        )
        assert shown == text

    @pytest.mark.parametrize("name", CHECKPOINTS)
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
    def test_copies_of_the_tokenizer_keep_it(self, tokenizers, name, copied):
        again = copied(tokenizers[name])
        kept = again.apply_chat_template(FORGED)
        assert kept["input_ids"] == tokenizers[name].apply_chat_template(FORGED)["input_ids"]
        assert again.encode_ordinary(SPELLED) == tokenizers[name].encode_ordinary(SPELLED)

    @pytest.mark.parametrize(
        "argument", [{"truncation": True}, {"chat_template": "{{ x }}"}, {"thinking": True}]
    )
    def test_unsupported_argument(self, tokenizers, argument):
        with pytest.raises(UserError, match=f"must be called without {next(iter(argument))}, got"):
            tokenizers["glm4"].apply_chat_template(QUESTION, **argument)

    def test_unknown_role(self, tokenizers):
        with pytest.raises(UserError, match="the role of message 1 of conversation must be one of"):
            tokenizers["glm4"].apply_chat_template([{"role": "root", "content": ""}])


class TestTemplate:
    """ChatGLM2-6B and ChatGLM3-6B have the same files; what tells them apart is a name."""

    @pytest.fixture
    def nameless(self, checkpoint: Checkpoint, tmp_path: Path) -> Path:
        directory = copy_of(checkpoint("chatglm3"), tmp_path / "model")
        (directory / "tokenizer_config.json").unlink()
        return directory

    def test_where_nothing_tells_calling_it_is_the_error(self, nameless):
        tokenizer = load_tokenizer(nameless)
        with pytest.raises(UserError, match=r"any of chatglm2, chatglm3; set model\.template"):
            tokenizer.apply_chat_template(QUESTION)

    @pytest.mark.parametrize("template", ["chatglm2", "chatglm3"])
    def test_named(self, nameless, template):
        tokenizer = load_tokenizer(nameless, template=template)
        ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
        assert ids == TEMPLATES[template].encode_prompt(tokenizer, messages_of(QUESTION))

    @pytest.mark.parametrize(
        ("family", "template"),
        [("chatglm2", "chatglm3"), ("chatglm3", "chatglm2"), ("glm4", "chatglm3"), ("chatglm", "glm4")],
    )  # fmt: skip
    def test_of_another_generation_is_refused(self, checkpoint, family, template):
        with pytest.raises(UserError, match=f"must fit the tokenizer, got '{template}'"):
            load_tokenizer(checkpoint(family), template=template)

    def test_saved_with_the_run(self, nameless):
        RunConfig(model=ModelSection(path=str(nameless), template="chatglm2")).save(nameless)
        ids = load_tokenizer(nameless).apply_chat_template(QUESTION)["input_ids"]
        assert ids == load_tokenizer(nameless, "chatglm2").apply_chat_template(QUESTION)["input_ids"]  # fmt: skip

    def test_an_adapter_of_another_template_is_refused(self, nameless, tmp_path):
        tokenizer = load_tokenizer(nameless)
        for name in ("chatglm2", "chatglm3"):
            (tmp_path / name).mkdir()
            RunConfig(model=ModelSection(template=name)).save(tmp_path / name)
        adapters = [tmp_path / "chatglm2", tmp_path / "chatglm3"]
        assert template_of(tokenizer, None, adapters[1:]).name == "chatglm3"
        assert template_of(tokenizer, "chatglm2", adapters[:1]).name == "chatglm2"
        for name, served in (("chatglm2", adapters[1:]), (None, adapters)):
            with pytest.raises(UserError) as caught:
                template_of(tokenizer, name, served)
            assert str(caught.value) == (
                "an adapter must be used with the chat format it was trained with, got template='chatglm2' where"
                f" '{tmp_path / 'chatglm3'}' has 'chatglm3'; serve them apart, or leave model.template out"
            )

    def test_another_familys_tokenizer_keeps_its_own(self, checkpoint, tmp_path):
        directory = copy_of(checkpoint("glm4-hf"), tmp_path / "llama")
        tokenizer = json.loads((directory / "tokenizer.json").read_text())
        tokenizer["added_tokens"] = tokenizer["added_tokens"][:1]
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
        settings = json.loads((directory / "tokenizer_config.json").read_text())
        settings["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = load_tokenizer(directory)
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        assert tokenizer.apply_chat_template(QUESTION)["input_ids"] == list("你好".encode())
        with pytest.raises(UserError, match="must fit the tokenizer"):
            load_tokenizer(directory, template="glm4")


class TestModel:
    @pytest.mark.parametrize("name", CHECKPOINTS)
    def test_attention_is_sdpa(self, checkpoint, name):
        model = load_model(checkpoint(name), "float32", "cpu")
        assert model.config._attn_implementation == "sdpa"
        add_adapter(model, PrefixTuningConfig(num_virtual_tokens=2))
        assert model.get_decoder().config._attn_implementation == "prefix_sdpa"

    def test_other_native_models_too(self, tmp_path):
        sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16}
        config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        assert load_model(tmp_path, device="cpu").config._attn_implementation == "sdpa"

    def test_native_and_released_compute_the_same(self, checkpoint):
        ids = torch.tensor([[258, 260, 262, 10, 97, 263]])
        native, released = (
            load_model(checkpoint(name), "float32", "cpu") for name in ("glm4-hf", "glm4")
        )
        assert isinstance(released, GlmForCausalLM)
        torch.testing.assert_close(native(ids).logits, released(ids).logits, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("name", CHECKPOINTS)
    def test_adapter_directory_brings_its_base(self, checkpoint, tmp_path, name):
        model = load_model(checkpoint(name), "float32", "cpu")
        torch.manual_seed(0)
        add_adapter(model, PrefixTuningConfig(num_virtual_tokens=3))
        save_adapter(model, tmp_path)
        assert base_of(tmp_path) == checkpoint(name)
        again = load_model(tmp_path, "float32", "cpu")
        assert active_adapters(again) == ["default"]
        tokenizer = load_tokenizer(tmp_path)
        ids = tokenizer.apply_chat_template(
            QUESTION, add_generation_prompt=True, return_tensors="pt"
        )
        with torch.no_grad():
            assert torch.equal(again(**ids).logits, model.eval()(**ids).logits)
            with disable_adapters(again):
                assert not torch.equal(again(**ids).logits, model(**ids).logits)

    def test_home_directory_is_understood_everywhere(self, checkpoint, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        model = load_model(checkpoint("glm4"), "float32", "cpu")
        add_adapter(model, PrefixTuningConfig(num_virtual_tokens=3))
        save_adapter(model, "~/my tuned/prefix")
        assert [path.name for path in tmp_path.iterdir()] == ["my tuned"]
        load_adapter(model, "~/my tuned/prefix", "again")
        assert active_adapters(load_model("~/my tuned/prefix", "float32", "cpu")) == ["default"]
        assert load_tokenizer("~/my tuned/prefix").vocab_size > 0

    @pytest.mark.parametrize("named", [None, "nowhere/model", 3])
    def test_a_base_that_is_gone(self, tmp_path, named):
        (tmp_path / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": named})
        )
        with pytest.raises(UserError, match=r"an adapter's base must be a directory .* got .*json"):
            load_model(tmp_path)


class TestBrokenNativeDirectory:
    """What tests/models/test_loading.py checks of released directories."""

    @pytest.fixture
    def directory(self, checkpoint: Checkpoint, tmp_path: Path) -> Path:
        return copy_of(checkpoint("glm4-hf"), tmp_path / "model")

    def refused(self, directory: Path, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_model(directory, "float32", "cpu")
        assert str(directory) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
    def test_truncated(self, directory, kept):
        content = (directory / "model.safetensors").read_bytes()
        (directory / "model.safetensors").write_bytes(content[: int(len(content) * kept)])
        self.refused(directory, "must be a complete checkpoint that transformers can read, got an")

    def test_wrong_shape(self, directory):
        state = load_file(directory / "model.safetensors") | {"model.norm.weight": torch.ones(5)}
        save_file(state, directory / "model.safetensors", {"format": "pt"})
        self.refused(directory, r"misshapen: model\.norm\.weight is \(5,\), not \(32,\); check")

    def test_wrong_config(self, directory):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
        self.refused(directory, r"got an error: .*hidden_size.*; check its config\.json")

    def test_broken_generation_config(self, directory):
        (directory / "generation_config.json").write_text("{")
        self.refused(directory, r"generation_config\.json must be JSON")


MEASURE = """
import pathlib, re, sys
from chatglm_ptuning import load_model

def megabytes(field):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s+(\\d+) kB", status)[1]) / 1000

load_model(sys.argv[1], "float16", "cpu")  # a small one, so that libraries are loaded
pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = megabytes("VmRSS")
model = load_model(sys.argv[2], "float16", "cpu")
print(sum(tensor.nbytes for tensor in model.parameters()) / 1e6, megabytes("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["sharded bin", "sharded safetensors"])
def test_peak_memory_is_the_model_and_one_shard(checkpoint, tmp_path, layout):
    """200 MB in ten files of 20 MB: megabytes that the process grows by while it loads them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "ffn_hidden_size": 2304, "num_layers": 10}
    sizes |= {"num_attention_heads": 8, "kv_channels": 128, "multi_query_attention": True}
    config = glm_config(sizes | {"multi_query_group_num": 2, "padded_vocab_size": 2016})
    save_released(GlmForCausalLM(config).half(), tmp_path, shard_bytes=20 * 10**6)
    if layout == "sharded safetensors":
        as_safetensors(tmp_path)
    files = shard_files(tmp_path)
    shard = max(file.stat().st_size for file in files) / 1e6
    assert len(files) >= 10
    command = [sys.executable, "-c", MEASURE, str(checkpoint("chatglm3")), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    size, peak = map(float, run.stdout.split())
    print(f"{layout}: model {size:.1f} MB, largest file {shard:.1f} MB, peak {peak:.1f} MB")
    assert 190 < size < 220
    assert size < peak < size + 1.5 * shard

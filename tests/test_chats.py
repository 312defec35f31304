"""Whole chats of the released code of all three generations, a prefix included: ids and text, from files to answers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chatglm_ptuning.loading import load_model, load_tokenizer, template_of
from chatglm_ptuning.serving.text import AnswerText
from chatglm_ptuning.tuners import delete_adapter, disable_adapters, load_adapter

GOLDEN = Path(__file__).parent / "golden"
PREFIX = "transformer.prefix_encoder.embedding.weight"
CHATGLM, CHATGLM2, CHATGLM3 = (
    json.loads((GOLDEN / f"e2e_v{version}.json").read_text(encoding="utf-8"))
    for version in (1, 2, 3)
)
RECORDED = [("chatglm", CHATGLM), ("chatglm2", CHATGLM2), ("chatglm3", CHATGLM3)]
CHATS = [(name, case) for name, recorded in RECORDED for case in recorded["chat"]]
STREAMS = [(name, case) for name, recorded in RECORDED for case in recorded["stream_chat"]]


class Chat:
    """A model, its tokenizer and its template, opened from files as a user would."""

    def __init__(self, recorded: dict[str, Any], name: str, directory: Path) -> None:
        state = load_file(GOLDEN / f"e2e_{recorded['generation']}.safetensors")
        self.prefix = directory / "prefix"
        self.prefix.mkdir()
        torch.save({PREFIX: state.pop(PREFIX)}, self.prefix / "pytorch_model.bin")
        torch.save(state, directory / "pytorch_model.bin")
        (directory / "config.json").write_text(json.dumps(recorded["config"]))
        for file in (GOLDEN / recorded["tokenizer"]).iterdir():
            shutil.copy(file, directory)
        self.model = load_model(directory, "float32", "cpu")
        load_adapter(self.model, self.prefix)
        self.tokenizer = load_tokenizer(directory)
        self.template = template_of(self.tokenizer, None, [])  # told by the name in its files
        assert self.template.name == name

    def prompt(self, case: dict[str, Any]) -> list[int]:
        messages = []
        for turn in case["history"]:
            roles = ("user", "assistant")
            messages += [turn] if isinstance(turn, dict) else [
                {"role": role, "content": text} for role, text in zip(roles, turn, strict=True)
            ]  # fmt: skip
        messages.append({"role": "user", "content": case["query"]})
        encoded = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return encoded["input_ids"]

    def generate(
        self, rows: list[list[int]], count: int, cache: str | None = None
    ) -> list[list[int]]:
        ids = torch.tensor(rows)
        mask = (ids != self.tokenizer.pad_token_id).long()
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=count,
            cache_implementation=cache,
            disable_compile=True,
        )
        return output[:, ids.shape[1] :].tolist()

    def text(self, ids: list[int]) -> str:
        return self.template.parse_response(self.tokenizer.decode(ids)).content


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chat]:
    return {
        name: Chat(recorded, name, tmp_path_factory.mktemp(name)) for name, recorded in RECORDED
    }


@pytest.mark.parametrize(("name", "case"), CHATS)
def test_chat(chats: dict[str, Chat], name: str, case: dict[str, Any]) -> None:
    chat = chats[name]
    prompt = chat.prompt(case)
    assert [prompt] == case["prompt_ids"]
    [answer] = chat.generate([prompt], case["kwargs"]["max_length"] - len(prompt))
    assert answer == case["generated_ids"]
    # the released ChatGLM3 takes the last token for an end token and drops it, whatever it is
    assert chat.text(answer if name != "chatglm3" else answer[:-1]) == case["response"]


@pytest.mark.parametrize(("name", "recorded"), RECORDED)
@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_and_cache(
    chats: dict[str, Chat], name: str, recorded: dict[str, Any], cache: str, attention: str
) -> None:
    chat, case, batch = chats[name], recorded["chat"][3], recorded["batch"]
    model = chat.model
    delete_adapter(model, "default")
    model.set_attn_implementation(attention)
    load_adapter(model, chat.prefix)
    assert model.config._attn_implementation == f"prefix_{attention}"
    count = 8  # tokens; all of them are in the tests beside this one
    assert chat.generate(case["prompt_ids"], count, cache) == [case["generated_ids"][:count]]
    answers = chat.generate(batch["input_ids"], count, cache)
    assert answers == [ids[:count] for ids in batch["new_tokens"]]


@pytest.mark.parametrize(("name", "case"), STREAMS)
def test_stream(chats: dict[str, Chat], name: str, case: dict[str, Any]) -> None:
    chat = chats[name]
    prompt = chat.prompt(case)
    [answer] = chat.generate([prompt], case["kwargs"]["max_length"] - len(prompt))
    shown = answer if name != "chatglm3" else answer[:-1]
    texts = [chat.text(shown[:count]) for count in range(1, len(shown) + 1)]
    # the stream of the released ChatGLM stops before it yields the token that reaches the limit
    yielded = texts if name != "chatglm" else texts[:-1]
    assert [text for text in yielded if not text.endswith("\ufffd")] == case["responses"]

    pieces = AnswerText(chat.tokenizer.decode, chat.template.parse_response)
    streamed = "".join([*map(pieces.push, shown), pieces.close()])
    assert streamed == texts[-1].rstrip("\ufffd")


@pytest.mark.parametrize(("name", "recorded"), RECORDED)
def test_batch(chats: dict[str, Chat], name: str, recorded: dict[str, Any]) -> None:
    chat, batch = chats[name], recorded["batch"]
    encoded = chat.tokenizer(batch["texts"], padding=True)
    assert encoded["input_ids"] == batch["input_ids"]
    answers = chat.generate(encoded["input_ids"], batch["max_new_tokens"])
    assert answers == batch["new_tokens"]
    assert [chat.tokenizer.decode(ids) for ids in answers] == batch["decoded_no_cleanup"]
    skipped = [chat.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    assert skipped == batch["decoded_skip_special"]


def test_the_prefix_matters(chats: dict[str, Chat]) -> None:
    chat, case = chats["chatglm2"], CHATGLM2["chat"][0]
    with disable_adapters(chat.model):
        assert chat.generate(case["prompt_ids"], 24) != [case["generated_ids"]]

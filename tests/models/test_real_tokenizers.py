"""The released tokenizer files, for whoever has them: strings and ids that are known of the real models.

Set CHATGLM_PTUNING_REAL_TOKENIZERS to a folder that holds any of chatglm-6b, chatglm2-6b, chatglm3-6b, glm-4-9b-chat.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from chatglm_ptuning.models.tokenization_base import TableTokenizer
from chatglm_ptuning.models.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.models.tokenization_chatglm2 import ChatGLM2Tokenizer
from chatglm_ptuning.models.tokenization_glm4 import ChatGLM4Tokenizer

VARIABLE = "CHATGLM_PTUNING_REAL_TOKENIZERS"
FACTS = json.loads(
    (Path(__file__).resolve().parents[1] / "golden" / "real_tokenizer_facts.json").read_text(encoding="utf-8")
)  # fmt: skip
FAMILIES = {
    "chatglm": ("chatglm-6b", ChatGLMTokenizer),
    "chatglm2": ("chatglm2-6b", ChatGLM2Tokenizer),
    "chatglm3": ("chatglm3-6b", ChatGLM2Tokenizer),
    "chatglm4": ("glm-4-9b-chat", ChatGLM4Tokenizer),
}


def open_real(family: str) -> TableTokenizer:
    name, tokenizer_class = FAMILIES[family]
    if VARIABLE not in os.environ:
        pytest.skip(f"{VARIABLE} names no folder with the released tokenizer files")
    directory = Path(os.environ[VARIABLE], name)
    if not directory.is_dir():
        pytest.skip(f"{VARIABLE} holds no {name}")
    return tokenizer_class.from_pretrained(directory)


def chat_ids(tokenizer: TableTokenizer, family: str, messages: list[dict[str, Any]]) -> list[int]:
    """The prompt of ChatGLM3 or GLM-4, put together from what the tokenizer gives."""
    start = ["[gMASK]", "sop" if family == "chatglm3" else "<sop>"]
    ids = tokenizer.convert_tokens_to_ids(start)
    for message in messages:
        head, content = message.get("metadata", "") + "\n", message["content"]
        # ChatGLM3 encodes the two apart, so that each begins with the dummy blank
        parts = [head, content] if family == "chatglm3" else [head + content]
        ids.append(tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"))
        ids += [index for part in parts for index in tokenizer.encode_ordinary(part)]
    return [*ids, tokenizer.convert_tokens_to_ids("<|assistant|>")]


@pytest.mark.parametrize("family", FAMILIES)
def test_known_strings_have_their_ids(family: str) -> None:
    tokenizer, facts = open_real(family), FACTS[family]
    for token, index in facts.get("special_ids", {}).items():
        assert tokenizer.convert_tokens_to_ids(token) == index, token
    texts = facts["encode"] + (FACTS["codegeex2"]["encode"] if family == "chatglm2" else [])
    for entry in texts:
        assert tokenizer.encode(entry["text"]) == entry["ids"]
        if family != "chatglm":  # whose vocabulary makes full-width punctuation half-width
            assert tokenizer.decode(entry["ids"], skip_special_tokens=True) == entry["text"]
    for entry in facts.get("tiktoken_encode_ordinary", []):
        assert tokenizer.encode_ordinary(entry["text"]) == entry["ids"]
        assert tokenizer.decode(entry["ids"]) == entry["text"]


@pytest.mark.parametrize("family", ["chatglm3", "chatglm4"])
def test_known_chats_have_their_ids(family: str) -> None:
    tokenizer = open_real(family)
    for chat in FACTS[family]["chat"]:
        assert chat_ids(tokenizer, family, chat["messages"]) == chat["ids"]


@pytest.mark.parametrize(
    ("family", "role_tokens"), [("chatglm2", False), ("chatglm3", True)]
)  # fmt: skip
def test_generations_are_told_apart(family: str, role_tokens: bool) -> None:
    assert open_real(family).role_tokens is role_tokens

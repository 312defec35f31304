import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models.tokenization_chatglm2 import (
    CONTROL_TOKENS,
    ROLE_TOKENS,
    ChatGLM2Tokenizer,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
RECORDED = {
    version: json.loads((GOLDEN / f"tokenizer_{version}.json").read_text(encoding="utf-8"))
    for version in ("v2", "v3")
}
TOKENIZERS = {
    version: ChatGLM2Tokenizer.from_pretrained(GOLDEN / f"tokenizer_{version}")
    for version in RECORDED
}
ENTRIES = [(version, entry) for version in RECORDED for entry in RECORDED[version]["encode"]]
CALLS = [(version, name) for version in RECORDED for name in RECORDED[version]["calls"]]
SPELLINGS = [*CONTROL_TOKENS, *ROLE_TOKENS, "</s>", "<s>", "<unk>", "<sop>", "<eop>"]


def recorded(entry: dict[str, Any], field: str) -> Any:
    """A field of an encode entry, its `=other` references resolved."""
    value = entry.get(field)
    return entry[value[1:]] if isinstance(value, str) and value in ("=ids", "=decode") else value


@pytest.mark.parametrize(
    ("version", "entry"), ENTRIES, ids=lambda value: repr(value["text"][:20]) if isinstance(value, dict) else value
)  # fmt: skip
def test_encode_and_decode_equal_the_recording(version: str, entry: dict[str, Any]) -> None:
    tokenizer, text, ids = TOKENIZERS[version], entry["text"], entry["ids"]
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.encode(text) == entry["ids_with_special"]
    assert tokenizer.encode_ordinary(text) == recorded(entry, "sp_encode")
    if "tokens" in entry:
        assert tokenizer.tokenize(text) == entry["tokens"]
        assert tokenizer.convert_ids_to_tokens(ids) == entry["tokens"]
    decoded = recorded(entry, "decode_no_cleanup")
    assert tokenizer.decode(ids) == decoded
    if "decode_cleanup" in entry:
        cleaned = tokenizer.decode(ids, clean_up_tokenization_spaces=True)
        assert cleaned == entry["decode_cleanup"]
    if "decode_with_special" in entry:
        assert tokenizer.decode(entry["ids_with_special"]) == entry["decode_with_special"]
    # the released code skips nothing
    assert tokenizer.decode(entry["ids_with_special"], skip_special_tokens=True) == decoded


@pytest.mark.parametrize(("version", "name"), CALLS)
def test_calls_equal_the_recording(version: str, name: str) -> None:
    call = RECORDED[version]["calls"][name]
    ours = TOKENIZERS[version](*call["args"], **call["kwargs"])
    if "return_tensors" in call["kwargs"]:
        ours = {key: value.tolist() for key, value in ours.items()}
    assert ours["input_ids"] == call["output"]["input_ids"]
    if call["kwargs"].get("return_attention_mask", True):
        assert ours["attention_mask"] == call["output"]["attention_mask"]
    if "special_tokens_mask" in ours:
        assert ours["special_tokens_mask"] == [1, 1, 0]
    assert "position_ids" not in ours


@pytest.mark.parametrize("version", RECORDED)
def test_pad_equals_the_recording(version: str) -> None:
    expected = RECORDED[version]["pad_method"]
    rows = [[index for index in row if index != 0] for row in expected["input_ids"]]
    padded = TOKENIZERS[version].pad({"input_ids": rows}, return_tensors="pt")
    assert padded["input_ids"].tolist() == expected["input_ids"]
    assert padded["attention_mask"].tolist() == expected["attention_mask"]
    own = RECORDED[version]["pad_method_with_own_attention_mask"]
    padded = TOKENIZERS[version].pad(
        {"input_ids": [[7, 8, 9], [7]], "attention_mask": [[1, 1, 0], [1]]}
    )
    assert padded["attention_mask"] == own["attention_mask"]
    assert padded["input_ids"] == own["input_ids"]
    right = TOKENIZERS[version].pad({"input_ids": rows}, padding_side="right")
    assert right["input_ids"][0] == rows[0] + [0] * 7
    assert right["attention_mask"][0] == [1] * 3 + [0] * 7


@pytest.mark.parametrize("version", RECORDED)
def test_info_equals_the_recording(version: str) -> None:
    tokenizer, info = TOKENIZERS[version], RECORDED[version]["info"]
    for name in (
        "vocab_size", "pad_token", "pad_token_id", "eos_token", "eos_token_id", "bos_token_id", "padding_side",
    ):  # fmt: skip
        assert getattr(tokenizer, name) == info[name], name
    assert len(tokenizer) == len(tokenizer.get_vocab()) == info["len"]
    tokens = info["convert_tokens_to_ids"]
    assert tokenizer.convert_tokens_to_ids(list(tokens)) == list(tokens.values())
    for index, text in info["decode_single"].items():
        assert tokenizer.decode(int(index)) == tokenizer.decode([int(index)]) == text
    for index, piece in info["id_to_token"].items():
        if piece:  # the released code gives control tokens the empty name
            assert tokenizer.convert_ids_to_tokens(int(index)) == piece
    added = [tokenizer.num_special_tokens_to_add(pair) for pair in (False, True)]
    assert added == info["num_special_tokens_to_add"]
    built = RECORDED[version]["build_inputs_with_special_tokens"]
    first, second = built["a"], built["b"]
    assert tokenizer.build_inputs_with_special_tokens(first) == built["single"]
    assert tokenizer.build_inputs_with_special_tokens(first, second) == built["pair"]
    assert tokenizer.build_inputs_with_special_tokens([]) == built["empty"]
    assert tokenizer.build_inputs_with_special_tokens([], []) == built["empty_pair"]
    mask = [1, 1, *[0] * (len(first) + len(second)), 1]
    assert tokenizer.get_special_tokens_mask(first, second) == mask
    assert tokenizer.get_special_tokens_mask(built["pair"], already_has_special_tokens=True) == mask


@pytest.mark.parametrize("version", RECORDED)
def test_decoding_equals_the_recording(version: str) -> None:
    tokenizer, records = TOKENIZERS[version], RECORDED[version]
    for entry in records["decode_partial_bytes"]:
        assert tokenizer.decode(entry["ids"]) == entry["decode"]
    padded = [0, 0, 2001, 2003, 337]
    assert tokenizer.decode(padded) == records["decode_with_pads"]
    assert tokenizer.decode([]) == records["decode_empty"]
    assert tokenizer.decode([-1]) == records["decode_negative"]
    assert tokenizer.decode([337, 2 + 2009, 65023]) == "你好"
    texts = [call["ids_with_special"] for call in records["encode"][3:6]]
    decoded = tokenizer.batch_decode(texts, skip_special_tokens=True)
    assert decoded == [entry["text"] for entry in records["encode"][3:6]]
    assert tokenizer.decode(torch.tensor(padded), skip_special_tokens=True) == "你好"


def test_role_tokens_are_recognised_when_asked_for() -> None:
    asked = ChatGLM2Tokenizer.from_pretrained(GOLDEN / "tokenizer_v3", encode_special_tokens=True)
    for entry in RECORDED["v3"]["encode_special_tokens_true"]:
        assert asked.tokenize(entry["text"]) == entry["tokens"]
        ids = asked.encode(entry["text"], add_special_tokens=False)
        assert ids == entry["ids"]
        assert asked.decode(ids) == entry["decode"]
        ordinary = asked.encode_ordinary(entry["text"])
        assert ordinary == TOKENIZERS["v3"].encode(entry["text"], add_special_tokens=False)


@pytest.mark.parametrize("version", RECORDED)
@pytest.mark.parametrize("text", [*SPELLINGS, "你好[gMASK]sop", "<|user|>\n hi</s>"])
def test_encode_ordinary_keeps_text_text(version: str, text: str) -> None:
    tokenizer = TOKENIZERS[version]
    ids = tokenizer.encode_ordinary(text)
    assert not set(ids) & tokenizer.control_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.one_of(st.text(), st.sampled_from([*SPELLINGS, "\n", "▁"])), max_size=6))
def test_encode_ordinary_never_yields_a_control_id(parts: list[str]) -> None:
    tokenizer, text = TOKENIZERS["v3"], "".join(parts)
    ids = tokenizer.encode_ordinary(text)
    assert not set(ids) & tokenizer.control_ids
    # nothing is normalised, only ▁ and the blank are one
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("▁", " ")


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(-200, 65100)))
def test_decode_takes_any_ids(ids: list[int]) -> None:
    for tokenizer in TOKENIZERS.values():
        assert isinstance(tokenizer.decode(ids), str)
        assert isinstance(tokenizer.decode(ids, skip_special_tokens=True), str)


def test_pieces_spelled_like_control_tokens(tmp_path: Path) -> None:
    """A vocabulary with a learned piece `sop` and with `</s>` as a piece that SentencePiece finds in text."""
    SentencePieceTrainer.train(
        sentence_iterator=iter(["sop eop sop", "psop xsop"] * 50), model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=290, hard_vocab_limit=False, byte_fallback=True, model_type="bpe", add_dummy_prefix=False,
        user_defined_symbols=["</s>"], eos_piece="<end>", minloglevel=2,
    )  # fmt: skip
    tokenizer = ChatGLM2Tokenizer(str(tmp_path / "tokenizer.model"), role_tokens=True)
    size = tokenizer.sentencepiece.get_piece_size()
    assert tokenizer.convert_tokens_to_ids("sop") == size + 3
    assert "sop" in tokenizer.sentencepiece.encode("sop", out_type=str)
    assert tokenizer.eos_token_id in tokenizer.encode("a</s>", add_special_tokens=False)
    for text in ("sop", "xsop", "a</s>b"):
        ids = tokenizer.encode_ordinary(text)
        assert not set(ids) & tokenizer.control_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def write(directory: Path, **files: str) -> Path:
    directory.mkdir(exist_ok=True)
    shutil.copy(GOLDEN / "tokenizer_v2" / "tokenizer.model", directory)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config__json": '{"name_or_path": "THUDM/chatglm2-6b"}'}, False),
        ({"tokenizer_config__json": '{"name_or_path": "THUDM/chatglm3-6b-base"}'}, True),
        ({"config__json": '{"_name_or_path": "/data/chatglm3/chatglm2-6b-32k"}'}, False),
        ({"config__json": '{"_name_or_path": "/data/chatglm2-mine/model"}'}, None),
        (
            {
                "config__json": '{"_name_or_path": "chatglm3-6b"}',
                "tokenizer_config__json": '{"name_or_path": "chatglm2-6b"}',
            },
            None,
        ),
        ({"tokenization_chatglm__py": 'roles = ["<|system|>", "<|user|>"]'}, True),
        ({"tokenization_chatglm__py": 'special_tokens = ["[MASK]", "[gMASK]"]'}, False),
        ({"chat_template__jinja": "[gMASK]sop<|{{ message['role'] }}|>"}, True),
        ({"chat_template__jinja": "[Round {{ n }}]"}, None),
        ({"tokenizer_config__json": '{"additional_special_tokens": ["<|user|>"]}'}, True),
        (
            {
                "tokenization_chatglm__py": "[gMASK]",
                "config__json": '{"_name_or_path": "chatglm3-6b"}',
            },
            False,
        ),
    ],
)
def test_role_tokens_are_read_off_the_directory(
    tmp_path: Path, files: dict[str, str], expected: bool | None
) -> None:
    tokenizer = ChatGLM2Tokenizer.from_pretrained(write(tmp_path, **files))
    assert tokenizer.role_tokens is expected
    has_role = tokenizer.convert_tokens_to_ids("<|user|>") == 2006
    assert has_role is (expected is not False)
    assert ("<|user|>" in tokenizer.get_vocab()) is (expected is not False)


@pytest.mark.parametrize("role_tokens", [True, False, None])
def test_save_and_reload_keep_everything(tmp_path: Path, role_tokens: bool | None) -> None:
    source = write(tmp_path / "source")
    tokenizer = ChatGLM2Tokenizer.from_pretrained(source, role_tokens=role_tokens)
    tokenizer.padding_side = "right"
    tokenizer.encode_special_tokens = True
    tokenizer.save_pretrained(tmp_path / "saved")
    shutil.rmtree(source)
    again = ChatGLM2Tokenizer.from_pretrained(tmp_path / "saved")
    assert again.role_tokens is role_tokens
    assert again.padding_side == "right"
    assert again.get_vocab() == tokenizer.get_vocab()
    text = "你好 <|user|></s> sop"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(range(2009)) == tokenizer.decode(range(2009))


def test_broken_files_are_named_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"must be an existing file, got vocab_file=None; copy"):
        ChatGLM2Tokenizer.from_pretrained(tmp_path)
    whole = (GOLDEN / "tokenizer_v2" / "tokenizer.model").read_bytes()
    for length in (0, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "tokenizer.model").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"must be a whole SentencePiece .*tokenizer\.model"):
            ChatGLM2Tokenizer.from_pretrained(tmp_path)


def test_half_a_surrogate_pair_is_named() -> None:
    for encode in (TOKENIZERS["v2"].encode, TOKENIZERS["v2"].encode_ordinary):
        with pytest.raises(UserError, match=r"got character='\\ud83d' at position 2"):
            encode("你好\ud83d")

import base64
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models.tokenization_glm4 import (
    CONTROL_TOKENS,
    ChatGLM4Tokenizer,
    is_rank_file,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TEXT = "你好，世界！今天天气很好。 Hello world, it's a fine day. I'll say 1234 or 12345.\n\n\n It'llx'llX 'LLx  b  b"
MERGES = 95
WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def words_of(text: str) -> list[list[bytes]]:
    return [
        [bytes([byte]) for byte in word.encode("utf-8")] for word in regex.findall(WORD, text)
    ]  # fmt: skip


def merge(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged: list[bytes] = []
    for part in word:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def train_ranks(text: str) -> dict[bytes, int]:
    """Byte-pair merges by frequency, some across the borders of words; the first ranks are the bytes, backwards."""
    ranks = {bytes([255 - byte]): byte for byte in range(256)}
    words = [[bytes([byte]) for byte in text.encode("utf-8")] * 2, *words_of(text)]
    while len(ranks) < 256 + MERGES:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[best[0] + best[1]] = len(ranks)
        words = [merge(word, best) for word in words]
    return ranks


RANKS = train_ranks(TEXT)
SIZE = len(RANKS)


def reference_ids(text: str) -> list[int]:
    """Merge the pair of lowest rank until no pair of a word has one."""
    ids = []
    for word in words_of(text):
        while pairs := [pair for pair in pairwise(word) if pair[0] + pair[1] in RANKS]:
            lowest = min(pairs, key=lambda pair: RANKS[pair[0] + pair[1]])
            at = next(i for i, pair in enumerate(pairwise(word)) if pair == lowest)
            word[at : at + 2] = [word[at] + word[at + 1]]
        ids += [RANKS[part] for part in word]
    return ids


def rank_lines() -> list[str]:
    return [f"{base64.b64encode(token).decode()} {rank}" for token, rank in RANKS.items()]


def write(directory: Path, lines: list[str]) -> Path:
    """A released directory with an own vocabulary: the special ids are spelled out in the configuration."""
    (directory / "tokenizer.model").write_text("\n".join(lines) + "\n")
    added = {
        str(SIZE + position): {"content": token, "special": True, "normalized": False}
        for position, token in enumerate(CONTROL_TOKENS)
    }
    settings = {
        "tokenizer_class": "ChatGLM4Tokenizer", "added_tokens_decoder": added, "padding_side": "left",
        "additional_special_tokens": CONTROL_TOKENS, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        "model_max_length": 128000, "do_lower_case": False, "remove_space": False,
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatGLM4Tokenizer:
    return ChatGLM4Tokenizer.from_pretrained(write(tmp_path_factory.mktemp("glm4"), rank_lines()))


@pytest.mark.parametrize(
    "text",
    [
        TEXT, "", " ", "你好", "hello\tworld\r\n  x", "WE'LL it's", "1234567 12345", "fine.\n\n\n It'llx", "'LLx",
        "a  b", "\n\nb", "👋🏽 é 𠮷", "  \n \n", "<|user|>",
    ],
)  # fmt: skip
def test_ordinary_ids_are_the_merges_of_lowest_rank(
    tokenizer: ChatGLM4Tokenizer, text: str
) -> None:
    ids = tokenizer.encode_ordinary(text)
    assert ids == reference_ids(text)
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < SIZE


def test_control_tokens_follow_the_ranks(tokenizer: ChatGLM4Tokenizer, tmp_path: Path) -> None:
    ids = tokenizer.convert_tokens_to_ids(CONTROL_TOKENS)
    assert ids == list(range(SIZE, SIZE + 14))
    assert ids[CONTROL_TOKENS.index("[gMASK]")] == SIZE + 2
    assert ids[CONTROL_TOKENS.index("<sop>")] == SIZE + 4
    assert ids[CONTROL_TOKENS.index("<|user|>")] == SIZE + 7
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == SIZE
    assert tokenizer.vocab_size == len(tokenizer) == len(tokenizer.get_vocab()) == SIZE + 14
    assert tokenizer.convert_tokens_to_ids("<|nobody|>") is None
    bare = ChatGLM4Tokenizer(str(Path(tokenizer.name_or_path) / "tokenizer.model"))
    assert bare.get_vocab() == tokenizer.get_vocab()
    assert bare.encode("hi<|user|>") == tokenizer.encode("hi<|user|>")


def test_encode_adds_the_prefix_and_recognises_control_tokens(tokenizer: ChatGLM4Tokenizer) -> None:
    hello, world = reference_ids("hello"), reference_ids(" world")
    assert tokenizer.encode("hello") == [SIZE + 2, SIZE + 4, *hello]
    assert tokenizer.encode("hello", " world") == [SIZE + 2, SIZE + 4, *hello, *world, SIZE]
    mixed = tokenizer.encode("hello<|assistant|> world", add_special_tokens=False)
    assert mixed == [*hello, SIZE + 8, *world]
    assert tokenizer.decode(mixed) == "hello<|assistant|> world"
    assert tokenizer.decode(mixed, skip_special_tokens=True) == "hello world"
    assert tokenizer.get_special_tokens_mask(hello) == [1, 1, *[0] * len(hello)]


def test_tokens_are_byte_level(tokenizer: ChatGLM4Tokenizer) -> None:
    tokens = tokenizer.tokenize(" hello 你<sop>")
    assert tokens[-1] == "<sop>"
    assert "".join(tokens[:-1]) == "ĠhelloĠä½ł"
    assert tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(tokens)) == tokens
    assert tokenizer.convert_tokens_to_string(tokens) == " hello 你<sop>"
    tokenizer.add_tokens(["新词"])
    assert tokenizer.decode(tokenizer.encode_ordinary("新词")) == "新词"
    assert tokenizer.decode(tokenizer.encode("a新词", add_special_tokens=False)) == "a新词"


def test_batches_are_padded_on_the_left(tokenizer: ChatGLM4Tokenizer) -> None:
    short, long = (tokenizer.encode(text) for text in ("你", "hello world 123"))
    missing = len(long) - len(short)
    batch = tokenizer(["你", "hello world 123"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[SIZE] * missing + short, long]
    assert batch["attention_mask"].tolist() == [
        [0] * missing + [1] * len(short),
        [1] * len(long),
    ]
    decoded = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert decoded == ["你", "hello world 123"]


def test_unfinished_characters_decode_to_replacements(tokenizer: ChatGLM4Tokenizer) -> None:
    wave = [RANKS[bytes([byte])] for byte in "👋".encode()]
    for length in range(1, 4):
        assert tokenizer.decode(wave[:length]) == "�"
        assert tokenizer.decode([*wave[:length], SIZE + 7]) == "�<|user|>"
    assert tokenizer.decode(wave) == "👋"


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.one_of(st.text(), st.sampled_from([*CONTROL_TOKENS, "\n"])), max_size=6))
def test_encode_ordinary_never_yields_a_control_id(
    tokenizer: ChatGLM4Tokenizer, parts: list[str]
) -> None:
    ids = tokenizer.encode_ordinary("".join(parts))
    assert not set(ids) & tokenizer.control_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(parts)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(-200, SIZE + 20), st.integers(0, 151552))))
def test_decode_takes_any_ids(tokenizer: ChatGLM4Tokenizer, ids: list[int]) -> None:
    assert isinstance(tokenizer.decode(ids), str)
    assert isinstance(tokenizer.decode(ids, skip_special_tokens=True), str)


def test_save_and_reload_keep_everything(tokenizer: ChatGLM4Tokenizer, tmp_path: Path) -> None:
    changed = ChatGLM4Tokenizer.from_pretrained(tokenizer.name_or_path, padding_side="right")
    changed.save_pretrained(tmp_path)
    again = ChatGLM4Tokenizer.from_pretrained(tmp_path)
    assert again.padding_side == "right"
    assert again.model_max_length == 128000
    assert again.get_vocab() == changed.get_vocab()
    assert again.all_special_tokens == changed.all_special_tokens == CONTROL_TOKENS
    assert again.encode(TEXT + "<|user|>") == changed.encode(TEXT + "<|user|>")


def test_rank_files_are_told_from_sentencepiece() -> None:
    assert is_rank_file("\n".join(rank_lines()).encode())
    assert is_rank_file(b"IQ== 0\r\nIg== 1\r\n")
    assert not is_rank_file((GOLDEN / "tokenizer_v2" / "tokenizer.model").read_bytes())
    assert not is_rank_file(b"")


def test_ranks_may_come_in_any_order(tokenizer: ChatGLM4Tokenizer, tmp_path: Path) -> None:
    shuffled = ChatGLM4Tokenizer.from_pretrained(write(tmp_path, rank_lines()[::-1]))
    assert shuffled.get_vocab().items() >= tokenizer.token_ids.items()
    assert shuffled.encode_ordinary(TEXT) == reference_ids(TEXT)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["gibberish", *rank_lines()[1:]], r":1: a line must be a base64 token and its rank"),
        (["IQ== zero", *rank_lines()[1:]], r":1: a line must be a base64 token and its rank"),
        ([*rank_lines()[:9], "I?Q== 9"], r":10: a line must be .*got b'I\?Q== 9'"),
        ([*rank_lines(), "", "aGVs 999"], rf":{SIZE + 1}: a line must be"),
        ([*rank_lines(), "aGVs 7"], rf":{SIZE + 1}: a rank must be given once, got rank=7 again"),
        ([*rank_lines(), f"aGVs {SIZE + 1}"], "without a gap"),
        ([*rank_lines(), f"{rank_lines()[-1].split()[0]} {SIZE}"], "without a gap"),
        (rank_lines()[:200], "must hold every byte as a token, got none for byte=0"),
        (rank_lines()[:-1], rf"must hold the {SIZE} tokens .*, got {SIZE - 1} in"),
    ],
)
def test_broken_files_are_named_in_one_sentence(
    tmp_path: Path, lines: list[str], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        ChatGLM4Tokenizer.from_pretrained(write(tmp_path, lines))


def test_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"must be an existing file, got vocab_file=None; copy"):
        ChatGLM4Tokenizer.from_pretrained(tmp_path)


def test_half_a_surrogate_pair_is_named(tokenizer: ChatGLM4Tokenizer) -> None:
    for encode in (tokenizer.encode, tokenizer.encode_ordinary):
        with pytest.raises(UserError, match=r"got character='\\ud83d' at position 2"):
            encode("你好\ud83d")

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models.loading import read_json
from chatglm_ptuning.models.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.models.tokenization_chatglm2 import ChatGLM2Tokenizer
from chatglm_ptuning.models.tokenization_glm4 import ChatGLM4Tokenizer
from chatglm_ptuning.models.tokenizer_loading import load_tokenizer
from tests.checkpoints import copy_of

Checkpoint = Callable[..., Path]
CLASSES = {
    "chatglm": ChatGLMTokenizer,
    "chatglm2": ChatGLM2Tokenizer,
    "chatglm3": ChatGLM2Tokenizer,
    "glm4": ChatGLM4Tokenizer,
    "glm4-hf": PreTrainedTokenizerFast,
}
VOCABULARY = {"chatglm": "ice_text.model", "glm4-hf": "tokenizer.json"}  # others: tokenizer.model


def change(file: Path, **settings: object) -> None:
    file.write_text(json.dumps(read_json(file) | settings))


@pytest.fixture
def broken(checkpoint: Checkpoint, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a checkpoint, to be broken."""
    return lambda family: copy_of(checkpoint(family), tmp_path / family)


def refused(directory: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", CLASSES)
def test_the_class_is_told_by_the_files(checkpoint, family):
    tokenizer = load_tokenizer(checkpoint(family))
    assert isinstance(tokenizer, CLASSES[family])
    assert tokenizer.padding_side == "left"
    assert getattr(tokenizer, "role_tokens", None) is {"chatglm2": False, "chatglm3": True}.get(
        family
    )
    text = "你好 1234 <|user|>"
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids("<|user|>") not in ids


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3", "glm4"])
def test_released_vocabulary_beside_a_native_config(broken, family):
    """A native directory without tokenizer.json, as `export --format native` writes it."""
    directory = broken(family)
    (directory / "config.json").write_text('{"model_type": "glm"}')
    assert isinstance(load_tokenizer(directory), CLASSES[family])


def test_native_vocabulary_beside_a_released_config(broken, checkpoint):
    directory = broken("glm4-hf")
    config = (checkpoint("glm4") / "config.json").read_text()
    (directory / "config.json").write_text(config)
    assert isinstance(load_tokenizer(directory), PreTrainedTokenizerFast)


def test_released_vocabulary_goes_first_in_a_released_directory(broken, checkpoint):
    directory = broken("glm4")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((checkpoint("glm4-hf") / name).read_bytes())
    assert isinstance(load_tokenizer(directory), ChatGLM4Tokenizer)


def test_native_tokenizer_without_pad_token(broken):
    directory = broken("glm4-hf")
    file = directory / "tokenizer_config.json"
    settings = read_json(file)
    del settings["pad_token"]
    file.write_text(json.dumps(settings))
    assert load_tokenizer(directory).pad_token == "<|endoftext|>"


@pytest.mark.parametrize("family", CLASSES)
def test_works_twice_on_what_it_saved(checkpoint, tmp_path, family):
    tokenizer = load_tokenizer(checkpoint(family))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((checkpoint(family) / "config.json").read_bytes())
    again = load_tokenizer(tmp_path)
    assert again("你好 [gMASK]")["input_ids"] == tokenizer("你好 [gMASK]")["input_ids"]
    assert getattr(again, "role_tokens", None) == getattr(tokenizer, "role_tokens", None)


@pytest.mark.parametrize("family", CLASSES)
def test_no_vocabulary(broken, family):
    directory = broken(family)
    (directory / VOCABULARY.get(family, "tokenizer.model")).unlink()
    refused(directory, r"must hold a tokenizer \(ice_text\.model, tokenizer\.model or tokenizer\.json\)")  # fmt: skip


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_truncated_vocabulary(broken, family, kept):
    directory = broken(family)
    file = directory / VOCABULARY.get(family, "tokenizer.model")
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    refused(directory, rf"{file.name}|must hold a tokenizer .*, got an error")


@pytest.mark.parametrize("family", CLASSES)
def test_broken_tokenizer_config(broken, family):
    directory = broken(family)
    (directory / "tokenizer_config.json").write_text("{")
    refused(directory, r"tokenizer_config\.json must be JSON, got an error")


class TestMismatch:
    @pytest.mark.parametrize(
        ("family", "key", "token"),
        [
            ("chatglm", "bos_token_id", "<sop>"),
            ("chatglm", "gmask_token_id", r"\[gMASK\]"),
            ("chatglm", "eos_token_id", "<eop>"),
            ("chatglm3", "pad_token_id", "<unk>"),
            ("glm4", "pad_token_id", r"<\|endoftext\|>"),
        ],
    )
    def test_id(self, broken, family, key, token):
        directory = broken(family)
        change(directory / "config.json", **{key: 77})
        refused(directory, rf"must fit config\.json, got {token}=\d+ in the tokenizer and {key}=77")

    def test_eos_of_another_checkpoint(self, broken):
        """GLM-4's config names the ids that end an answer; ChatGLM3's vocabulary has other tokens there."""
        directory = broken("glm4")
        change(directory / "config.json", eos_token_id=[77, 78])
        refused(directory, r"must fit config\.json, got eos_token_id=77, which is no control token")

    def test_image_tokens(self, broken):
        directory = broken("chatglm")
        change(directory / "tokenizer_config.json", num_image_tokens=20000)
        refused(directory, r"<sop>=22004 .*bos_token_id=2004 .*num_image_tokens in tokenizer_con")

    @pytest.mark.parametrize(
        ("family", "key", "tokens"),
        [
            ("chatglm", "vocab_size", 2345),
            ("chatglm2", "padded_vocab_size", 2005),
            ("chatglm3", "padded_vocab_size", 2009),
            ("glm4", "padded_vocab_size", 270),
            ("glm4-hf", "vocab_size", 270),
        ],
    )
    def test_more_tokens_than_rows(self, broken, family, key, tokens):
        directory = broken(family)
        tokens = len(load_tokenizer(directory).get_vocab()) if family == "chatglm" else tokens
        change(directory / "config.json", **{key: tokens - 1})
        refused(directory, f"got {tokens} tokens and {tokens - 1} rows of word embeddings")
        change(directory / "config.json", **{key: tokens})
        load_tokenizer(directory)

"""Open the tokenizer of a checkpoint directory, whichever family it is of. No code from the directory is run."""

from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models.loading import checkpoint_directory, read_json
from chatglm_ptuning.models.tokenization_base import TableTokenizer, require_unicode
from chatglm_ptuning.models.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.models.tokenization_chatglm2 import ChatGLM2Tokenizer
from chatglm_ptuning.models.tokenization_glm4 import ChatGLM4Tokenizer, is_rank_file

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model.

    Args:
        path: A checkpoint directory: any released ChatGLM or GLM-4-9B, or one that transformers reads natively.

    Returns:
        A tokenizer with transformers' methods and `encode_ordinary(text)`, which recognises no control token in a text.

    Raises:
        UserError: There is no tokenizer, it is damaged, or its control tokens have other ids than config.json says.
    """
    directory = checkpoint_directory(path)
    for name in SETTINGS:
        if (directory / name).is_file():
            read_json(directory / name)  # says which file is broken; transformers does not
    config = read_json(directory / "config.json")
    tokenizer_class = released_class(directory)
    if tokenizer_class is None:
        tokenizer = native_tokenizer(directory)
    else:
        tokenizer = tokenizer_class.from_pretrained(directory, local_files_only=True)
        check_ids(tokenizer, config, directory)
    check_size(tokenizer, config, directory)
    return tokenizer


def released_class(directory: Path) -> type[TableTokenizer] | None:
    """The class for a released vocabulary file; None where a directory has none."""
    if (directory / "ice_text.model").is_file():
        return ChatGLMTokenizer
    vocabulary = directory / "tokenizer.model"
    is_released = read_json(directory / "config.json").get("model_type") == "chatglm"
    if not vocabulary.is_file() or not (
        is_released or not (directory / "tokenizer.json").is_file()
    ):
        return None
    with vocabulary.open("rb") as file:
        return ChatGLM4Tokenizer if is_rank_file(file.read(4096)) else ChatGLM2Tokenizer


def check_ids(tokenizer: TableTokenizer, config: dict[str, Any], directory: Path) -> None:
    """Compare the ids that both files name.

    Raises:
        UserError: The tokenizer is of another checkpoint (ChatGLM-6B was released with two vocabularies).
    """
    names = {"bos_token_id": "<sop>", "gmask_token_id": "[gMASK]", "mask_token_id": "[MASK]"}
    names |= {"eos_token_id": tokenizer.eos_token, "pad_token_id": tokenizer.pad_token}
    if not isinstance(tokenizer, ChatGLMTokenizer):
        names = {"pad_token_id": tokenizer.pad_token}
    for key, token in names.items():
        own, wanted = tokenizer.convert_tokens_to_ids(token), config.get(key)
        if wanted is not None and own != wanted:
            raise UserError(
                f"the tokenizer must fit config.json, got {token}={own!r} in the tokenizer and {key}={wanted!r} in"
                f" {directory / 'config.json'}; copy all files of one checkpoint (and num_image_tokens in"
                " tokenizer_config.json: 0 or 20000)"
            )
    ends = config.get("eos_token_id")
    for index in ends if isinstance(ends, list) else [ends]:
        if index is not None and index not in tokenizer.control_ids:
            raise UserError(
                f"the tokenizer must fit config.json, got eos_token_id={index!r}, which is no control token of"
                f" {directory}; copy all files of one checkpoint"
            )


def check_size(tokenizer: PreTrainedTokenizerBase, config: dict[str, Any], directory: Path) -> None:
    """Compare the number of tokens with that of word embeddings.

    Raises:
        UserError: There are more tokens.
    """
    rows = config.get("padded_vocab_size", config.get("vocab_size"))
    tokens = max(
        len(tokenizer), tokenizer.vocab_size
    )  # a token that stands twice counts once in len
    # Other families have tokens without embeddings that their models never meet (Gemma's for images).
    if config.get("model_type") in ("chatglm", "glm") and rows is not None and tokens > rows:
        raise UserError(
            f"the tokenizer must fit config.json, got {tokens} tokens and {rows} rows of word embeddings"
            f" in {directory}; copy all files of one checkpoint"
        )


def native_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """A tokenizer that transformers reads by itself.

    Raises:
        UserError: It cannot.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, OSError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = str(error).splitlines()[0].rstrip(". ") if str(error) else type(error).__name__
        raise UserError(
            f"{directory} must hold a tokenizer (ice_text.model, tokenizer.model or tokenizer.json), got an error:"
            f" {reason}; copy the released files into it"
        ) from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.encode_ordinary = partial(encode_ordinary, tokenizer)
    return tokenizer


def encode_ordinary(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text in which nothing is a control token, whatever it spells; nothing is added."""
    return tokenizer(require_unicode(text), add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]

"""The tokenizer of GLM-4-9B in the released layout: `tokenizer.model` of tiktoken, one `base64(bytes) rank` a line.

The ids are those of the released tokenizer; see `TableTokenizer` for what differs on purpose.
"""

import base64
from typing import Any

from tiktoken import Encoding
from transformers import AddedToken
from transformers.convert_slow_tokenizer import bytes_to_unicode

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models.tokenization_base import (
    TableTokenizer,
    read_vocabulary,
    require_unicode,
)

# How a text is cut before byte pairs are merged.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Their ids follow the ranks in this order.
CONTROL_TOKENS = [
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
]  # fmt: skip
CHARACTERS = bytes_to_unicode()  # how a byte is written in a token
BYTES = {character: byte for byte, character in CHARACTERS.items()}


class ChatGLM4Tokenizer(TableTokenizer):
    """GLM-4-9B's text to ids and back.

    `encode(text)` and `tokenizer(text)` give the released ids: `[gMASK]`, `<sop>`, text, and for a pair the second text
    and `<|endoftext|>`; every control token is recognised inside the text. `encode_ordinary` recognises none.

    Tokens are written as byte-level vocabularies of transformers write them ("Ġhello"), control tokens as they are.

    Args:
        vocab_file: Path of `tokenizer.model`.
        eos_token: Ends the text; id 151329 in the released file.
        pad_token: Fills a batch up; the same.
        **kwargs: Those of `PreTrainedTokenizer`.

    Raises:
        UserError: `vocab_file` is missing, cut off or no tiktoken vocabulary.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 - transformers reads a plain dict here

    def __init__(
        self,
        vocab_file: str | None = None,
        eos_token: str = "<|endoftext|>",
        pad_token: str = "<|endoftext|>",
        **kwargs: Any,
    ) -> None:
        content = read_vocabulary(vocab_file, "GLM-4's tokenizer.model")
        ranks = read_ranks(content, str(vocab_file))
        saved = kwargs.pop("added_tokens_decoder", {})
        control = {
            len(ranks) + position: AddedToken(token, normalized=False, special=True)
            for position, token in enumerate(CONTROL_TOKENS)
        }
        for index, token in saved.items():
            if str(token) in CONTROL_TOKENS and str(control.get(index)) != str(token):
                raise UserError(
                    f"GLM-4's tokenizer.model must hold the {index - CONTROL_TOKENS.index(str(token))} tokens that"
                    f" tokenizer_config.json counts, got {len(ranks)} in {vocab_file!r}; copy the released files again"
                )
        self._encoding = Encoding(
            "glm4", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        super().__init__(
            content,
            tokens=["".join(CHARACTERS[byte] for byte in token) for token in ranks]
            + CONTROL_TOKENS,
            control_ids=control,
            added_tokens_decoder=control | saved,
            eos_token=eos_token,
            pad_token=pad_token,
            **kwargs,
        )

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a control token, whatever it spells; nothing is added.

        Raises:
            UserError: The text is not valid Unicode.
        """
        return self._encoding.encode_ordinary(require_unicode(text))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`[gMASK] <sop> A`, or `[gMASK] <sop> A B <|endoftext|>`."""
        prompt = [self.token_ids["[gMASK]"], self.token_ids["<sop>"], *token_ids_0]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, self.eos_token_id]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens to text; bytes that are no whole character become U+FFFD."""
        named = self._added_tokens_encoder
        spelled = (
            token.encode("utf-8")
            if token in named
            else bytes(BYTES[character] for character in token)
            for token in tokens
        )
        return b"".join(spelled).decode("utf-8", errors="replace")

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self.tokens[index] for index in self.encode_ordinary(text)]


def is_rank_file(content: bytes) -> bool:
    """Whether a `tokenizer.model` is GLM-4's, not the SentencePiece model of ChatGLM2-6B and ChatGLM3-6B."""
    return content.split(b"\n", 1)[0].split(b" ")[-1].strip().isdigit()


def read_ranks(content: bytes, vocab_file: str) -> dict[bytes, int]:
    """Read tiktoken's merge ranks, in the order of their ranks.

    Args:
        content: The file's content, one `base64(bytes) rank` a line.
        vocab_file: Its path, for errors.

    Raises:
        UserError: A line is something else, the ranks are not 0 to n - 1, or not every byte has one.
    """
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            encoded, rank = line.split()
            token, index = base64.b64decode(encoded, validate=True), int(rank)
        except ValueError as error:
            raise UserError(
                f"{vocab_file}:{number}: a line must be a base64 token and its rank, got {line[:60]!r};"
                " copy the released file again"
            ) from error
        if index in tokens:
            raise UserError(
                f"{vocab_file}:{number}: a rank must be given once, got rank={index!r} again;"
                " copy the released file again"
            )
        tokens[index] = token
    ranks = {tokens[index]: index for index in sorted(tokens)}
    if [*ranks.values()] != [*range(len(tokens))]:
        raise UserError(
            f"{vocab_file} must rank its tokens 0 to {len(tokens) - 1} without a gap, got something else;"
            " copy the released file again"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(
            f"{vocab_file} must hold every byte as a token, got none for byte={missing[0]!r};"
            " copy the released file again"
        )
    return ranks

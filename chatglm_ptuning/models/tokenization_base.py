"""What the tokenizers of all four families share: a table of tokens, control ids, reading and saving the file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizer

from chatglm_ptuning.errors import UserError


class TableTokenizer(PreTrainedTokenizer):
    """A tokenizer whose ids index one list of tokens.

    Whatever the released code did, the attention mask is `[batch, seq_len]` with 1 at real tokens and there are no
    position ids (the models make them from the mask); either padding side works, left being the default; decoding takes
    any id, leaves the spaces before punctuation alone, and skips every control token with `skip_special_tokens`.

    Subclasses add `encode_ordinary(text)`: the ids of a text in which nothing is a control token, whatever it spells.

    Args:
        content: The vocabulary file, for `save_pretrained`.
        tokens: The token of every id; a token that occurs twice has the later id.
        control_ids: Ids that steer the model and stand for no text.
        silent_ids: Ids that decode to nothing even without `skip_special_tokens`, as released.
        **kwargs: Those of `PreTrainedTokenizer`.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - transformers reads a plain list here
    padding_side = "left"

    def __init__(
        self,
        content: bytes,
        tokens: list[str],
        control_ids: Iterable[int],
        silent_ids: Iterable[int] = (),
        **kwargs: Any,
    ) -> None:
        self._content = content
        self.tokens = tokens
        self.token_ids = {token: index for index, token in enumerate(tokens)}
        self.control_ids = frozenset(control_ids)
        self.silent_ids = frozenset(silent_ids)
        # named here, so that save_pretrained writes it
        super().__init__(padding_side=kwargs.pop("padding_side", "left"), **kwargs)

    @property
    def vocab_size(self) -> int:
        """Ids that mean something; the model has more rows."""
        return len(self.tokens)

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""
        return self.token_ids | self._added_tokens_encoder

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 at control tokens, 0 elsewhere: of the ids as given, or with what `encode` adds to them."""
        if not already_has_special_tokens:
            token_ids_0 = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        return [int(index in self.control_ids) for index in token_ids_0]

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str]:
        """Write the vocabulary file under its released name."""
        prefix = f"{filename_prefix}-" if filename_prefix is not None else ""
        path = Path(save_directory, prefix + self.vocab_files_names["vocab_file"])
        path.write_bytes(self._content)
        return (str(path),)

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.token_ids.get(token, self.unk_token_id)

    def _convert_id_to_token(self, index: int) -> str:
        return self.tokens[index] if 0 <= index < len(self.tokens) else ""

    def _decode(
        self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: Any
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        hidden = self.silent_ids | self.control_ids if skip_special_tokens else self.silent_ids
        ids = [index for index in ids if index not in hidden]
        return super()._decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)


def read_vocabulary(vocab_file: str | None, owner: str) -> bytes:
    """Read a vocabulary file.

    Args:
        vocab_file: Its path; None where a checkpoint directory has no such file.
        owner: What needs the file, for the error.

    Raises:
        UserError: There is no such file.
    """
    if vocab_file is None or not Path(vocab_file).is_file():
        raise UserError(
            f"{owner} must be an existing file, got vocab_file={vocab_file!r};"
            " copy the released file into the checkpoint directory"
        )
    return Path(vocab_file).read_bytes()


def open_sentencepiece(
    content: bytes, vocab_file: str | None, owner: str
) -> SentencePieceProcessor:
    """Open a SentencePiece model.

    Args:
        content: The file's content.
        vocab_file: Its path, for the error.
        owner: What needs the file, for the error.

    Raises:
        UserError: It is not a whole SentencePiece model with byte pieces.
    """
    model = SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(content)
        whole = model.is_byte(model.piece_to_id("<0xFF>"))  # a file cut between two pieces loads
    except RuntimeError:
        whole = False
    if not whole:
        raise UserError(
            f"{owner} must be a whole SentencePiece model with byte pieces, got vocab_file={vocab_file!r};"
            " copy the released file again"
        )
    return model


def byte_spellings(model: SentencePieceProcessor, names: set[str]) -> dict[int, list[int]]:
    """Spell control pieces in byte pieces, for texts in which SentencePiece itself would find them.

    Args:
        model: The SentencePiece model.
        names: Pieces that are control tokens beside those that the model marks as such.

    Returns:
        For the id of each control piece the ids of the byte pieces of its name.
    """
    pieces = model.id_to_piece(list(range(model.get_piece_size())))
    return {
        index: [model.piece_to_id(f"<0x{byte:02X}>") for byte in piece.encode("utf-8")]
        for index, piece in enumerate(pieces)
        if piece in names or model.is_control(index)
    }


def require_unicode(text: str) -> str:
    """Return the text, which must have a UTF-8 form.

    Raises:
        UserError: It holds half of a surrogate pair, as a broken JSON escape leaves behind.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"text must be valid Unicode, got character={text[error.start]!r} at position {error.start};"
            " remove the broken \\u escape"
        ) from error
    return text

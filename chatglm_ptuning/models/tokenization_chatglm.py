"""The tokenizer of ChatGLM-6B: SentencePiece `ice_text.model`, with codes for line breaks, tabs and runs of blanks.

The ids are those of the released tokenizer. On purpose different from it: the attention mask is `[batch, seq_len]` with
1 at real tokens, and there are no position ids (the model makes the prefix-LM mask and the positions from the ids and
this mask); either padding side works; decoding never fails, whatever the id; and decoding leaves the spaces before
punctuation alone.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import AddedToken, PreTrainedTokenizer

from chatglm_ptuning.errors import UserError

LONGEST_BLANK = 80  # the longest run of blanks with a piece of its own, <|blank_80|>
CONTROL_TOKENS = (
    "<s>",
    "</s>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<unused_0>",
    "<sop>",
    "<eop>",
    "<ENC>",
    "<dBLOCK>",
)


def load_sentencepiece(vocab_file: str | None, owner: str) -> SentencePieceProcessor:
    """Open a SentencePiece model.

    Args:
        vocab_file: Its path; None where a checkpoint directory has no such file.
        owner: What needs the file, for the error.

    Raises:
        UserError: The file is missing, or is not a whole SentencePiece model with byte pieces.
    """
    if vocab_file is None or not Path(vocab_file).is_file():
        raise UserError(
            f"{owner} must be an existing file, got vocab_file={vocab_file!r};"
            " copy the released file into the checkpoint directory"
        )
    model = SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(Path(vocab_file).read_bytes())
        whole = model.is_byte(model.piece_to_id("<0xFF>"))  # a file cut between two pieces loads
    except RuntimeError:
        whole = False
    if not whole:
        raise UserError(
            f"{owner} must be a whole SentencePiece model with byte pieces, got vocab_file={vocab_file!r};"
            " copy the released file again"
        )
    return model


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


def byte_spellings(model: SentencePieceProcessor, ids: Iterable[int]) -> dict[int, list[int]]:
    """For each id of a SentencePiece model the ids of the byte pieces that spell its piece."""
    return {
        index: [
            model.piece_to_id(f"<0x{byte:02X}>")
            for byte in model.id_to_piece(index).encode("utf-8")
        ]
        for index in ids
    }


class ChatGLMTokenizer(PreTrainedTokenizer):
    """ChatGLM-6B's text to ids and back.

    `encode(text)` and `tokenizer(text)` give the released ids: text, `[gMASK]`, `<sop>`, and for a pair the second text
    and `<eop>`; the five registered tokens (`<sop>`, `<eop>`, `<unk>`, `<pad>`, `[MASK]`) are recognised inside the
    text and swallow the white space around them. `encode_ordinary` recognises none.

    Text is normalised (NFKC) by the SentencePiece model, so full-width punctuation comes back half-width.

    Args:
        vocab_file: Path of `ice_text.model`.
        do_lower_case: Lower-case the text first; the released checkpoints do not.
        remove_space: Collapse white space to single blanks first; the released checkpoints do not.
        bos_token: Starts the answer.
        eos_token: Ends the answer.
        end_token: End of a sentence in pre-training; no prompt uses it.
        mask_token: The place of a short blank.
        gmask_token: The place of the answer in a prompt.
        pad_token: Fills a batch up.
        unk_token: What no piece covers.
        num_image_tokens: Ids in front of the first piece that stand for image codes: 0 with the 130528-row vocabulary,
            20000 (the default where a `tokenizer_config.json` does not say, as released) with the 150528-row one.
        model_specific_special_tokens: Where `from_pretrained` puts `end_token` and `gmask_token`, which stay
            unregistered, and the `eop_token` of the first release, which then ends the answer.
        **kwargs: Those of `PreTrainedTokenizer`.

    Raises:
        UserError: `vocab_file` is missing, cut off, or lacks one of the tokens.
    """

    vocab_files_names = {"vocab_file": "ice_text.model"}  # noqa: RUF012 - transformers reads a plain dict here
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None = None,
        do_lower_case: bool = False,
        remove_space: bool = False,
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        end_token: str = "</s>",
        mask_token: str = "[MASK]",
        gmask_token: str = "[gMASK]",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        num_image_tokens: int = 20000,
        model_specific_special_tokens: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        named = {"end_token": end_token, "gmask_token": gmask_token, "eop_token": eos_token}
        named |= model_specific_special_tokens if model_specific_special_tokens is not None else {}
        self.end_token, self.gmask_token = str(named["end_token"]), str(named["gmask_token"])
        eos_token = str(named["eop_token"])
        self.do_lower_case = do_lower_case
        self.remove_space = remove_space
        self.num_image_tokens = num_image_tokens

        self.sentencepiece = load_sentencepiece(vocab_file, "ChatGLM-6B's ice_text.model")
        sp_ids = list(range(self.sentencepiece.get_piece_size()))
        pieces = self.sentencepiece.id_to_piece(sp_ids)
        self.pieces = [f"<image_{index}>" for index in range(num_image_tokens)] + pieces
        self.piece_ids = {piece: index for index, piece in enumerate(self.pieces)}
        registered = [
            str(token) for token in (bos_token, eos_token, unk_token, pad_token, mask_token)
        ]
        for token in (*registered, self.end_token, self.gmask_token):
            if token not in self.piece_ids:
                raise UserError(
                    f"ChatGLM-6B's ice_text.model must hold the token {token!r}, got vocab_file={vocab_file!r};"
                    " copy the released file again"
                )
        control = {*CONTROL_TOKENS, *registered, self.end_token, self.gmask_token} - {unk_token}
        self._spellings = byte_spellings(
            self.sentencepiece,
            [
                index
                for index in sp_ids
                if self.sentencepiece.is_control(index) or pieces[index] in control
            ],
        )
        # White space around a registered token vanished in the transformers releases of the time.
        stripping = {
            self.piece_ids[token]: AddedToken(
                token, lstrip=True, rstrip=True, normalized=False, special=True
            )
            for token in registered
        }
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            mask_token=mask_token,
            pad_token=pad_token,
            unk_token=unk_token,
            do_lower_case=do_lower_case,
            remove_space=remove_space,
            num_image_tokens=num_image_tokens,
            added_tokens_decoder=stripping | kwargs.pop("added_tokens_decoder", {}),
            padding_side=kwargs.pop("padding_side", "left"),  # named here, so that it is saved
            **kwargs,
        )
        self.init_kwargs |= {"end_token": self.end_token, "gmask_token": self.gmask_token}

    @property
    def vocab_size(self) -> int:
        """Ids that mean something: image codes and pieces. The model has more rows."""
        return len(self.pieces)

    @property
    def end_token_id(self) -> int:
        """Id of `</s>`."""
        return self.piece_ids[self.end_token]

    @property
    def gmask_token_id(self) -> int:
        """Id of `[gMASK]`."""
        return self.piece_ids[self.gmask_token]

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""
        return self.piece_ids | self._added_tokens_encoder

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a control token, whatever it spells; nothing is added.

        Raises:
            UserError: The text is not valid Unicode.
        """
        ids = self.sentencepiece.encode(self._with_codes(text))
        return [
            index + self.num_image_tokens
            for sp_id in ids
            for index in self._spellings.get(sp_id, (sp_id,))
        ]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`A [gMASK] <sop>`, or `A [gMASK] <sop> B <eop>`."""
        prompt = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, self.eos_token_id]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 at control tokens, 0 elsewhere: of the ids as given, or with what `encode` adds to them."""
        if not already_has_special_tokens:
            token_ids_0 = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        return [int(index - self.num_image_tokens in self._spellings) for index in token_ids_0]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces to text; bytes that are no whole character become U+FFFD."""
        text = self.sentencepiece.decode_pieces([token for token in tokens if token])
        return re.sub(r"<n>|<\|tab\|>|<\|blank_(\d+)\|>", _white_space, text)

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str]:
        """Write `ice_text.model`."""
        prefix = f"{filename_prefix}-" if filename_prefix is not None else ""
        path = Path(save_directory, prefix + self.vocab_files_names["vocab_file"])
        path.write_bytes(self.sentencepiece.serialized_model_proto())
        return (str(path),)

    def _with_codes(self, text: str) -> str:
        """The text as SentencePiece gets it: white space that it would drop is spelled as codes."""
        require_unicode(text)
        if self.remove_space:
            text = " ".join(text.split())
        if self.do_lower_case:
            text = text.lower()
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        return re.sub(f" {{2,{LONGEST_BLANK}}}", lambda blanks: f"<|blank_{len(blanks[0])}|>", text)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.sentencepiece.encode(self._with_codes(text), out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.piece_ids.get(token, self.piece_ids[self.unk_token])

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces[index] if 0 <= index < len(self.pieces) else ""

    def _decode(
        self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: Any
    ) -> str:
        pad = self.pad_token_id
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        ids = [index for index in ids if index != pad]
        if skip_special_tokens:
            ids = [index for index in ids if index - self.num_image_tokens not in self._spellings]
        return super()._decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)


def _white_space(code: re.Match[str]) -> str:
    if code[0] == "<n>":
        return "\n"
    if code[0] == "<|tab|>":
        return "\t"
    return " " * int(code[1]) if 2 <= int(code[1]) <= LONGEST_BLANK else code[0]

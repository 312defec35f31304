"""The tokenizer of ChatGLM-6B: SentencePiece `ice_text.model`, with codes for line breaks, tabs and runs of blanks.

The ids are those of the released tokenizer; see `TableTokenizer` for what differs on purpose.
"""

import re
from typing import Any

from transformers import AddedToken

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models.tokenization_base import (
    TableTokenizer,
    byte_spellings,
    open_sentencepiece,
    read_vocabulary,
    require_unicode,
)

LONGEST_BLANK = 80  # the longest run of blanks with a piece of its own, <|blank_80|>
CONTROL_TOKENS = {"[sMASK]", "<unused_0>", "<s>", "<ENC>", "<dBLOCK>"}  # and those named below


class ChatGLMTokenizer(TableTokenizer):
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

        owner = "ChatGLM-6B's ice_text.model"
        content = read_vocabulary(vocab_file, owner)
        self.sentencepiece = open_sentencepiece(content, vocab_file, owner)
        pieces = self.sentencepiece.id_to_piece([*range(self.sentencepiece.get_piece_size())])
        registered = [
            str(token) for token in (bos_token, eos_token, unk_token, pad_token, mask_token)
        ]
        control = {*registered, self.end_token, self.gmask_token}
        for token in sorted(control - set(pieces)):
            raise UserError(
                f"{owner} must hold the token {token!r}, got vocab_file={vocab_file!r};"
                " copy the released file again"
            )
        self._spellings = byte_spellings(
            self.sentencepiece, control - {str(unk_token)} | CONTROL_TOKENS
        )
        # White space around a registered token vanished in the transformers releases of the time.
        stripping = {
            pieces.index(token) + num_image_tokens: AddedToken(
                token, lstrip=True, rstrip=True, normalized=False, special=True
            )
            for token in registered
        }
        super().__init__(
            content,
            tokens=[f"<image_{index}>" for index in range(num_image_tokens)] + pieces,
            control_ids=[index + num_image_tokens for index in self._spellings],
            silent_ids=[pieces.index(str(pad_token)) + num_image_tokens],
            bos_token=bos_token,
            eos_token=eos_token,
            mask_token=mask_token,
            pad_token=pad_token,
            unk_token=unk_token,
            do_lower_case=do_lower_case,
            remove_space=remove_space,
            num_image_tokens=num_image_tokens,
            added_tokens_decoder=stripping | kwargs.pop("added_tokens_decoder", {}),
            **kwargs,
        )
        self.init_kwargs |= {"end_token": self.end_token, "gmask_token": self.gmask_token}

    @property
    def end_token_id(self) -> int:
        """Id of `</s>`."""
        return self.token_ids[self.end_token]

    @property
    def gmask_token_id(self) -> int:
        """Id of `[gMASK]`."""
        return self.token_ids[self.gmask_token]

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

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces to text; bytes that are no whole character become U+FFFD."""
        text = self.sentencepiece.decode_pieces([token for token in tokens if token])
        return re.sub(r"<n>|<\|tab\|>|<\|blank_(\d+)\|>", _white_space, text)

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


def _white_space(code: re.Match[str]) -> str:
    if code[0] == "<n>":
        return "\n"
    if code[0] == "<|tab|>":
        return "\t"
    return " " * int(code[1]) if 2 <= int(code[1]) <= LONGEST_BLANK else code[0]

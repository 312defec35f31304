"""The tokenizers of ChatGLM2-6B and ChatGLM3-6B: SentencePiece `tokenizer.model`, the control tokens behind its pieces.

The ids are those of the released tokenizers; see `TableTokenizer` for what differs on purpose. The file is the same in
both generations; ChatGLM3 has four role tokens more.
"""

import re
from pathlib import Path
from typing import Any

from chatglm_ptuning.models.tokenization_base import (
    TableTokenizer,
    byte_spellings,
    open_sentencepiece,
    read_vocabulary,
    require_unicode,
)

CONTROL_TOKENS = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
ROLE_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
ROLE_MARK = r"<\|(?:user\|>|\{\{)"  # <|user|>, or a template's <|{{ message['role'] }}|>
MODEL_NAME = r'"_?name_or_path":\s*"(?:[^"]*/)?[^"/]*chatglm-?([23])[^"/]*"'


class ChatGLM2Tokenizer(TableTokenizer):
    """ChatGLM2-6B's and ChatGLM3-6B's text to ids and back.

    `encode(text)` and `tokenizer(text)` give the released ids: `[gMASK]`, `sop`, text, and for a pair the second text
    and `</s>`. They recognise no token inside a text unless asked to: by `encode_special_tokens=True` the role tokens,
    by transformers' own `split_special_tokens=False` `</s>`, `<unk>` and whatever `add_tokens` added. (As released, a
    piece that happens to be spelled `sop` or `eop` takes the control token's id there.) `encode_ordinary` recognises
    none in any case.

    Args:
        vocab_file: Path of `tokenizer.model`.
        role_tokens: Whether `<|system|>`, `<|user|>`, `<|assistant|>`, `<|observation|>` exist: True is ChatGLM3, False
            ChatGLM2. None: as the files beside `vocab_file` tell, see `role_tokens_on_disk`. The attribute of the same
            name holds the answer and `save_pretrained` keeps it; it stays None where nothing tells, and the tokens
            then exist, so that either template works but none can be guessed.
        encode_special_tokens: Recognise role tokens in texts given to `encode` and `__call__`, as released.
        eos_token: Ends the answer of ChatGLM2; id 2.
        pad_token: Fills a batch up; id 0.
        unk_token: What no piece covers; id 0.
        **kwargs: Those of `PreTrainedTokenizer`.

    Raises:
        UserError: `vocab_file` is missing or cut off.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 - transformers reads a plain dict here

    def __init__(
        self,
        vocab_file: str | None = None,
        role_tokens: bool | None = None,
        encode_special_tokens: bool = False,
        eos_token: str = "</s>",
        pad_token: str = "<unk>",
        unk_token: str = "<unk>",
        **kwargs: Any,
    ) -> None:
        owner = "the tokenizer.model of ChatGLM2-6B or ChatGLM3-6B"
        content = read_vocabulary(vocab_file, owner)
        self.sentencepiece = open_sentencepiece(content, vocab_file, owner)
        if role_tokens is None:
            role_tokens = role_tokens_on_disk(Path(str(vocab_file)).parent)
        self.role_tokens = role_tokens
        self.encode_special_tokens = encode_special_tokens
        pieces = self.sentencepiece.id_to_piece([*range(self.sentencepiece.get_piece_size())])
        added = CONTROL_TOKENS if role_tokens is False else CONTROL_TOKENS + ROLE_TOKENS
        self._spellings = byte_spellings(self.sentencepiece, {"<s>", "</s>"})
        marks = {self.sentencepiece.unk_id(), *self._spellings}
        added_ids = range(len(pieces), len(pieces) + len(added))
        super().__init__(
            content,
            tokens=pieces + added,
            control_ids=[*marks, *added_ids],
            # ChatGLM2 decodes its control tokens to nothing, ChatGLM3 to their names
            silent_ids=[*marks, *added_ids] if role_tokens is False else marks,
            role_tokens=role_tokens,
            encode_special_tokens=encode_special_tokens,
            eos_token=eos_token,
            pad_token=pad_token,
            unk_token=unk_token,
            split_special_tokens=kwargs.pop("split_special_tokens", True),
            **kwargs,
        )

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a control token, whatever it spells; nothing is added.

        Raises:
            UserError: The text is not valid Unicode.
        """
        ids = self.sentencepiece.encode(require_unicode(text))
        return [index for piece in ids for index in self._spellings.get(piece, (piece,))]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`[gMASK] sop A`, or `[gMASK] sop A B </s>`."""
        prompt = [self.token_ids["[gMASK]"], self.token_ids["sop"], *token_ids_0]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, self.eos_token_id]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces to text; bytes that are no whole character become U+FFFD."""
        return self.sentencepiece.decode_pieces([token for token in tokens if token])

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        require_unicode(text)
        if not self.encode_special_tokens or self.role_tokens is False:
            return self.sentencepiece.encode(text, out_type=str)
        parts = re.split("(" + "|".join(map(re.escape, ROLE_TOKENS)) + ")", text)
        tokens: list[str] = []
        for part in parts:
            is_role = part in ROLE_TOKENS
            tokens += [part] if is_role else self.sentencepiece.encode(part, out_type=str)
        return tokens


def role_tokens_on_disk(directory: Path) -> bool | None:
    """Whether a released directory, or one saved from it, has ChatGLM3's role tokens. Nothing in it is executed.

    In this order: a chat template or an added token that says `<|user|>`, which only ChatGLM3 can have; the released
    `tokenization_chatglm.py`, which names the role tokens in ChatGLM3 and not in ChatGLM2; the model's name as its
    makers left it in `tokenizer_config.json` (`name_or_path`) or `config.json` (`_name_or_path`).

    Returns:
        True for ChatGLM3, False for ChatGLM2, None where nothing tells.
    """
    names = (
        "tokenizer_config.json",
        "chat_template.jinja",
        "tokenization_chatglm.py",
        "config.json",
    )
    settings, template, code, config = (
        file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        for file in (directory / name for name in names)
    )
    if re.search(ROLE_MARK, settings + template):
        return True
    if code:
        return re.search(ROLE_MARK, code) is not None
    generations = set(re.findall(MODEL_NAME, settings + config, re.IGNORECASE))
    return generations == {"3"} if len(generations) == 1 else None

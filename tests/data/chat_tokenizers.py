"""The tokenizers that the tests of this folder encode with."""

import json
from pathlib import Path

from chatglm_ptuning.models.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.models.tokenization_chatglm2 import ChatGLM2Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


class ByteTokenizer:
    """Bytes of UTF-8, and GLM-4's control tokens behind them: what it encodes can be read."""

    name_or_path, unk_token_id = "bytes", None
    control = (
        "[gMASK]",
        "<sop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
        "<|endoftext|>",
    )

    def encode_ordinary(self, text):
        return list(text.encode())

    def convert_tokens_to_ids(self, token):
        return 256 + self.control.index(token) if token in self.control else None

    def show(self, ids):
        """Control tokens by name, bytes as text."""
        return b"".join(
            self.control[i - 256].encode() if i > 255 else bytes([i]) for i in ids
        ).decode()


TOKENIZERS = {
    "chatglm": ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer_v1"),
    "chatglm2": ChatGLM2Tokenizer.from_pretrained(GOLDEN / "tokenizer_v2", role_tokens=False),
    "chatglm3": ChatGLM2Tokenizer.from_pretrained(GOLDEN / "tokenizer_v3", role_tokens=True),
    "glm4": ByteTokenizer(),
}

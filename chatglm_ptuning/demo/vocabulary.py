"""The demo's `ice_text.model`: a SentencePiece vocabulary in the order of the released ChatGLM-6B file.

`<unk> <s> </s> <pad> <n>`, the pieces, the model's control pieces, `<|tab|>`, `<|blank_2|>` to `<|blank_80|>`, bytes.
"""

import io
import logging
from itertools import islice
from pathlib import Path

import jieba
import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from chatglm_ptuning.demo.advertisements import make_advertisements
from chatglm_ptuning.demo.pretraining import make_examples

NUM_PIECES = 1600
CONTROLS = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<unused_0>",
    "<sop>",
    "<eop>",
    "<ENC>",
    "<dBLOCK>",
)
WORD_BOUNDARY = "|"  # stands in no text; training pieces never cross it
ASCII = "".join(map(chr, range(ord("!"), 127)))


def make_corpus() -> list[str]:
    """Sentences cut into words, so that a word is the same piece wherever it stands."""
    texts = [turn for example in islice(make_examples(seed=1), 12_000) for turn in example.turns]
    texts += [row["summary"] for row in make_advertisements()["train"]]
    texts += ["[Round 0]\n问：你好\n答：你好\n[Round 1]\n问："] * 10
    logging.getLogger("jieba").setLevel(logging.WARNING)
    segment = jieba.Tokenizer()
    return [
        WORD_BOUNDARY + WORD_BOUNDARY.join(segment.cut(line))
        for text in texts
        for line in text.splitlines()
    ]


def train_pieces(num_pieces: int) -> sp_pb2.ModelProto:
    """Train byte-pair encoding (Sennrich et al., arXiv 1508.07909) on the demo's own text."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(make_corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=num_pieces,
        character_coverage=1.0,
        required_chars=ASCII,
        pretokenization_delimiter=WORD_BOUNDARY,
        normalization_rule_name="nmt_nfkc",
        user_defined_symbols=["<n>"],
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return sp_pb2.ModelProto.FromString(model.getvalue())


def build_vocabulary(path: Path) -> None:
    """Write `ice_text.model`; the same bytes for the same version of SentencePiece.

    Args:
        path: The file to write.
    """
    model = train_pieces(NUM_PIECES)
    piece_type = sp_pb2.ModelProto.SentencePiece.Type
    blanks = [f"<|blank_{length}|>" for length in range(2, 81)]
    added = [(name, piece_type.CONTROL) for name in CONTROLS]
    added += [(name, piece_type.USER_DEFINED) for name in ("<|tab|>", *blanks)]
    added += [(f"<0x{byte:02X}>", piece_type.BYTE) for byte in range(256)]
    for piece, kind in added:
        model.pieces.add(piece=piece, score=0.0, type=kind)
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(model.pieces)
    path.write_bytes(model.SerializeToString(deterministic=True))

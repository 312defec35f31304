import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from chatglm_ptuning.demo.advertisements import make_advertisements
from chatglm_ptuning.demo.vocabulary import CONTROLS, NUM_PIECES, build_vocabulary
from chatglm_ptuning.demo.world import KINDS, VALUES

COMMITTED = Path(__file__).parents[2] / "demo" / "model" / "ice_text.model"


@pytest.fixture(scope="module")
def vocabulary() -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(COMMITTED))


def test_the_committed_file_is_what_is_built(tmp_path: Path) -> None:
    build_vocabulary(tmp_path / "ice_text.model")
    assert (tmp_path / "ice_text.model").read_bytes() == COMMITTED.read_bytes()


def test_the_order_is_the_released_one(vocabulary: SentencePieceProcessor) -> None:
    pieces = [vocabulary.id_to_piece(i) for i in range(len(vocabulary))]
    blanks = [f"<|blank_{length}|>" for length in range(2, 81)]
    tail = [*CONTROLS, "<|tab|>", *blanks, *(f"<0x{byte:02X}>" for byte in range(256))]
    assert pieces[:5] == ["<unk>", "<s>", "</s>", "<pad>", "<n>"]
    assert pieces[NUM_PIECES:] == tail
    control = [i for i in range(len(pieces)) if vocabulary.is_control(i)]
    assert control == [1, 2, 3, *range(NUM_PIECES, NUM_PIECES + len(CONTROLS))]
    assert all(vocabulary.is_byte(i) for i in range(len(pieces) - 256, len(pieces)))


def test_a_word_is_the_same_pieces_in_a_list_and_in_a_sentence(
    vocabulary: SentencePieceProcessor,
) -> None:
    words = [*VALUES, *(v for values in VALUES.values() for v in values), *(k.name for k in KINDS)]
    for word in words:
        alone = vocabulary.encode(word)[1:]
        assert len(alone) <= 2, word
        for text in (f"类型#{word}*", f"是{word}的。", f"{word}，"):
            ids = vocabulary.encode(text)
            assert any(ids[i : i + len(alone)] == alone for i in range(len(ids))), text


def test_no_character_of_the_data_is_spelled_in_bytes(vocabulary: SentencePieceProcessor) -> None:
    for rows in make_advertisements().values():
        ids = vocabulary.encode(json.dumps(rows, ensure_ascii=False))
        assert not any(vocabulary.is_byte(i) or vocabulary.is_unknown(i) for i in ids)

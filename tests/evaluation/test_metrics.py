import random
import tempfile
from pathlib import Path

import pytest

from chatglm_ptuning.evaluation import metrics
from chatglm_ptuning.evaluation.metrics import bleu_4, rouge_scores, score, segmenter

ZERO = dict.fromkeys(("rouge-1", "rouge-2", "rouge-l", "bleu-4", "sacrebleu", "chrf"), 0.0)


def test_rouge_by_hand() -> None:
    # words: 今天天气 很 好 | 今天天气 很 不错; 2 of 3 words, 1 of 2 pairs, a common subsequence of 2 words
    assert rouge_scores("今天天气很好", "今天天气很不错") == {
        "rouge-1": pytest.approx(66.6667),
        "rouge-2": pytest.approx(50),
        "rouge-l": pytest.approx(66.6667),
    }


def test_rouge_counts_a_word_once() -> None:
    # precision 1 of {天}, recall 1 of {天, 好}: the repetition is not counted
    assert rouge_scores("天 天 天 天", "天 好")["rouge-1"] == pytest.approx(66.6667)


def test_bleu_4_by_hand() -> None:
    # characters 5 of 6, pairs 4 of 5, triples 3 of 4, fours 2 of 3; equally long
    expected = 100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    assert bleu_4("甲乙丙丁戊己", "甲乙丙丁戊庚") == pytest.approx(expected, abs=1e-4)


def test_bleu_4_smooths_a_missing_order_and_punishes_brevity() -> None:
    # method 3: the first order without a match counts 1/2 match, the next 1/4; 3 triples and 2 fours would fit
    precisions = 5 / 5 * 2 / 4 * 1 / (2 * 3) * 1 / (4 * 2)
    brevity = 2.718281828459045 ** (1 - 6 / 5)
    expected = 100 * brevity * precisions**0.25
    assert bleu_4("甲乙丁戊丙", "甲乙丙丁戊己") == pytest.approx(expected, abs=1e-4)


def test_identical_texts_score_100() -> None:
    text = "这条裙子面料柔软，穿着舒适。"
    scores = score([text, text], [text, text])
    assert scores == {name: pytest.approx(100, abs=1e-3) for name in ZERO}


@pytest.mark.parametrize("empty", ["", " ", "\n", "\u3000", ".", " . ", "..."])
def test_an_empty_prediction_scores_0(empty: str) -> None:
    assert score([empty], ["好看的裙子 ."]) == ZERO


def test_an_empty_prediction_counts_in_the_mean() -> None:
    text = "好看的裙子"
    alone, both = score([text], [text]), score([text, "."], [text, text])
    for name in ("rouge-1", "rouge-2", "rouge-l", "bleu-4"):
        assert both[name] == pytest.approx(alone[name] / 2)


def test_an_empty_reference_scores_0() -> None:
    assert score(["好看的裙子"], [""]) == ZERO


def test_sentence_means_and_corpus_scores_are_different_things() -> None:
    predictions, references = ["甲乙丙丁", "戊"], ["甲乙丙丁", "己庚辛壬癸"]
    scores = score(predictions, references)
    assert scores["bleu-4"] == pytest.approx((100 + 0) / 2, abs=1e-4)
    # corpus BLEU: 4 of 5 characters, 3 of 3 pairs, ...; 5 characters against 9
    expected = 100 * 2.718281828459045 ** (1 - 9 / 5) * (4 / 5) ** 0.25
    assert scores["sacrebleu"] == pytest.approx(expected, abs=1e-4)


def test_odd_texts_crash_nothing() -> None:
    rng = random.Random(0)
    alphabet = [
        "。",
        "！",
        "?",
        "”",
        "……",
        ".",
        " ",
        "\n",
        "\t",
        "裙",
        "a",
        "1",
        "\u200b",
        "\x00",
        "😀",
    ]

    def text() -> str:
        return "".join(rng.choice(alphabet) for _ in range(rng.randrange(12)))

    rows = [(text(), text()) for _ in range(300)]
    for prediction, reference in rows:
        scores = score([prediction], [reference])
        assert all(0 <= value <= 100 + 1e-6 for value in scores.values())


def test_rows_must_pair_up() -> None:
    with pytest.raises(ValueError, match="got 1 predictions and 2 references"):
        score(["a"], ["b", "c"])
    with pytest.raises(ValueError, match="got 0 predictions"):
        score([], [])


def test_jieba_leaves_no_file_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    segmenter.cache_clear()
    assert metrics.segmenter().lcut("今天天气很好") == ["今天天气", "很", "好"]
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")

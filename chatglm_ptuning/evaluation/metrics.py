"""Scores of generated texts against their references, all 0-100.

ROUGE and BLEU-4 are those of the released ChatGLM-6B and ChatGLM2-6B code, so they compare with published numbers. The
released ChatGLM3 code takes words instead of characters for BLEU-4 and no factor of 100: the two do not compare.
"""

import logging
import string
import tempfile
from collections.abc import Sequence
from functools import cache

import jieba
import sacrebleu
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

BLANK = string.whitespace + "\u3000."  # \u3000 is the blank of Chinese text


def score(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Score predictions against one reference each.

    A prediction of nothing but blanks and full stops (".") scores 0 and counts like any other; the released code
    dies of it.

    Returns:
        Scores 0-100 by name: "rouge-1", "rouge-2", "rouge-l" (mean of `rouge_scores`), "bleu-4" (mean of `bleu_4`),
        "sacrebleu" (corpus BLEU, sacrebleu's tokenizer "zh") and "chrf" (corpus chrF2, Popović 2015).

    Raises:
        ValueError: No rows, or not as many predictions as references.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            "there must be one reference a prediction and at least one of both,"
            f" got {len(predictions)} predictions and {len(references)} references"
        )
    predictions = [text if text.strip(BLANK) else "" for text in predictions]
    rows = [
        {**rouge_scores(prediction, reference), "bleu-4": bleu_4(prediction, reference)}
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    corpus = sacrebleu.corpus_bleu(predictions, [references], tokenize="zh")
    chrf = sacrebleu.corpus_chrf(predictions, [references])
    return {**means, "sacrebleu": corpus.score, "chrf": chrf.score}


def rouge_scores(prediction: str, reference: str) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of one text (Lin 2004), F measure times 100, rounded to 4 digits as released.

    Both texts are cut into words by jieba. ROUGE-1 and ROUGE-2 compare the sets of word n-grams, ROUGE-L the longest
    common subsequences sentence by sentence, as rouge-chinese does.
    """
    words = [" ".join(segmenter().cut(text)) for text in (prediction, reference)]
    if not all(text.split() for text in words):
        return dict.fromkeys(("rouge-1", "rouge-2", "rouge-l"), 0.0)
    result = Rouge().get_scores(*words)[0]
    return {name: round(100 * result[name]["f"], 4) for name in ("rouge-1", "rouge-2", "rouge-l")}


def bleu_4(prediction: str, reference: str) -> float:
    """Sentence BLEU-4 on characters (Papineni et al. 2002; blanks count) times 100, rounded to 4 digits as released.

    The n-gram precisions are smoothed by method 3 of Chen and Cherry (2014), as nltk has it.
    """
    smoothing = SmoothingFunction().method3
    bleu = sentence_bleu([list(reference)], list(prediction), smoothing_function=smoothing)
    return round(100 * float(bleu), 4)


@cache
def segmenter() -> jieba.Tokenizer:
    """Jieba with its own dictionary.

    It is silent, and its cache file is neither read from nor left in the common temporary directory.
    """
    jieba.setLogLevel(logging.WARNING)
    words = jieba.Tokenizer()
    with tempfile.TemporaryDirectory() as directory:
        words.tmp_dir = directory
        words.initialize()
    return words

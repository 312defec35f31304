import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.serving.sampling import Chooser, Sampling, choose_tokens

PROMPT = [3, 5, 7, 11]
SETTINGS = [
    Sampling(temperature=0.7, top_k=4),
    Sampling(temperature=1.3, top_p=0.6),
    Sampling(temperature=1.0, top_k=6, top_p=0.8, repetition_penalty=1.5),
    Sampling(temperature=0.2),
]


def expected(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities that transformers draws from, [vocab_size]."""
    ids, scores = torch.tensor([PROMPT]), logits[None].clone()
    scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
    scores = TemperatureLogitsWarper(sampling.temperature)(ids, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    return TopPLogitsWarper(sampling.top_p)(ids, scores).softmax(-1)[0]


@pytest.mark.parametrize("sampling", SETTINGS)
def test_drawn_as_transformers_draws(sampling: Sampling) -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(0)) * 2
    wanted = expected(logits, sampling)
    draws = 4000
    choosers = [Chooser(Sampling(**{**vars(sampling), "seed": i}), PROMPT) for i in range(draws)]
    tokens = torch.tensor(choose_tokens(logits.repeat(draws, 1), choosers))
    seen = torch.bincount(tokens, minlength=20) / draws
    assert not seen[wanted == 0].any()
    assert (seen - wanted).abs().max() < 0.03


def test_huge_top_k_is_the_whole_vocabulary() -> None:
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    rows = [Chooser(Sampling(temperature=1.0, top_k=k, seed=5), []) for k in (0, 10**30)]
    assert len(set(choose_tokens(logits.repeat(2, 1), rows))) == 1


def test_rows_do_not_know_of_one_another() -> None:
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
    seeded = [Sampling(**{**vars(sampling), "seed": 3}) for sampling in [*SETTINGS[:3], Sampling()]]
    together = [Chooser(sampling, PROMPT) for sampling in seeded]
    alone = [Chooser(sampling, PROMPT) for sampling in seeded]
    for _ in range(5):
        tokens = choose_tokens(logits.clone(), together)
        single = [
            choose_tokens(row[None].clone(), [c])[0] for row, c in zip(logits, alone, strict=True)
        ]
        assert tokens == single
        assert tokens[3] == int(logits[3].argmax())


def test_logits_that_are_no_numbers_are_told() -> None:
    logits = torch.tensor([[0.0, float("nan")], [0.0, 1.0], [0.0, -float("inf")]])
    choosers = [Chooser(Sampling(temperature=t), []) for t in (1.0, 0.0, 1.0)]
    assert choose_tokens(logits, choosers) == [-1, 1, 0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"stop": ("",)},
        {"stop": ("a",) * 17},
    ],
)
def test_settings_that_cannot_be(wrong: dict) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))} must"):
        Sampling(**wrong)

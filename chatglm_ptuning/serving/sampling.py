"""How the next token of each row is chosen: every row of a batch has its own settings and its own dice."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chatglm_ptuning.errors import UserError

MAX_STOPS = 16
LEAST_TEMPERATURE = 1e-6  # below it, float32 divides by nothing


@dataclass(frozen=True)
class Sampling:
    """Settings of one answer, named as in the OpenAI API where it has them.

    Args:
        max_tokens: Longest answer, in tokens.
        temperature: Divides the logits; 0 takes the likeliest token (greedy).
        top_p: Draw from the smallest set of tokens that holds this probability.
        top_k: Draw from this many likeliest tokens; 0 draws from all.
        repetition_penalty: Divides the logits of tokens of the prompt and the answer so far (Keskar et al.,
            arXiv 1909.05858); 1 is none.
        seed: Same seed, same answer; None draws anew every time.
        stop: Texts that end the answer where they would begin.

    Raises:
        UserError: A value that cannot be.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        penalty = self.repetition_penalty
        rules = {
            "max_tokens": (self.max_tokens >= 1, "be at least 1"),
            "temperature": (0 <= self.temperature <= 2, "be from 0 to 2"),
            "top_p": (0 < self.top_p <= 1, "be over 0 and at most 1"),
            "top_k": (self.top_k >= 0, "be 0 or more"),
            "repetition_penalty": (0.1 <= penalty <= 10, "be from 0.1 to 10"),
            "stop": (
                len(self.stop) <= MAX_STOPS and all(self.stop),
                f"be at most {MAX_STOPS} texts, none of them empty",
            ),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise UserError(f"{name} must {rule}, got {getattr(self, name)!r}")


class Chooser:
    """Chooses the tokens of one answer.

    Args:
        sampling: The settings.
        prompt_ids: What the repetition penalty counts as used from the start.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int]) -> None:
        self.sampling = sampling
        self.used = set(prompt_ids) if sampling.repetition_penalty != 1 else None
        self.dice = random.Random(sampling.seed)

    def penalise(self, logits: Tensor) -> None:
        """Apply the repetition penalty in place to logits [vocab_size]."""
        if self.used is not None:
            used = torch.tensor(sorted(self.used), device=logits.device)
            scores = logits[used]
            penalty = self.sampling.repetition_penalty
            logits[used] = torch.where(scores < 0, scores * penalty, scores / penalty)


def choose_tokens(logits: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """The next token of every row.

    What a row gets depends on its own logits, settings and dice alone. The filters come in the order of transformers'
    `generate`: repetition penalty, temperature, top_k, top_p.

    Args:
        logits: [rows, vocab_size].
        choosers: One a row.

    Returns:
        A token id a row; -1 where the logits are no numbers.
    """
    logits = logits.float()
    for row, chooser in zip(logits, choosers, strict=True):
        chooser.penalise(row)
    best = logits.max(dim=-1)
    tokens = torch.where(best.values.isfinite(), best.indices, -1).tolist()
    drawing = [
        row
        for row, chooser in enumerate(choosers)
        if chooser.sampling.temperature and tokens[row] >= 0
    ]
    if drawing:
        drawn = draw(logits[drawing], [choosers[row] for row in drawing])
        for row, token in zip(drawing, drawn, strict=True):
            tokens[row] = token
    for token, chooser in zip(tokens, choosers, strict=True):
        if chooser.used is not None:
            chooser.used.add(token)
    return tokens


def draw(logits: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """Draw a token for every row [rows, vocab_size], one number of its dice each."""
    settings = [chooser.sampling for chooser in choosers]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    vocab_size = logits.shape[1]
    temperature = column([max(s.temperature, LEAST_TEMPERATURE) for s in settings])
    ranked, tokens = logits.sort(dim=-1, descending=True, stable=True)
    ranked = (ranked - ranked[:, :1]) / temperature
    rank = torch.arange(vocab_size, device=logits.device)
    ranked = ranked.masked_fill(
        rank >= column([min(s.top_k or vocab_size, vocab_size) for s in settings]), -math.inf
    )
    mass = ranked.double().softmax(dim=-1).cumsum(dim=-1)
    # The nucleus ends with the first token that reaches top_p.
    top_p = column([s.top_p for s in settings]).double()
    size = ((mass < top_p).sum(dim=-1, keepdim=True) + 1).clamp(max=vocab_size)
    point = column([chooser.dice.random() for chooser in choosers]).double() * mass.gather(
        1, size - 1
    )
    place = torch.searchsorted(mass, point, right=True).clamp(max=size - 1)
    return tokens.gather(1, place)[:, 0].tolist()

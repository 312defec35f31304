"""The running batch: answers that get their next tokens from the same forward passes.

Every row has its own adapter. A prefix of P-Tuning v2 is nothing but keys and values in front of the prompt's, so it is
copied into the cache of its row, and rows with different prefixes and with none are alike from there on. LoRA is told
which rows are its own before every forward pass (peft's mixed batch).

Shapes: N answers, S prompt tokens, P virtual tokens, L layers, K key-value heads, D channels of a head.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from chatglm_ptuning.serving.answer import Answer
from chatglm_ptuning.serving.cache import BatchCache, tokens_mask
from chatglm_ptuning.serving.sampling import choose_tokens
from chatglm_ptuning.tuners import PrefixTuningConfig, active_adapters, set_adapter

logger = logging.getLogger(__name__)


class Batch:
    """Answers under way, one a row of the cache.

    Args:
        model: Any decoder of transformers, without prefixes of its own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.answers: list[Answer] = []
        shape: Any = PrefixTuningConfig().fit(model.config)
        self._cache = BatchCache(
            shape.num_layers, shape.num_key_value_heads, shape.head_dim, model.dtype, model.device
        )
        self._positions: list[Tensor] = []  # a row's next token's, [axes, 1]
        self._strides: list[Tensor] = []  # from each token to the next

    def join(self, answers: Sequence[Answer]) -> None:
        """Read prompts, give each answer its first token, and let those that go on join."""
        lengths = [len(answer.prompt_ids) for answer in answers]
        longest = max(lengths)
        ids = self._tensor([[0] * (longest - len(a.prompt_ids)) + [*a.prompt_ids] for a in answers])
        mask = tokens_mask(lengths, longest, self.model.device)
        positions = self._number(ids, mask)
        cache, prefix_mask = prefix_cache([answer.prefix for answer in answers], self.model.device)
        mask = torch.cat((prefix_mask, mask), dim=1)
        self._choose(answers, ids, mask, positions[..., :-2], cache)
        going = [row for row, answer in enumerate(answers) if answer.finish_reason is None]
        if not going:
            return
        parts = []
        for row in going:
            own, prefix = slice(-lengths[row], None), answers[row].prefix
            layers = [(x.keys[row, :, own], x.values[row, :, own]) for x in cache.layers]
            prompt = torch.stack([torch.stack(layer) for layer in layers])
            parts.append([prompt] if prefix is None else [prefix, prompt])
        self._cache.add_rows(parts)
        for row in going:
            self.answers.append(answers[row])
            self._positions.append(positions[row, ..., -2:-1])
            self._strides.append(positions[row, ..., -1:] - positions[row, ..., -2:-1])

    def step(self) -> None:
        """Give every answer its next token; those that end leave."""
        mask = self._cache.next_token()
        ids = self._tensor([answer.text.ids[-1:] for answer in self.answers])
        positions = torch.stack(self._positions)
        self._positions = list(positions + torch.stack(self._strides))
        self._choose(self.answers, ids, mask, positions, self._cache)
        self.leave()

    def leave(self) -> None:
        """Let the rows go whose answers have ended; the last row takes the place of each."""
        columns: tuple[list[Any], ...] = (self.answers, self._positions, self._strides)
        for row in range(len(self.answers) - 1, -1, -1):
            if self.answers[row].finish_reason is not None:
                self._cache.remove_row(row)
                for column in columns:
                    column[row] = column[-1]
                    column.pop()

    def _choose(
        self, answers: Sequence[Answer], ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache
    ) -> None:
        """One forward pass, and a token for every answer."""
        rows = [answer.lora for answer in answers] if any(a.lora for a in answers) else []
        if active_adapters(self.model) != rows:
            set_adapter(self.model, rows)
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens = choose_tokens(logits, [answer.chooser for answer in answers])
        for answer, token in zip(answers, tokens, strict=True):
            try:
                answer.add(token)
            except Exception as error:  # of one answer: its text cannot be made or parsed
                logger.exception("an answer had to be given up")
                answer.fail(f"{type(error).__name__}: {error}")

    def _number(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Positions of prompts and of the two tokens that will follow: [N, S + 2], or [N, axes, S + 2].

        What follows a prompt is numbered evenly, so two tokens tell the positions of all.
        """
        ids = torch.cat((ids, ids.new_zeros(len(ids), 2)), dim=1)
        mask = torch.cat((mask, mask.new_ones(len(ids), 2)), dim=1)
        decoder = self.model.get_decoder()
        if hasattr(decoder, "get_position_ids"):  # ChatGLM-6B numbers its own tokens
            return decoder.get_position_ids(ids, mask)
        return (mask.cumsum(dim=-1) - 1).clamp(min=0)

    def _tensor(self, values: list[list[int]]) -> Tensor:
        return torch.tensor(values, device=self.model.device)


def prefix_cache(
    prefixes: Sequence[Tensor | None], device: torch.device
) -> tuple[DynamicCache, Tensor]:
    """A cache that holds the prefix of every row, right-aligned, and its mask [N, P of the longest].

    Args:
        prefixes: Keys and values [L, 2, K, P, D]; None for a row without.
        device: Of the mask.
    """
    cache = DynamicCache()
    lengths = [prefix.shape[3] if prefix is not None else 0 for prefix in prefixes]
    longest = max(lengths)
    if longest:
        sample = next(prefix for prefix in prefixes if prefix is not None)
        layers, _, heads, _, channels = sample.shape
        rows = sample.new_zeros(layers, 2, len(prefixes), heads, longest, channels)
        for row, prefix in enumerate(prefixes):
            if prefix is not None:
                rows[:, :, row, :, longest - prefix.shape[3] :] = prefix
        for index, (keys, values) in enumerate(rows):
            cache.update(keys, values, index)
    return cache, tokens_mask(lengths, longest, device)

"""What an engine accepts: bounds on the queue, the prompts, the answers and the cache."""

from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedModel

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.serving.answer import Answer
from chatglm_ptuning.serving.cache import SLACK
from chatglm_ptuning.tuners import PrefixTuningConfig


class BusyError(RuntimeError):
    """The engine takes no more requests now; try again later."""


class TooLongError(UserError):
    """The prompt or the answer asked for is longer than the limits or the model's context allow."""


@dataclass(frozen=True)
class Limits:
    """What an engine accepts.

    Args:
        max_batch: Answers generated at the same time.
        max_waiting: Requests that may wait for a place in the batch.
        max_prompt_tokens: Longest prompt.
        max_answer_tokens: Longest answer that can be asked for.
        max_cached_tokens: Rows times columns of the cache; requests that would go over it wait. None takes what a third
            of the memory that is free once the model is loaded holds.
        max_prefill_tokens: Rows times columns of the prompts read in one forward pass, if it is more than one.

    Raises:
        UserError: One is below 1.
    """

    max_batch: int = 32
    max_waiting: int = 256
    max_prompt_tokens: int = 8192
    max_answer_tokens: int = 2048
    max_cached_tokens: int | None = None
    max_prefill_tokens: int = 4096

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value!r}")


def fitting_tokens(model: PreTrainedModel) -> int:
    """Tokens whose keys and values take a third of the free memory; the cache is held twice while it grows."""
    size = PrefixTuningConfig().fit(model.config).kv_size * model.dtype.itemsize
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = psutil.virtual_memory().available
    return free // 3 // size


def check_lengths(answer: Answer, limits: Limits, max_cached_tokens: int, context: int) -> None:
    """Refuse what is too long to be answered here, however long it waits.

    Args:
        answer: What is asked for.
        limits: The engine's.
        max_cached_tokens: Those of the limits, or what fits.
        context: The longest text of the model, in tokens.

    Raises:
        TooLongError: Prompt or answer.
    """
    longest_answer, prompt = answer.sampling.max_tokens, len(answer.prompt_ids)
    rules = [
        (prompt, limits.max_prompt_tokens, "the prompt"),
        (longest_answer, limits.max_answer_tokens, "max_tokens"),
        (prompt + longest_answer, context, "the prompt and max_tokens together"),
        (answer.longest, max_cached_tokens - SLACK, "prefix, prompt and max_tokens together"),
    ]
    for length, bound, what in rules:
        if length > bound:
            raise TooLongError(
                f"{what} must be at most {bound} tokens here, got {length}; ask for less"
            )

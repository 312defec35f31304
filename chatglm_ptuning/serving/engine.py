"""Answers for many callers at once from one model.

One thread runs the model. Before every token it lets waiting requests join the running batch and ended ones leave it
(iteration-level scheduling: Yu et al., Orca, OSDI 2022). Every request has its own adapter, sampling and length.

The queue, the prompts, the answers and the cache are bounded; what is over a bound is refused when it is submitted.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chatglm_ptuning.data.conversation import Message
from chatglm_ptuning.data.template import Template
from chatglm_ptuning.data.tool_calls import plain_function
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.serving.answer import Answer, Update
from chatglm_ptuning.serving.batch import Batch
from chatglm_ptuning.serving.cache import SLACK
from chatglm_ptuning.serving.sampling import Sampling
from chatglm_ptuning.tuners import prefix

logger = logging.getLogger(__name__)


class BusyError(RuntimeError):
    """The engine takes no more requests now; try again later."""


@dataclass(frozen=True)
class Limits:
    """What an engine accepts.

    Args:
        max_batch: Answers generated at the same time.
        max_waiting: Requests that may wait for a place in the batch.
        max_prompt_tokens: Longest prompt.
        max_answer_tokens: Longest answer that can be asked for.
        max_cached_tokens: Rows times columns of the cache; requests that would go over it wait.
        max_prefill_tokens: Rows times columns of the prompts read in one forward pass, if it is more than one.
    """

    max_batch: int = 32
    max_waiting: int = 256
    max_prompt_tokens: int = 2048
    max_answer_tokens: int = 2048
    max_cached_tokens: int = 65536
    max_prefill_tokens: int = 4096


class Engine:
    """Owns model, tokenizer, template and adapters, and answers.

    Args:
        model: The model; its prefixes become adapters of the same name. Nobody else may use it any more.
        tokenizer: Its tokenizer.
        template: Its chat format.
        limits: Bounds; None takes the defaults.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        limits: Limits | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.template = template
        self.limits = limits if limits is not None else Limits()
        self.finished: Counter[str] = Counter()  # answers by finish reason
        self.tokens: Counter[str] = (
            Counter()
        )  # "prompt" and "completion" tokens of all answers that have ended
        self._prefixes: dict[str, Tensor] = {}
        self._waiting: deque[Answer] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._is_closing = False
        self._changed = threading.Condition()
        with torch.inference_mode():
            self._take_prefixes()
            self._batch = Batch(model)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- for callers, from any thread

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters."""
        return sorted(self._prefixes)

    @property
    def load(self) -> tuple[int, int]:
        """Answers in the batch, and requests waiting."""
        return len(self._batch.answers), len(self._waiting)

    def encode(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """The prompt of a conversation, exactly as in training.

        Raises:
            UserError: The chat format cannot hold these messages.
        """
        return self.template.encode_prompt(self.tokenizer, messages, tools)

    def submit(
        self,
        prompt_ids: Sequence[int],
        emit: Callable[[Update], None],
        sampling: Sampling,
        adapter: str | None = None,
        tools: Any = None,
    ) -> Answer:
        """Ask for an answer.

        Args:
            prompt_ids: From `encode`.
            emit: Called with every `Update`, the last of which has a finish reason; from the engine's thread, so it
                must not block.
            sampling: How tokens are chosen.
            adapter: Who answers; None for the base.
            tools: The tools that `prompt_ids` offers.

        Returns:
            The answer under way; `cancel` gives it up.

        Raises:
            UserError: No such adapter, or something is longer than the limits allow.
            BusyError: The queue is full, or the engine is closing.
        """
        with self._changed:
            prefix = self._find(adapter)
        names = [plain_function(tool)["name"] for tool in tools] if tools else ()

        def tell(update: Update) -> None:
            if update.finish_reason is not None:
                self.finished[update.finish_reason] += 1
                self.tokens["prompt"] += len(prompt_ids)
                self.tokens["completion"] += update.completion_tokens
            emit(update)

        answer = Answer(
            prompt_ids, adapter, prefix, sampling, tell, self.template, self.tokenizer, names
        )
        self._check_lengths(answer)
        with self._changed:
            if self._is_closing:
                raise BusyError("the server is shutting down")
            if len(self._waiting) >= self.limits.max_waiting:
                raise BusyError(
                    f"{len(self._waiting)} requests are waiting already; try again later"
                )
            self._waiting.append(answer)
            self._changed.notify()
        return answer

    def stream(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        adapter: str | None = None,
        tools: Any = None,
    ) -> Iterator[Update]:
        """As `submit`, as an iterator; closing it gives the answer up."""
        updates: SimpleQueue[Update] = SimpleQueue()
        answer = self.submit(prompt_ids, updates.put, sampling, adapter, tools)
        return follow(answer, updates)

    def close(self, drain: bool = True) -> None:
        """Take no more requests, end those under way (`drain` lets them finish), and stop the thread."""
        with self._changed:
            self._is_closing = True
            for answer in [] if drain else [*self._batch.answers, *self._waiting]:
                answer.cancel()
            self._changed.notify()
        self._thread.join()

    def _find(self, adapter: str | None) -> Tensor | None:
        if adapter is None:
            return None
        if adapter not in self._prefixes:
            known = ", ".join(self.adapters) or "none: no adapter is loaded"
            raise UserError(f"adapter must be one of those loaded ({known}), got {adapter!r}")
        return self._prefixes[adapter]

    def _check_lengths(self, answer: Answer) -> None:
        limits, longest_answer = self.limits, answer.sampling.max_tokens
        prompt, context = len(answer.prompt_ids), self.model.config.max_position_embeddings
        rules = [
            (prompt, limits.max_prompt_tokens, "the prompt"),
            (longest_answer, limits.max_answer_tokens, "max_tokens"),
            (prompt + longest_answer, context, "the prompt and max_tokens together"),
            (
                answer.longest,
                limits.max_cached_tokens - SLACK,
                "prefix, prompt and max_tokens together",
            ),
        ]
        for length, bound, what in rules:
            if length > bound:
                raise UserError(
                    f"{what} must be at most {bound} tokens here, got {length}; ask for less"
                )

    # ---- adapters

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; answers under way go on with it.

        Raises:
            UserError: No such adapter.
        """
        with self._changed:
            self._find(name)
            del self._prefixes[name]

    def _take_prefixes(self) -> None:
        """Compute the keys and values of the model's prefixes; the model itself runs without any."""
        tuning = prefix.prefix_tuning_of(self.model)
        if tuning is not None:
            prefix.use(self.model, [])
            for name, encoder in tuning.encoders.items():
                self._prefixes[name] = encoder().to(self.model.dtype)

    def _do(self, job: Callable[[], None]) -> None:
        """Run something in the engine's thread, between two tokens, and wait until it is done."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                done.set_result(job())
            except Exception as error:
                done.set_exception(error)

        with self._changed:
            self._jobs.append(run)
            self._changed.notify()
        done.result()

    # ---- the engine's thread

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._waiting or self._batch.answers or self._jobs or self._is_closing
                )
                jobs, joining = list(self._jobs), self._next_to_join()
                self._jobs.clear()
            for job in jobs:
                job()
            if joining:
                self._join(joining)
            if self._batch.answers:
                self._step()
            elif not jobs and not joining:
                return  # closing, and nothing is left

    def _join(self, answers: list[Answer]) -> None:
        try:
            self._batch.join(answers)
        except Exception as error:  # whatever it is, the other answers go on
            self._fail([answer for answer in answers if answer not in self._batch.answers], error)

    def _step(self) -> None:
        try:
            self._batch.step()
        except Exception as error:
            self._fail(self._batch.answers, error)
            self._batch = Batch(self.model)

    def _fail(self, answers: Sequence[Answer], error: Exception) -> None:
        """End answers because of a bug or full memory."""
        logger.error("%d answers had to be given up", len(answers), exc_info=error)
        is_memory = isinstance(error, torch.OutOfMemoryError)
        for answer in answers:
            if answer.finish_reason is None:
                answer.fail("out of memory" if is_memory else f"{type(error).__name__}: {error}")

    def _next_to_join(self) -> list[Answer]:
        """Take the requests from the queue that fit into the batch now, in order."""
        for answer in [answer for answer in self._waiting if answer.is_cancelled]:
            self._waiting.remove(answer)
            answer.finish("cancelled")
        limits, joining = self.limits, []
        longest = max((answer.longest for answer in self._batch.answers), default=0)
        prompt = 0
        while self._waiting:
            answer = self._waiting[0]
            rows = len(self._batch.answers) + len(joining) + 1
            longest = max(longest, answer.longest)
            prompt = max(prompt, len(answer.prompt_ids))
            if rows > limits.max_batch or rows * (longest + SLACK) > limits.max_cached_tokens:
                break
            if joining and (len(joining) + 1) * prompt > limits.max_prefill_tokens:
                break
            joining.append(self._waiting.popleft())
        return joining


def follow(answer: Answer, updates: "SimpleQueue[Update]") -> Iterator[Update]:
    """The updates of an answer until the last; closing the iterator gives the answer up."""
    try:
        while True:
            update = updates.get()
            yield update
            if update.finish_reason is not None:
                return
    finally:
        answer.cancel()

"""Answers for many callers at once from one model.

One thread runs the model. Before every token it lets waiting requests join the running batch and ended ones leave it
(iteration-level scheduling: Yu et al., Orca, OSDI 2022). Every request has its own adapter, sampling and length.

The queue, the prompts, the answers and the cache are bounded; what is over a bound is refused when it is submitted.
"""

import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chatglm_ptuning.data.conversation import Message
from chatglm_ptuning.data.template import Template
from chatglm_ptuning.data.tool_calls import plain_function
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.loading import template_of
from chatglm_ptuning.serving.answer import Answer, FinishReason, Update
from chatglm_ptuning.serving.batch import Batch
from chatglm_ptuning.serving.cache import SLACK
from chatglm_ptuning.serving.limits import BusyError, Limits, check_lengths, fitting_tokens
from chatglm_ptuning.serving.sampling import Sampling
from chatglm_ptuning.tuners import (
    delete_adapter,
    list_adapters,
    load_adapter,
    prefix,
    prompt,
    set_adapter,
)
from chatglm_ptuning.tuners.prefix_init import vector_key_values

logger = logging.getLogger(__name__)


class Engine:
    """Owns model, tokenizer, template and adapters, and answers.

    Args:
        model: The model, whose adapters keep their names. Nobody else may use it any more.
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
        # answers by finish reason, and "prompt" and "completion" tokens of all answers that have ended
        self.finished = Counter(dict.fromkeys(get_args(FinishReason), 0))
        self.tokens = Counter({"prompt": 0, "completion": 0})
        self._context = model.config.max_position_embeddings
        cached = self.limits.max_cached_tokens
        self.max_cached_tokens = cached if cached is not None else fitting_tokens(model)
        self._adapters: dict[str, Tensor | None]  # keys and values in front; None for LoRA
        self._retired: set[str] = set()  # removed LoRA that still answers
        self._waiting: deque[Answer] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._is_closing = self._gives_up = False
        self._changed = threading.Condition()
        with torch.no_grad():
            self._adapters = {name: self._take(name) for name in list_adapters(model)}
        with torch.inference_mode():
            self._batch = Batch(model)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- for callers, from any thread

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters."""
        with self._changed:
            return sorted(self._adapters)

    @property
    def is_open(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._is_closing

    @property
    def load(self) -> tuple[int, int]:
        """Answers in the batch, and requests waiting."""
        with self._changed:
            under_way = [a for a in self._batch.answers if a.finish_reason is None]
            return len(under_way), len(self._waiting)

    def encode(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """The prompt of a conversation, exactly as in training.

        Raises:
            UserError: The chat format cannot hold these messages.
        """
        return self.template.encode_prompt(self.tokenizer, messages, tools)

    def encode_text(self, text: str) -> list[int]:
        """The prompt of a bare text that the model continues, with the control tokens its family begins with.

        Raises:
            UserError: The text is no valid Unicode.
        """
        ids = self.tokenizer.encode_ordinary(text)
        return self.tokenizer.build_inputs_with_special_tokens(ids)

    def longest_answer(self, prompt_ids: Sequence[int], adapter: str | None = None) -> int:
        """The largest `max_tokens` that this prompt allows; below 1 if the prompt itself is too long.

        Raises:
            UserError: No such adapter.
        """
        with self._changed:
            key_values = self._find(adapter)
        virtual = key_values.shape[3] if key_values is not None else 0
        longest = min(
            self.limits.max_answer_tokens,
            self._context - len(prompt_ids),
            self.max_cached_tokens - SLACK - virtual - len(prompt_ids),
        )
        return longest if len(prompt_ids) <= self.limits.max_prompt_tokens else min(longest, 0)

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
        names = [plain_function(tool)["name"] for tool in tools] if tools else ()

        def tell(update: Update) -> None:
            if update.finish_reason is not None:
                self.finished[update.finish_reason] += 1
                self.tokens["prompt"] += len(prompt_ids)
                self.tokens["completion"] += update.completion_tokens
            emit(update)

        with self._changed:  # whole: the adapter must not be removed between look-up and queue
            answer = Answer(
                prompt_ids,
                adapter,
                self._find(adapter),
                sampling,
                tell,
                self.template,
                self.tokenizer,
                names,
            )
            check_lengths(answer, self.limits, self.max_cached_tokens, self._context)
            if not self.is_open:
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

    def give_up(self) -> None:
        """Take no more requests, and end those under way at their next token."""
        self._is_closing = self._gives_up = True

    def close(self, drain: bool = True) -> None:
        """Take no more requests, end those under way (`drain` lets them finish), and stop the thread."""
        with self._changed:
            self._is_closing = True
            self._gives_up |= not drain
            self._changed.notify()
        self._thread.join()

    def _find(self, adapter: str | None) -> Tensor | None:
        """Keys and values of an adapter that is a prefix; the lock must be held."""
        if adapter is None:
            return None
        if adapter not in self._adapters:
            known = ", ".join(sorted(self._adapters)) or "none: no adapter is loaded"
            raise UserError(f"adapter must be one of those loaded ({known}), got {adapter!r}")
        return self._adapters[adapter]

    # ---- adapters

    def add_adapter(self, name: str, directory: str | os.PathLike[str]) -> None:
        """Load one more adapter between two tokens; answers under way go on after it.

        Args:
            name: What it is called from now on; must be new.
            directory: A prefix, soft prompt or LoRA adapter for this base.

        Raises:
            UserError: The name is taken, or the directory holds no adapter for this base that can share a batch; all
                is then as before.
            BusyError: The engine is closing.
        """

        def load() -> None:
            if name in self._adapters or name in self._retired:
                raise UserError(
                    f"an adapter's name must be new, got {name!r} which is loaded or still answers; remove that one or"
                    " choose another"
                )
            template_of(self.tokenizer, self.template.name, [Path(directory)])
            with torch.inference_mode(False), torch.no_grad():
                load_adapter(self.model, directory, name)
                key_values = self._take(name)
            with self._changed:
                self._adapters[name] = key_values

        self._do(load)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; answers under way go on with it.

        Raises:
            UserError: No such adapter.
            BusyError: The engine is closing.
        """
        with self._changed:
            if self._find(name) is None:
                self._retired.add(name)
            del self._adapters[name]
        self._do(self._drop_retired)

    def _take(self, name: str) -> Tensor | None:
        """Keys and values of a prefix or soft prompt, which leaves the model; None for LoRA, which stays in it.

        Raises:
            UserError: The adapter cannot share a batch; it has left the model.
        """
        if name in prefix.names(self.model):
            key_values = prefix.encoder_of(self.model, name)().to(self.model.dtype).contiguous()
            delete_adapter(self.model, name)
            return key_values
        try:
            if name in prompt.names(self.model):
                return self._take_prompt(name)
            set_adapter(self.model, [name, None])
        except UserError:
            delete_adapter(self.model, name)
            raise
        return None

    def _take_prompt(self, name: str) -> Tensor:
        """The keys and values that a soft prompt amounts to; it leaves the model.

        Raises:
            UserError: The base reads prompts in both directions; it has not left the model.
        """
        if hasattr(self.model.get_decoder(), "get_position_ids"):
            raise UserError(
                "a soft prompt that is served must not depend on the text behind it, which it sees in ChatGLM-6B, got"
                f" {name!r}; use `python -m chatglm_ptuning evaluate` for it"
            )
        vectors = prompt.encoder_of(self.model, name).eval()()
        delete_adapter(self.model, name)
        return vector_key_values(self.model, vectors).contiguous()

    def _drop_retired(self) -> None:
        """Take removed LoRA out of the model once nobody answers with it."""
        with self._changed:
            using = {answer.lora for answer in [*self._batch.answers, *self._waiting]}
            unused = self._retired - using
            self._retired -= unused
        for name in unused:
            delete_adapter(self.model, name)

    def _do(self, job: Callable[[], None]) -> None:
        """Run something in the engine's thread, between two tokens, and wait until it is done."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                job()
            except Exception as error:  # handed to the caller
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._changed:
            if not self.is_open:
                raise BusyError("the server is shutting down")
            self._jobs.append(run)
            self._changed.notify()
        done.result()

    # ---- the engine's thread

    @torch.inference_mode()
    def _run(self) -> None:
        while self._has_work():
            try:
                self._turn()
            except Exception as error:  # a bug in here: whoever waits must be told
                with self._changed:
                    lost = [*self._batch.answers, *self._waiting]
                    self._waiting.clear()
                self._fail(lost, error)
                self._batch = Batch(self.model)

    def _has_work(self) -> bool:
        """Wait for something to do; False once the engine is closed and all is done."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._waiting or self._batch.answers or self._jobs or self._is_closing
            )
            return bool(self._waiting or self._batch.answers or self._jobs)

    def _turn(self) -> None:
        """Let requests join, give every answer its next token, do the jobs."""
        with self._changed:
            for answer in [*self._batch.answers, *self._waiting] if self._gives_up else ():
                answer.cancel()
            joining = self._next_to_join()
        if joining:
            self._join(joining)
        if self._batch.answers:
            self._step()
        if self._retired:
            self._drop_retired()
        while self._jobs:
            self._jobs.popleft()()

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
        # a CPU's allocator has no error class of its own
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        is_memory = is_memory or "can't allocate memory" in str(error)
        for answer in answers:
            if answer.finish_reason is None:
                answer.fail("out of memory" if is_memory else f"{type(error).__name__}: {error}")

    def _next_to_join(self) -> list[Answer]:
        """Take the requests from the queue that fit into the batch now, in order."""
        for answer in [answer for answer in self._waiting if answer.is_cancelled]:
            self._waiting.remove(answer)
            answer.finish("cancelled")
        limits, joining = self.limits, list[Answer]()
        longest = max((answer.longest for answer in self._batch.answers), default=0)
        prompt = 0
        while self._waiting:
            answer = self._waiting[0]
            rows = len(self._batch.answers) + len(joining) + 1
            longest = max(longest, answer.longest)
            prompt = max(prompt, len(answer.prompt_ids))
            if rows > limits.max_batch or rows * (longest + SLACK) > self.max_cached_tokens:
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

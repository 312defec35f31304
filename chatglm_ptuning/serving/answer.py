"""One answer under way: what was asked, how far it is, and who is told."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from chatglm_ptuning.data.conversation import Message
from chatglm_ptuning.data.template import Template
from chatglm_ptuning.serving.sampling import Chooser, Sampling
from chatglm_ptuning.serving.text import AnswerText

logger = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Update:
    """News of an answer.

    Args:
        text: What comes after the text of all updates before.
        completion_tokens: Tokens generated so far, without the one that ends the answer.
        finish_reason: Set in the last update: the model ended the answer or a stop text came ("stop"), the longest
            length was reached ("length"), the model calls tools ("tool_calls"), the caller is gone ("cancelled"), or
            something broke ("error").
        message: In the last update, the whole answer.
        error: What broke.
    """

    text: str
    completion_tokens: int
    finish_reason: FinishReason | None = None
    message: Message | None = None
    error: str | None = None


class Answer:
    """An answer from the queue to its end; everything but `cancel` belongs to the engine's thread.

    Args:
        prompt_ids: The prompt.
        adapter: Name of the adapter that answers; None for the base.
        prefix: The adapter's keys and values [L, 2, K, P, D]; None for LoRA and for the base.
        sampling: How tokens are chosen.
        emit: Called with every update, from the engine's thread; must not block.
        template: The chat format.
        tokenizer: Makes text of tokens.
        tools: Names of the tools on offer.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        adapter: str | None,
        prefix: Tensor | None,
        sampling: Sampling,
        emit: Callable[[Update], None],
        template: Template,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[str] = (),
    ) -> None:
        self.prompt_ids = prompt_ids
        self.adapter = adapter
        self.prefix = prefix
        self.sampling = sampling
        self.emit = emit
        self.stop_ids = set(template.stop_token_ids(tokenizer))
        self.chooser = Chooser(sampling, prompt_ids)
        self.text = AnswerText(tokenizer.decode, template.parse_response, sampling.stop, tools)
        self.is_cancelled = False
        self.finish_reason: FinishReason | None = None

    def cancel(self) -> None:
        """Give the answer up; its last update comes at the next token."""
        self.is_cancelled = True

    @property
    def lora(self) -> str | None:
        """The adapter where it is one that the model applies itself; None where the cache says it all."""
        return self.adapter if self.prefix is None else None

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.text.ids)

    @property
    def longest(self) -> int:
        """Columns that the answer takes at most: prefix, prompt, `max_tokens`."""
        virtual = self.prefix.shape[3] if self.prefix is not None else 0
        return virtual + len(self.prompt_ids) + self.sampling.max_tokens

    def add(self, token: int) -> None:
        """Take the next token in and tell the caller what it shows."""
        if self.is_cancelled:
            return self.finish("cancelled")
        if token < 0:
            return self.fail("the model's logits are not finite numbers")
        if token in self.stop_ids:
            return self.finish("stop")
        text = self.text.push(token)
        if self.text.is_stopped:
            return self.finish("stop", text)
        if self.num_tokens == self.sampling.max_tokens:
            return self.finish("length", text)
        return self._tell(Update(text, self.num_tokens))

    def finish(self, reason: FinishReason, text: str = "") -> None:
        """End the answer; `text` is what is shown before the rest."""
        text += self.text.close()
        calls = () if self.text.is_stopped else self.text.message.tool_calls
        self.finish_reason = "tool_calls" if calls and reason == "stop" else reason
        message = Message("assistant", self.text.shown, tool_calls=calls)
        self._tell(Update(text, self.num_tokens, self.finish_reason, message))

    def fail(self, error: str) -> None:
        """End the answer because something broke."""
        self.finish_reason = "error"
        message = Message("assistant", self.text.shown)
        self._tell(Update("", self.num_tokens, "error", message, error))

    def _tell(self, update: Update) -> None:
        try:
            self.emit(update)
        except Exception:  # a caller's fault must not reach the other answers
            logger.warning("an answer is given up: its caller cannot be told", exc_info=True)
            self.cancel()

"""Chat formats: messages to token ids and labels, and answers back to messages.

One object per format serves training, evaluation, web demo and API, so what a model is trained on is what it is asked.
Users' text is encoded without recognising control tokens in it; control tokens are placed by name, as the tokenizer
has them. For ordinary text the ids are those of the released code.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from chatglm_ptuning.data.conversation import Conversation, Message
from chatglm_ptuning.errors import UserError

IGNORED = -100  # the label of a token that is not learned, as everywhere in torch and transformers


class Tokenizer(Protocol):
    """What a template needs of a tokenizer."""

    name_or_path: str
    unk_token_id: int | None

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text in which no control token is recognised."""

    def convert_tokens_to_ids(self, tokens: str) -> Any:
        """Id of a token by its name; the unknown token's where there is none."""


class Example(NamedTuple):
    """A conversation as the model is trained on it.

    Args:
        input_ids: Ids of the whole conversation.
        labels: For each position its own id where it is learned, else -100 (the model shifts).
        prompt_length: Tokens before the first one that belongs to the last answer.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int


class Template(ABC):
    """A chat format.

    Attributes:
        name: Value of `model.template`.
        prompt_targets: The last so many tokens of a prompt are learned too.
    """

    name: str
    prompt_targets = 0

    @abstractmethod
    def encode_prompt(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Any = None
    ) -> list[int]:
        """Ids up to where the assistant's next answer begins.

        Raises:
            UserError: The format cannot hold these messages, or the tokenizer lacks its control tokens.
        """

    @abstractmethod
    def encode_conversation(
        self, tokenizer: Tokenizer, conversation: Conversation, loss_on: str = "all"
    ) -> Example:
        """Ids and labels of a conversation that ends with an answer.

        The first ids are exactly those of `encode_prompt` for the messages before that answer, and the last one is
        the token that ends it.

        Args:
            tokenizer: The model's tokenizer.
            conversation: Its last message is the assistant's.
            loss_on: "all" learns every answer, "last" the last one; a message's own `loss` comes first.

        Raises:
            UserError: As `encode_prompt`.
        """

    @abstractmethod
    def stop_token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Ids that end an answer."""

    @abstractmethod
    def parse_response(self, text: str) -> Message:
        """The message that a generated text stands for; the text is what was decoded, from the first new token on."""

    def token_id(self, tokenizer: Tokenizer, token: str) -> int:
        """Id of a control token.

        Raises:
            UserError: The tokenizer has no such token, so the checkpoint is of another family.
        """
        index = tokenizer.convert_tokens_to_ids(token)
        if index is None or index == tokenizer.unk_token_id:
            raise UserError(
                f"template {self.name} must have a tokenizer with the token {token}, got {tokenizer.name_or_path!r}"
                " without it; set model.template to the format of this checkpoint"
            )
        return int(index)


def is_learned(message: Message, is_last: bool, loss_on: str) -> bool:
    """Whether training learns an assistant message."""
    return message.loss if message.loss is not None else is_last or loss_on == "all"


def split_rounds(messages: Sequence[Message], template: str) -> tuple[list[tuple[str, str]], str]:
    """Earlier (question, answer) rounds and the open question, for formats that know no other roles.

    A system text goes in front of the first question, on lines of its own.

    Raises:
        UserError: Messages of other roles, or not user and assistant in turn.
    """
    roles = [message.role for message in messages]
    begins = roles[:1] == ["system"]
    expected = ["system"] * begins + ["user", "assistant"] * len(roles)
    if not roles or roles != expected[: len(roles)] or roles[-1] != "user":
        raise UserError(
            f"template {template} must be given user and assistant messages in turn (a system message first if any),"
            f" the last one the user's, got roles {', '.join(roles) or 'none'}"
        )
    if any(message.tool_calls or message.metadata for message in messages):
        raise UserError(
            f"template {template} must be given messages without tool calls; use chatglm3 or glm4"
        )
    texts = [message.content for message in messages[begins:]]
    if begins and messages[0].content:
        texts[0] = f"{messages[0].content}\n{texts[0]}"
    return list(zip(texts[0:-1:2], texts[1::2], strict=True)), texts[-1]


class ChatGLMTemplate(Template):
    """ChatGLM-6B: a bare question, or numbered rounds where there is history; [gMASK] <sop> answer <eop>.

    The context of a row is read in both directions, so a row has one context and one answer: only the last answer is
    learned. <sop> is learned as well (predicted at [gMASK]), as the released training does.
    """

    name = "chatglm"
    prompt_targets = 1

    def encode_prompt(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Any = None
    ) -> list[int]:
        """See `Template.encode_prompt`."""
        if tools:
            raise UserError("template chatglm must be used without tools; use chatglm3 or glm4")
        rounds, question = split_rounds(messages, self.name)
        text = question
        if rounds:
            past = [f"[Round {i}]\n问：{q}\n答：{a}\n" for i, (q, a) in enumerate(rounds)]
            text = f"{''.join(past)}[Round {len(rounds)}]\n问：{question}\n答："
        ids = tokenizer.encode_ordinary(text)
        return [*ids, self.token_id(tokenizer, "[gMASK]"), self.token_id(tokenizer, "<sop>")]

    def encode_conversation(
        self, tokenizer: Tokenizer, conversation: Conversation, loss_on: str = "all"
    ) -> Example:
        """See `Template.encode_conversation`."""
        *context, answer = conversation.messages
        prompt = self.encode_prompt(tokenizer, context, conversation.tools)
        end = self.token_id(tokenizer, "<eop>")
        input_ids = [*prompt, *tokenizer.encode_ordinary(answer.content), end]
        start = len(prompt) - self.prompt_targets
        learned = is_learned(answer, is_last=True, loss_on=loss_on)
        target = input_ids[start:] if learned else [IGNORED] * (len(input_ids) - start)
        return Example(input_ids, [IGNORED] * start + target, start)

    def stop_token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """See `Template.stop_token_ids`."""
        return [self.token_id(tokenizer, "<eop>")]

    def parse_response(self, text: str) -> Message:
        """See `Template.parse_response`; half-width punctuation beside a Chinese character becomes full-width.

        The tokenizer's normalisation has made all of it half-width.
        """
        return Message("assistant", _PUNCTUATION.sub(_full_width, with_year(text)))


_PUNCTUATION = re.compile(r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")


def _full_width(match: re.Match[str]) -> str:
    return chr(ord(match[0]) - ord("!") + ord("！"))


def with_year(text: str) -> str:
    """An answer without blanks around it, and with the year of training where the released models write a stand-in."""
    return text.strip().replace("[[训练时间]]", "2023年")


TEMPLATES: dict[str, Template] = {template.name: template for template in (ChatGLMTemplate(),)}

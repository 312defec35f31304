"""Chat formats: messages to token ids and labels, and answers back to messages.

One object per format serves training, evaluation, web demo and API, so what a model is trained on is what it is asked.
Users' text is encoded without recognising control tokens in it; control tokens are placed by name, as the tokenizer
has them. For ordinary text the ids are those of the released code.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from chatglm_ptuning.data.conversation import Conversation, Message, ToolCall, split_turns
from chatglm_ptuning.data.tool_calls import (
    CHATGLM3_SYSTEM,
    chatglm3_tools,
    glm4_tools,
    json_call,
    parse_json_call,
    parse_python_call,
    python_call,
)
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
        control_tokens: Tokens that only its models have together.
        prompt_targets: The last so many tokens of a prompt are learned too.
    """

    name: str
    control_tokens: tuple[str, ...]
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

    def answer_text(self, answer: Message) -> str:
        """What an answer says, for a comparison with another answer."""
        return answer.content

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
    """Whether training learns a message."""
    if message.loss is not None:
        return message.loss
    return message.role == "assistant" and (is_last or loss_on == "all")


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences share from the beginning."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


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
            f" the last one the user's, got roles {', '.join(roles[:8]) or 'none'}{', ...' * (len(roles) > 8)}"
        )
    refuse_calls(messages, template)
    texts = [message.content for message in messages[begins:]]
    if begins and messages[0].content:
        texts[0] = f"{messages[0].content}\n{texts[0]}"
    return list(zip(texts[0:-1:2], texts[1::2], strict=True)), texts[-1]


def refuse_calls(messages: Sequence[Message], template: str) -> None:
    """Refuse what a format without tools would leave out.

    Raises:
        UserError: A message calls a tool or has a line of metadata.
    """
    if any(message.tool_calls or message.metadata for message in messages):
        raise UserError(
            f"template {template} must be given messages without tool calls; use chatglm3 or glm4"
        )


class ChatGLMTemplate(Template):
    """ChatGLM-6B: a bare question, or numbered rounds where there is history; [gMASK] <sop> answer <eop>.

    The context of a row is read in both directions, so a row has one context and one answer: only the last answer is
    learned. <sop> is learned as well (predicted at [gMASK]), as the released training does.
    """

    name = "chatglm"
    control_tokens = ("[gMASK]", "<sop>", "<eop>")
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
        refuse_calls([answer], self.name)
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


class ChatGLM2Template(Template):
    """ChatGLM2-6B: [gMASK] sop, numbered rounds from 1 with blank lines between, the answer, </s>.

    The whole prompt is encoded as one text, so an earlier answer stands in it without an end token. Where an earlier
    answer is learned, the token after it has the end token as its label: its id stays what is served.
    """

    name = "chatglm2"
    control_tokens = ("[gMASK]", "sop", "</s>")

    def encode_prompt(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Any = None
    ) -> list[int]:
        """See `Template.encode_prompt`."""
        return self._encode(tokenizer, self._texts(messages, tools)[-1])

    def encode_conversation(
        self, tokenizer: Tokenizer, conversation: Conversation, loss_on: str = "all"
    ) -> Example:
        """See `Template.encode_conversation`."""
        *context, answer = conversation.messages
        refuse_calls([answer], self.name)
        *earlier, whole = self._texts(context, conversation.tools)
        prompt = self._encode(tokenizer, whole)
        end = self.token_id(tokenizer, "</s>")
        labels = [IGNORED] * len(prompt)
        answers = [message for message in context if message.role == "assistant"]
        for text, message in zip(earlier, answers, strict=True):
            if message.content and is_learned(message, is_last=False, loss_on=loss_on):
                opened = self._encode(tokenizer, text)
                start = common_prefix(opened, prompt)
                start += start < len(
                    opened
                )  # a token over both sides of the border cannot be generated
                stop = common_prefix(self._encode(tokenizer, text + message.content), prompt)
                labels[start:stop] = prompt[start:stop]
                labels[stop] = end
        target = [*tokenizer.encode_ordinary(answer.content), end]
        learned = is_learned(answer, is_last=True, loss_on=loss_on)
        labels += target if learned else [IGNORED] * len(target)
        return Example(prompt + target, labels, len(prompt))

    def stop_token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """See `Template.stop_token_ids`."""
        return [self.token_id(tokenizer, "</s>")]

    def parse_response(self, text: str) -> Message:
        """See `Template.parse_response`."""
        return Message("assistant", with_year(text))

    def _encode(self, tokenizer: Tokenizer, text: str) -> list[int]:
        control = [self.token_id(tokenizer, "[gMASK]"), self.token_id(tokenizer, "sop")]
        return control + tokenizer.encode_ordinary(text)

    def _texts(self, messages: Sequence[Message], tools: Any) -> list[str]:
        """The prompt of every round in turn, each beginning with the one before it."""
        if tools:
            raise UserError("template chatglm2 must be used without tools; use chatglm3 or glm4")
        rounds, question = split_rounds(messages, self.name)
        texts, past = [], ""
        for number, (q, a) in enumerate([*rounds, (question, "")], 1):
            texts.append(f"{past}[Round {number}]\n\n问：{q}\n\n答：")
            past = f"{texts[-1]}{a}\n\n"
        return texts


class RoleTemplate(Template):
    """ChatGLM3-6B and GLM-4-9B: each message is a role token, a line of metadata, and the text.

    A role token ends the message before it, so where an answer is learned the token after it is learned too, and the
    assistant's own role token is not. After the last answer stands `end`, after a tool call <|observation|>.

    Attributes:
        sop: Second control token of a prompt.
        end: Token after the last answer.
        stops: Tokens that end an answer.
    """

    sop: str
    end: str
    stops: tuple[str, ...]

    @abstractmethod
    def system_messages(self, system: Sequence[Message], tools: Any) -> Sequence[Message]:
        """The system messages that offer these tools."""

    @abstractmethod
    def render_call(self, call: ToolCall) -> str:
        """A tool call as text."""

    @abstractmethod
    def parse_call(self, metadata: str, content: str) -> ToolCall | None:
        """A text as tool call; None where it is none."""

    def encode_prompt(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Any = None
    ) -> list[int]:
        """See `Template.encode_prompt`."""
        ids = [self.token_id(tokenizer, "[gMASK]"), self.token_id(tokenizer, self.sop)]
        for message in self._with_tools(messages, tools):
            for part in self._parts(tokenizer, message):
                ids += part
        return [*ids, self.token_id(tokenizer, "<|assistant|>")]

    def encode_conversation(
        self, tokenizer: Tokenizer, conversation: Conversation, loss_on: str = "all"
    ) -> Example:
        """See `Template.encode_conversation`."""
        ids = [self.token_id(tokenizer, "[gMASK]"), self.token_id(tokenizer, self.sop)]
        labels = [IGNORED, IGNORED]
        messages = self._with_tools(conversation.messages, conversation.tools)
        answer, start = messages[-1], 0
        learned = False  # whether the message before is, whose end the next token is
        for number, message in enumerate(messages, 1):
            start = len(ids) + 1
            for part in self._parts(tokenizer, message):
                ids += part
                labels.append(part[0] if learned else IGNORED)
                learned = is_learned(message, number == len(messages), loss_on)
                labels += part[1:] if learned else [IGNORED] * (len(part) - 1)
        calls = bool(answer.tool_calls or answer.metadata)
        ids.append(self.token_id(tokenizer, "<|observation|>" if calls else self.end))
        labels.append(ids[-1] if learned else IGNORED)
        return Example(ids, labels, start)

    def stop_token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """See `Template.stop_token_ids`."""
        return [self.token_id(tokenizer, token) for token in self.stops]

    def parse_response(self, text: str) -> Message:
        """See `Template.parse_response`; tool calls after the text become `tool_calls`."""
        contents, calls = [], []
        for part in text.split("<|assistant|>"):
            metadata, newline, content = part.partition("\n")
            call = self.parse_call(metadata, content)
            if call is not None:
                calls.append(call)
            else:
                contents.append(with_year(content if newline and not metadata.strip() else part))
        return Message("assistant", "\n".join(filter(None, contents)), tool_calls=tuple(calls))

    def answer_text(self, answer: Message) -> str:
        """See `Template.answer_text`; tool calls are spelled as the model writes them."""
        calls = [f"{call.name}\n{self.render_call(call)}" for call in answer.tool_calls]
        return "\n".join(filter(None, [answer.metadata, answer.content, *calls]))

    def _with_tools(self, messages: Sequence[Message], tools: Any) -> list[Message]:
        system, turns = split_turns(messages)
        if tools:
            system = list(self.system_messages(system, tools))
        return [*system, *(message for turn in turns for message in turn)]

    def _parts(self, tokenizer: Tokenizer, message: Message) -> list[list[int]]:
        """Ids of a message: one part for its text, one for each tool call."""
        texts = [(message.metadata, message.content)]
        if message.tool_calls:
            texts = texts if message.content else []
            texts += [(call.name, self.render_call(call)) for call in message.tool_calls]
        role = self.token_id(tokenizer, f"<|{message.role}|>")
        encode = (
            tokenizer.encode_ordinary
        )  # twice, as released: a SentencePiece text begins with a blank of its own
        return [[role, *encode(f"{first}\n"), *encode(text)] for first, text in texts]


class ChatGLM3Template(RoleTemplate):
    """ChatGLM3-6B; tools stand as JSON in the system message, calls as `tool_call(...)` in a block of Python."""

    name = "chatglm3"
    control_tokens = ("[gMASK]", "sop", "</s>", "<|user|>", "<|assistant|>")
    sop = "sop"
    end = "</s>"
    stops = ("</s>", "<|user|>", "<|observation|>")
    render_call = staticmethod(python_call)
    parse_call = staticmethod(parse_python_call)

    def system_messages(self, system: Sequence[Message], tools: Any) -> Sequence[Message]:
        """See `RoleTemplate.system_messages`."""
        first, *others = system if system else [Message("system", CHATGLM3_SYSTEM)]
        return [replace(first, content=first.content + chatglm3_tools(tools)), *others]


class GLM4Template(RoleTemplate):
    """GLM-4-9B; a system message of its own offers the tools, calls are JSON."""

    name = "glm4"
    control_tokens = ("[gMASK]", "<sop>", "<|endoftext|>", "<|user|>", "<|assistant|>")
    sop = "<sop>"
    end = "<|user|>"
    stops = ("<|endoftext|>", "<|user|>", "<|observation|>")
    render_call = staticmethod(json_call)
    parse_call = staticmethod(parse_json_call)

    def system_messages(self, system: Sequence[Message], tools: Any) -> Sequence[Message]:
        """See `RoleTemplate.system_messages`."""
        return [
            Message("system", glm4_tools(tools)),
            *(message for message in system if message.content),
        ]


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (ChatGLMTemplate(), ChatGLM2Template(), ChatGLM3Template(), GLM4Template())
}

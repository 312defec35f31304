"""From files to token ids: training examples with labels, and prompts with references for generation.

`load_conversations` -> `encode_dataset` for training, `encode_prompts` for evaluation; both end at the same template
and the same truncation, so an evaluated prompt is the one that was trained.
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from chatglm_ptuning.data.config import DataConfig
from chatglm_ptuning.data.conversation import Conversation
from chatglm_ptuning.data.formats import conversation_from_row
from chatglm_ptuning.data.reading import data_files, read_rows
from chatglm_ptuning.data.report import DataReport
from chatglm_ptuning.data.rows import BadRow
from chatglm_ptuning.data.template import IGNORED, Example, Template, Tokenizer
from chatglm_ptuning.data.truncation import Fit, fit_prompt, without
from chatglm_ptuning.errors import UserError

__all__ = [
    "DataConfig",
    "DataReport",
    "Prompt",
    "TokenDataset",
    "encode_dataset",
    "encode_prompts",
    "load_conversations",
]


class Prompt(NamedTuple):
    """A prompt to answer.

    Args:
        input_ids: Ids up to where the answer begins.
        reference: The answer in the file.
        source: "file:line" of the row.
        text: Content of the message to answer.
    """

    input_ids: list[int]
    reference: str
    source: str
    text: str


class TokenDataset(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Examples in one flat array, 8 bytes a token; an item is {"input_ids": [...], "labels": [...]}."""

    def __init__(self) -> None:
        self._input_ids = array("i")
        self._labels = array("i")
        self._ends = array("q", [0])

    def append(self, input_ids: Sequence[int], labels: Sequence[int]) -> None:
        """Add an example; ids and labels have the same length."""
        self._input_ids.extend(input_ids)
        self._labels.extend(labels)
        self._ends.append(len(self._input_ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        index = range(len(self))[index]  # negative ones count from the end; IndexError beyond
        part = slice(self._ends[index], self._ends[index + 1])
        return {"input_ids": self._input_ids[part].tolist(), "labels": self._labels[part].tolist()}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [end - start for start, end in zip(self._ends, self._ends[1:], strict=False)]


def load_conversations(
    paths: str | Sequence[str], config: DataConfig, max_samples: int | None = None
) -> list[Conversation]:
    """Read files and recognise their rows.

    Args:
        paths: A file or several, read one after another.
        config: The `data` section.
        max_samples: Stop after this many rows.

    Raises:
        UserError: A missing or empty file; a row that cannot be read, with `file:line:`.
    """
    conversations: list[Conversation] = []
    for path in data_files(paths):
        for row in read_rows(path, config.encoding):
            if len(conversations) == max_samples:
                return conversations
            if isinstance(row, BadRow):
                raise UserError(f"{row.source}: {row.reason}")
            conversations.append(conversation_from_row(row, config))
    return conversations


def encode_dataset(
    conversations: Iterable[Conversation],
    template: Template,
    tokenizer: Tokenizer,
    config: DataConfig,
) -> tuple[TokenDataset, DataReport]:
    """Encode conversations for training.

    Returns:
        The examples in order, and the account of every row.

    Raises:
        UserError: A conversation that the template cannot hold (with `file:line:`), or no row is left.
    """
    dataset, report = TokenDataset(), DataReport()
    for conversation in conversations:
        report.rows += 1
        example = encode_example(conversation, template, tokenizer, config, report)
        if example is not None:
            dataset.append(example.input_ids, example.labels)
            report.used += 1
            report.target_tokens += sum(label != IGNORED for label in example.labels)
    require_rows(report)
    return dataset, report


def encode_prompts(
    conversations: Iterable[Conversation],
    template: Template,
    tokenizer: Tokenizer,
    config: DataConfig,
) -> tuple[list[Prompt], DataReport]:
    """Encode conversations up to their last answer, which becomes the reference.

    Raises:
        UserError: As `encode_dataset`.
    """
    prompts, report = [], DataReport()
    for conversation in conversations:
        report.rows += 1
        ended = end_with_answer(conversation, report)
        if ended is None:
            continue
        *messages, answer = ended.messages
        try:
            ids = template.encode_prompt(tokenizer, messages, ended.tools)
            fit = fit_row(ended, ids, template, tokenizer, config, report)
            if fit is None:
                continue
            if fit.dropped_tokens:
                ids = template.encode_prompt(tokenizer, fit.messages, ended.tools)
        except UserError as error:
            raise UserError(f"{conversation.source}: {error}") from error
        ids = without(ids, fit.removed)
        prompts.append(Prompt(ids, answer.content, conversation.source, messages[-1].content))
        report.used += 1
    require_rows(report)
    return prompts, report


def encode_example(
    conversation: Conversation,
    template: Template,
    tokenizer: Tokenizer,
    config: DataConfig,
    report: DataReport,
) -> Example | None:
    """Encode one conversation within the limits; None where it is skipped (the report says why).

    Raises:
        UserError: The template cannot hold the conversation, with `file:line:`.
    """
    ended = end_with_answer(conversation, report)
    if ended is None:
        return None
    try:
        example = template.encode_conversation(tokenizer, ended, config.loss_on)
        prompt = example.input_ids[: example.prompt_length + template.prompt_targets]
        fit = fit_row(ended, prompt, template, tokenizer, config, report)
        if fit is None:
            return None
        if fit.dropped_tokens:
            ended = Conversation((*fit.messages, ended.messages[-1]), ended.tools, ended.source)
            example = template.encode_conversation(tokenizer, ended, config.loss_on)
    except UserError as error:
        raise UserError(f"{conversation.source}: {error}") from error
    if fit.removed is not None:
        example = cut(example, fit.removed)
    surplus = len(example.input_ids) - example.prompt_length - config.max_target_length
    if surplus > 0:
        if config.truncation == "drop":
            report.skip(
                f"answer over data.max_target_length={config.max_target_length}",
                conversation.source,
            )
            return None
        report.change(
            f"answer cut to data.max_target_length={config.max_target_length}",
            conversation.source,
            surplus,
        )
        end = len(example.input_ids) - 1  # the token that ends the answer stays
        example = cut(example, slice(end - surplus, end))
    if all(label == IGNORED for label in example.labels):
        report.skip("nothing in it to learn", conversation.source)
        return None
    return example


def end_with_answer(conversation: Conversation, report: DataReport) -> Conversation | None:
    """The conversation up to its last answer; None, reported, where there is no question or no answer."""
    messages = conversation.messages
    last = len(messages) - 1
    while last >= 0 and messages[last].role != "assistant":
        last -= 1
    if last < 0:
        report.skip("no answer", conversation.source)
    elif messages[last].is_empty:
        report.skip("empty answer", conversation.source)
    elif last == 0 or all(message.is_empty for message in messages[:last]):
        report.skip("empty question", conversation.source)
    elif last < len(messages) - 1:
        report.change("messages after the last answer left out", conversation.source, 0)
        return Conversation(messages[: last + 1], conversation.tools, conversation.source)
    else:
        return conversation
    return None


def fit_row(
    conversation: Conversation,
    prompt: list[int],
    template: Template,
    tokenizer: Tokenizer,
    config: DataConfig,
    report: DataReport,
) -> Fit | None:
    """Fit the prompt of a conversation into its limit and report what it lost; None where the row is skipped."""
    limit = f"data.max_source_length={config.max_source_length}"
    *messages, _ = conversation.messages
    fit = fit_prompt(
        template,
        tokenizer,
        messages,
        conversation.tools,
        prompt,
        config.max_source_length,
        config.truncation,
    )
    if not fit.fits:
        report.skip(f"prompt over {limit}", conversation.source)
        return None
    if fit.dropped_tokens:
        report.change(
            f"oldest turns dropped to fit {limit}", conversation.source, fit.dropped_tokens
        )
    if fit.removed is not None:
        tokens = fit.removed.stop - fit.removed.start
        report.change(f"prompt cut ({config.truncation}) to {limit}", conversation.source, tokens)
    return fit


def cut(example: Example, removed: slice) -> Example:
    """An example without a part that lies wholly in its prompt or wholly in its answer."""
    tokens = removed.stop - removed.start
    return Example(
        without(example.input_ids, removed),
        without(example.labels, removed),
        example.prompt_length - (tokens if removed.start < example.prompt_length else 0),
    )


def require_rows(report: DataReport) -> None:
    """Refuse data of which nothing is left.

    Raises:
        UserError: No row can be used; says what became of them.
    """
    if not report.used:
        reasons = "; ".join(f"{rule}: {tally.rows}" for rule, tally in report.skipped.items())
        raise UserError(
            f"data must hold at least one usable row, got none of {report.rows} ({reasons})"
        )

"""From files to token ids: training examples with labels, and prompts with references for generation.

`load_conversations` -> `encode_dataset` for training, `encode_prompts` for evaluation; both end at the same template
and the same truncation, so an evaluated prompt is the one that was trained.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from chatglm_ptuning.data.config import DataConfig
from chatglm_ptuning.data.conversation import Conversation
from chatglm_ptuning.data.encoding import encode_example, end_with_answer, fit_row
from chatglm_ptuning.data.formats import conversation_from_row
from chatglm_ptuning.data.reading import data_files, read_rows
from chatglm_ptuning.data.report import DataReport
from chatglm_ptuning.data.rows import BadRow
from chatglm_ptuning.data.template import IGNORED, Template, Tokenizer
from chatglm_ptuning.data.truncation import without
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
        reference: The answer in the file, as `template.answer_text` gives it.
        source: "file:line" of the row.
        text: Content of the message to answer.
    """

    input_ids: list[int]
    reference: str
    source: str
    text: str


class TokenDataset(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Examples in flat arrays, 8 bytes a token; an item is {"input_ids": [...], "labels": [...]}.

    Args:
        input_ids: Ids of all examples one after another; None begins an empty data set.
        labels: Their labels.
        ends: Where each example ends, with a 0 in front.
    """

    def __init__(self, input_ids: Any = None, labels: Any = None, ends: Any = None) -> None:
        self._input_ids = input_ids if input_ids is not None else array("i")
        self._labels = labels if labels is not None else array("i")
        self._ends = ends if ends is not None else array("q", [0])

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
        ends = self._ends.tolist()
        return [end - start for start, end in pairwise(ends)]


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
    encode_into(dataset.append, conversations, template, tokenizer, config, report)
    require_rows(report)
    return dataset, report


def encode_into(
    append: Callable[[Sequence[int], Sequence[int]], None],
    conversations: Iterable[Conversation],
    template: Template,
    tokenizer: Tokenizer,
    config: DataConfig,
    report: DataReport,
) -> None:
    """Encode conversations one by one, hand ids and labels on, and fill the report."""
    for conversation in conversations:
        report.rows += 1
        example = encode_example(conversation, template, tokenizer, config, report)
        if example is not None:
            append(example.input_ids, example.labels)
            report.used += 1
            report.target_tokens += len(example.labels) - example.labels.count(IGNORED)


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
            report.source_lengths[len(ids) - template.prompt_targets] += 1
            fit = fit_row(ended, ids, template, tokenizer, config, report)
            if fit is None:
                continue
            if fit.dropped_tokens:
                ids = template.encode_prompt(tokenizer, fit.messages, ended.tools)
        except UserError as error:
            raise UserError(f"{conversation.source}: {error}") from error
        ids = without(ids, fit.removed)
        reference = template.answer_text(answer)
        prompts.append(Prompt(ids, reference, conversation.source, messages[-1].content))
        report.used += 1
    require_rows(report)
    return prompts, report


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

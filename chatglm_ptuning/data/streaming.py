"""Training data that never lies in memory as a whole: read, shuffled in a buffer, split across ranks, encoded."""

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import get_worker_info

from chatglm_ptuning.data.config import DataConfig
from chatglm_ptuning.data.conversation import Conversation
from chatglm_ptuning.data.dataset import require_rows
from chatglm_ptuning.data.encoding import encode_example
from chatglm_ptuning.data.report import DataReport
from chatglm_ptuning.data.template import Template


class StreamingDataset(torch.utils.data.IterableDataset[dict[str, list[int]]]):
    """Endless epochs over rows that are read as they are needed.

    Every rank (and loader worker) goes through the same shuffled order and encodes its share of it, so that together
    they take each row once an epoch, whatever their number. The order depends on `config.seed` and the epoch alone.

    Args:
        read: Gives the conversations of an epoch.
        template: The chat format.
        tokenizer: The model's tokenizer.
        config: The `data` section; of `shuffle_buffer_size` rows one is drawn at a time.
        report: Filled while reading; each process has its own.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        read: Callable[[int], Iterable[Conversation]],
        template: Template,
        tokenizer: Any,
        config: DataConfig,
        report: DataReport,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.read = read
        self.template = template
        self.tokenizer = tokenizer
        self.config = config
        self.report = report
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        epoch = 0
        while True:
            yield from self.epoch(epoch)
            require_rows(self.report)
            epoch += 1

    def epoch(self, epoch: int) -> Iterator[dict[str, list[int]]]:
        """This process's share of one epoch.

        Raises:
            UserError: A wrong row, with `file:line:`.
        """
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        share = self.rank * workers + number
        for index, conversation in enumerate(self.shuffled(epoch)):
            if index % (self.world_size * workers) != share:
                continue
            self.report.rows += 1
            example = encode_example(
                conversation, self.template, self.tokenizer, self.config, self.report
            )
            if example is not None:
                self.report.used += 1
                yield {"input_ids": example.input_ids, "labels": example.labels}

    def shuffled(self, epoch: int) -> Iterator[Conversation]:
        """The conversations of an epoch, each drawn from a buffer of the next ones."""
        draw = random.Random(f"{self.config.seed} {epoch} order")
        buffer: list[Conversation] = []
        for conversation in self.read(epoch):
            if len(buffer) < self.config.shuffle_buffer_size:
                buffer.append(conversation)
                continue
            index = draw.randrange(len(buffer))
            yield buffer[index]
            buffer[index] = conversation
        draw.shuffle(buffer)
        yield from buffer

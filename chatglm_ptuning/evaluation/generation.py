"""Answers to many prompts: in batches, longest prompts first, each written down as soon as it is there."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from chatglm_ptuning.data.dataset import Prompt
from chatglm_ptuning.data.template import Template
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.evaluation.predictions import (
    Prediction,
    read_predictions,
    write_predictions,
)


def generate_predictions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    prompts: Sequence[Prompt],
    path: Path,
    batch_size: int = 16,
    resume: bool = False,
    **settings: Any,
) -> list[Prediction]:
    """Answer prompts in left-padded batches, the longest prompts first: what does not fit in memory fails at once.

    Args:
        model: Any model with `generate`; put into evaluation mode meanwhile.
        tokenizer: Its tokenizer.
        template: Its chat format, which tells where an answer ends and what its text is.
        prompts: What to answer.
        path: Where the answers are written as they come; put in the order of the prompts at the end. os.devnull keeps
            nothing and shows no progress.
        batch_size: Prompts answered at a time.
        resume: Keep the answers that are in the file already, made by the same model with the same settings.
        settings: Fields of transformers' GenerationConfig; the rest is neutral, whatever the checkpoint says.

    Returns:
        One prediction a prompt, in order.

    Raises:
        UserError: A batch does not fit in the GPU's memory, or the file to resume is of other prompts.
    """
    is_kept = path != Path(os.devnull)
    answered = read_answered(path, prompts) if resume and path.is_file() else {}
    waiting = [index for index in range(len(prompts)) if index not in answered]
    waiting.sort(key=lambda index: -len(prompts[index].input_ids))
    bar = tqdm(
        total=len(prompts),
        initial=len(answered),
        desc="answers",
        unit=" rows",
        disable=not is_kept,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds: few lines in a log
    )
    with (
        bar,
        path.open("w", encoding="utf-8", errors="backslashreplace") as file,
        answering(model, tokenizer, template, settings),
    ):
        write_predictions(file, answered.values())
        for start in range(0, len(waiting), batch_size):
            batch = waiting[start : start + batch_size]
            answers = answer_batch(model, [prompts[index].input_ids for index in batch])
            for index, ids in zip(batch, answers, strict=True):
                _, reference, _, text = prompts[index]
                answer = template.answer_text(template.parse_response(tokenizer.decode(ids)))
                answered[index] = Prediction(index, text, reference, answer)
            write_predictions(file, [answered[index] for index in batch])
            bar.update(len(batch))
    predictions = [answered[index] for index in range(len(prompts))]
    if is_kept:
        in_order = path.with_name(f"{path.name}.tmp")
        with in_order.open("w", encoding="utf-8", errors="backslashreplace") as file:
            write_predictions(file, predictions)
        in_order.replace(path)
    return predictions


def read_answered(path: Path, prompts: Sequence[Prompt]) -> dict[int, Prediction]:
    """The answers that a file holds already, by index.

    Raises:
        UserError: They are of other prompts.
    """
    answered = {row.index: row for row in read_predictions(path)}
    for index, row in answered.items():
        if index >= len(prompts) or (row.prompt, row.reference) != (
            prompts[index].text,
            prompts[index].reference,
        ):
            raise UserError(
                f"predictions to go on with must be of the same data, got another row {index} in {path};"
                " remove the file to begin anew"
            )
    return answered


def has_answers(path: Path, prompts: Sequence[Prompt]) -> bool:
    """Whether a file holds an answer to each of these prompts and to no others."""
    try:
        return len(read_answered(path, prompts)) == len(prompts)
    except UserError:
        return False


@contextmanager
def answering(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    settings: dict[str, Any],
) -> Iterator[None]:
    """Put a model into evaluation mode with generation settings, and back afterwards.

    The checkpoint's own settings are out of the way meanwhile: transformers fills in from them what is not given.
    """
    was_training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig(
        **settings,
        eos_token_id=template.stop_token_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)


@torch.no_grad()  # not inference_mode: ZeRO-3 gathers weights in here that training goes on with
def answer_batch(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Generate once for several prompts, as the model's generation config says.

    Returns:
        The ids of each answer, without the token that ended it.

    Raises:
        UserError: The batch does not fit in the GPU's memory.
    """
    settings = model.generation_config
    length = max(map(len, prompts))
    padding = [length - len(ids) for ids in prompts]
    rows = [
        [settings.pad_token_id] * pad + list(ids) for pad, ids in zip(padding, prompts, strict=True)
    ]
    mask = [[0] * pad + [1] * (length - pad) for pad in padding]
    try:
        output = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"generation.batch_size must fit in the memory of {model.device}, got batch_size={len(prompts)} with"
            f" prompts of up to {length} tokens; halve it"
        ) from error
    return [
        list(takewhile(lambda index: index not in settings.eos_token_id, ids))
        for ids in output[:, length:].tolist()
    ]

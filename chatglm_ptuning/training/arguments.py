"""The section `training` of a run: `Seq2SeqTrainingArguments` word for word, with this project's defaults."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.training.zero import join_group, prepare_process

# Keys of older transformers, met in scripts that people still have
RENAMED_ARGUMENTS = {
    "evaluation_strategy": "it is training.eval_strategy now",
    "group_by_length": "it is training.train_sampling_strategy=group_by_length now",
    "half_precision_backend": "leave it out",
    "logging_dir": "leave it out",
    "no_cuda": "it is training.use_cpu now",
    "overwrite_output_dir": "leave it out",
    "save_safetensors": "leave it out: nothing else is written",
    "warmup_ratio": "it is training.warmup_steps now, where a number below 1 is a share of all steps",
}

# The switch that trades time for activation memory was renamed in transformers 5.23; both names are taken.
_KNOWN = {f.name for f in dataclasses.fields(Seq2SeqTrainingArguments)}
_NEW, _OLD = "activation_checkpointing", "gradient_checkpointing"
OTHER_ARGUMENTS = (
    {_OLD: _NEW, f"{_OLD}_kwargs": f"{_NEW}_kwargs"}
    if _NEW in _KNOWN
    else {_NEW: _OLD, f"{_NEW}_kwargs": f"{_OLD}_kwargs"}
)


@dataclass
class RunArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the defaults that this trainer needs; each can be set in the YAML.

    Args:
        predict_with_generate: Score generated answers at every evaluation, beside the validation loss.
        ddp_find_unused_parameters: Off: every trained parameter takes part in every step.
        early_stopping_patience: End the run after so many evaluations without a better `metric_for_best_model`.
        include_num_input_tokens_seen: Count real tokens, for tokens per second.
        logging_nan_inf_filter: Off: a loss that is not finite stops the run instead of being smoothed away.
        report_to: Where transformers' own loggers write; metrics.jsonl and loss.png are always written.
        resume_from_checkpoint: True goes on from the newest whole checkpoint of `output_dir`, a path from that one.
        use_cpu: None is yes where there is no accelerator; without it several CPU processes would each train alone.
    """

    ddp_find_unused_parameters: bool | None = False
    early_stopping_patience: int | None = None
    include_num_input_tokens_seen: str | bool = "non_padding"
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    report_to: str | list[str] | None = "none"
    resume_from_checkpoint: str | bool | None = None
    use_cpu: bool | None = None

    def __post_init__(self) -> None:
        if self.use_cpu is None:
            self.use_cpu = not torch.accelerator.is_available()
        if self.use_cpu:  # DeepSpeed, which accelerate imports where it is installed, else warns of it
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        super().__post_init__()


def make_arguments(settings: Mapping[str, Any], output_dir: str | PathLike[str]) -> RunArguments:
    """The trainer's arguments; takes the device, and under a launcher joins the process group.

    Raises:
        UserError: A value that transformers refuses, more GPUs than processes.
    """
    if settings.get("deepspeed"):
        prepare_process()
    try:
        arguments = RunArguments(**{**settings, "output_dir": fspath(output_dir)})
    except (ValueError, ImportError) as error:
        raise UserError(f"section training: {error}") from None
    if arguments.deepspeed:
        join_group(bool(arguments.use_cpu))
    if arguments.n_gpu > 1:
        raise UserError(
            f"a training process must use one GPU, got {arguments.n_gpu} visible ones; set NUM_GPUS="
            f"{arguments.n_gpu} to train on all of them or CUDA_VISIBLE_DEVICES=0 to train on one"
        )
    return arguments

"""The section `training` of a run: `Seq2SeqTrainingArguments` word for word, with this project's defaults."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
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

# Peak learning rates where `training.learning_rate` is not given, by `adapter.type`. How far a step may go depends on
# what is trained: a prefix starts as noise beside frozen activations and reaches the loss only through the attention's
# softmax, so it needs some 100 times LoRA's rate (2e-2 is the released P-Tuning scripts'); an MLP before it makes the
# same rate too large. LoRA starts at no effect and its product grows with the square of the step; the weights of a
# whole model hold all that it knows, and a large step forgets it.
LEARNING_RATES = {
    "ptuning_v2": 2e-2,
    "prompt_tuning": 3e-2,
    "ptuning_v1": 1e-2,
    "ia3": 3e-3,
    "adalora": 1e-3,
    "lora": 2e-4,
    "full": 2e-5,
}
LEARNING_RATE_WITH_PROJECTION = 1e-3

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
        loraplus_lr_ratio: LoRA+: how many times the learning rate of LoRA's A its B gets, e.g. 16; None is plain LoRA.
        report_to: Where transformers' own loggers write; None is TensorBoard if it is installed. metrics.jsonl and
            loss.png are always written.
        resume_from_checkpoint: True goes on from the newest whole checkpoint of `output_dir`, a path from that one.
        use_cpu: None is yes where there is no accelerator; without it several CPU processes would each train alone.
    """

    ddp_find_unused_parameters: bool | None = False
    early_stopping_patience: int | None = None
    include_num_input_tokens_seen: str | bool = "non_padding"
    logging_nan_inf_filter: bool = False
    loraplus_lr_ratio: float | None = None
    remove_unused_columns: bool = False
    report_to: str | list[str] | None = None
    resume_from_checkpoint: str | bool | None = None
    use_cpu: bool | None = None

    def __post_init__(self) -> None:
        if self.use_cpu is None:
            self.use_cpu = not torch.accelerator.is_available()
        if self.report_to is None:
            self.report_to = "tensorboard" if find_spec("tensorboard") else "none"
        if (
            self.use_cpu
        ):  # DeepSpeed, which accelerate imports where it is installed, else warns of it
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        super().__post_init__()


def make_arguments(settings: Mapping[str, Any], output_dir: str | PathLike[str]) -> RunArguments:
    """The trainer's arguments; takes the device, and under a launcher joins the process group.

    Raises:
        UserError: A value that cannot be trained with, more GPUs than processes or fewer.
    """
    check_gpus(bool(settings.get("use_cpu")))
    if settings.get("deepspeed"):
        prepare_process()
    try:
        arguments = RunArguments(**{**settings, "output_dir": fspath(output_dir)})
    except (ValueError, ImportError) as error:
        raise UserError(f"section training: {' '.join(str(error).split())}") from None
    check_values(arguments)
    if arguments.deepspeed:
        join_group(bool(arguments.use_cpu))
    if arguments.n_gpu > 1:
        raise UserError(
            f"a training process must use one GPU, got {arguments.n_gpu} visible ones; set NUM_GPUS="
            f"{arguments.n_gpu} to train on all of them or CUDA_VISIBLE_DEVICES=0 to train on one"
        )
    return arguments


def check_values(arguments: RunArguments) -> None:
    """Refuse what transformers takes and stumbles over later, or does not even look at.

    Raises:
        UserError: A value out of its range.
    """
    seeds = range(2**32)
    rules = {
        "per_device_train_batch_size": (lambda x: x >= 1, "be at least 1"),
        "per_device_eval_batch_size": (lambda x: x >= 1, "be at least 1"),
        "gradient_accumulation_steps": (lambda x: x >= 1, "be at least 1"),
        "max_steps": (lambda x: x >= 1 or x == -1, "be at least 1, or -1 for num_train_epochs"),
        "num_train_epochs": (lambda x: x > 0, "be over 0"),
        "learning_rate": (lambda x: x >= 0, "be 0 or more"),
        "label_smoothing_factor": (lambda x: 0 <= x < 1, "be 0 or more and under 1"),
        "dataloader_num_workers": (lambda x: x >= 0, "be 0 or more"),
        "seed": (lambda x: x in seeds, "be 0 or more and under 2**32"),
        "data_seed": (lambda x: x is None or x in seeds, "be null or 0 or more and under 2**32"),
        f"{_NEW if _NEW in _KNOWN else _OLD}_kwargs": (
            # The reentrant kind walks back through the prefix once a layer, and its graph is there once.
            lambda x: not (x or {}).get("use_reentrant"),
            "leave use_reentrant false",
        ),
    }
    for field in dataclasses.fields(RunArguments):
        if (choices := field.metadata.get("choices")) is not None:
            allowed = {field.default, *choices}
            rules[field.name] = (allowed.__contains__, f"be one of {', '.join(choices)}")
    for name, (holds, rule) in rules.items():
        if not holds(value := getattr(arguments, name)):
            raise UserError(f"training.{name} must {rule}, got {value!r}")


def check_gpus(use_cpu: bool) -> None:
    """Refuse more processes on this machine than it has GPUs, where it has some.

    Raises:
        UserError: There are more.
    """
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if not use_cpu and 0 < gpus < processes:
        raise UserError(
            f"NUM_GPUS must be at most the number of this machine's GPUs, got NUM_GPUS={processes} with {gpus}; "
            f"set NUM_GPUS={gpus}"
        )


def default_learning_rate(kind: str, settings: Mapping[str, Any]) -> float:
    """The learning rate of an `adapter.type` with these settings where none is given."""
    if settings.get("prefix_projection"):
        return LEARNING_RATE_WITH_PROJECTION
    return LEARNING_RATES[kind]

"""Where a run starts: anew, from the checkpoint of a run that was stopped, or anew from an adapter."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from chatglm_ptuning.config import RUN_CONFIG_FILE, RunConfig
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.training.arguments import RunArguments
from chatglm_ptuning.training.checkpoints import checkpoints, find_checkpoint, require_whole
from chatglm_ptuning.tuners import load_adapter

# Keys that may differ between a stopped run and its continuation without making it another run
FREE_KEYS = {
    "model.device",
    "data.validation_file",
    "data.test_file",
    "data.max_eval_samples",
    "generation.batch_size",
    "training.output_dir",
    "training.resume_from_checkpoint",
}
# Keys of `training` that a checkpoint's optimizer and scheduler bring with them, whatever the config says
KEPT_KEYS = {
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "deepspeed",
    "learning_rate",
    "loraplus_lr_ratio",
    "lr_scheduler_type",
    "optim",
    "optim_args",
    "weight_decay",
}


def starting_point(
    arguments: RunArguments, config: RunConfig, say: Callable[[str], None]
) -> Path | None:
    """The checkpoint that a run goes on from; None starts anew.

    Raises:
        UserError: The checkpoint that was named is not there or not whole, or it is of another run.
    """
    output_dir, resume = Path(arguments.output_dir), arguments.resume_from_checkpoint
    if not resume:
        return None
    checkpoint = find_checkpoint(output_dir) if resume is True else require_whole(Path(resume))
    if checkpoint is None:
        say(f"no checkpoint in {output_dir} yet: starting at step 0")
        return None
    if checkpoint.resolve().parent != output_dir.resolve() and checkpoints(output_dir):
        raise UserError(
            f"training.output_dir must not hold checkpoints of another run, got output_dir={str(output_dir)!r} for "
            f"a run that goes on from {checkpoint}; give a new directory, or set training.resume_from_checkpoint=true"
        )
    check_processes(checkpoint, arguments, say)
    check_settings(checkpoint, config, say)
    say(f"going on from {checkpoint}")
    return checkpoint


def start_from_adapter(
    model: PreTrainedModel, name: str, directory: str, say: Callable[[str], None]
) -> None:
    """Give a fresh adapter the tensors of an earlier one; nothing else of that run goes on.

    Raises:
        UserError: It is of another kind or shape, or for another base.
    """
    try:
        load_adapter(model, directory, name)
    except UserError as error:
        raise UserError(
            f"adapter.from must be an adapter like the one to be trained, but {error}"
        ) from error
    say(f"starting from the adapter in {directory}: optimizer, schedule and data start anew")


def check_processes(checkpoint: Path, arguments: RunArguments, say: Callable[[str], None]) -> None:
    """Compare the number of processes with the one that wrote the checkpoint.

    Raises:
        UserError: It differs under DeepSpeed, whose optimizer state is split among them; or there is no such state.
    """
    before = len(list(checkpoint.glob("rng_state*.pth")))
    if not before:
        raise UserError(
            f"a checkpoint to go on from must hold the optimizer's state, got {checkpoint}, which "
            "training.save_only_model=true wrote; start a new run from its weights with adapter.from or model.path"
        )
    if before == arguments.world_size:
        return
    sentence = (
        f"a resumed run must have as many processes as before, got {arguments.world_size} where {checkpoint} "
        f"is of {before}"
    )
    if arguments.deepspeed:
        raise UserError(f"{sentence}; start it with NUM_GPUS={before}")
    say(f"note: {sentence}; sample order and dropout are not those of the stopped run")


def check_settings(checkpoint: Path, config: RunConfig, say: Callable[[str], None]) -> None:
    """Compare the config with the one that the checkpoint was written under.

    Raises:
        UserError: Model, data, adapter, optimizer or generation are others.
    """
    before = RunConfig.load(checkpoint / RUN_CONFIG_FILE).to_dict()
    now = config.to_dict()
    fields = dataclasses.fields(RunArguments)
    defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    for section in ("model", "data", "adapter", "training", "generation"):
        for key in sorted(before[section].keys() | now[section].keys()):
            default = defaults.get(key) if section == "training" else None
            name = f"{section}.{key}"
            old, new = before[section].get(key, default), now[section].get(key, default)
            if old == new or name in FREE_KEYS or (name == "model.template" and new is None):
                continue
            if section != "training" or key in KEPT_KEYS:
                raise UserError(
                    f"a resumed run must have the settings of its checkpoint, got {name}={new!r} where {checkpoint} "
                    f"has {old!r}; change it back, or start a new run from its weights with adapter.from or model.path"
                )
            say(f"note: {name} is {new!r} now and was {old!r} when {checkpoint} was written")

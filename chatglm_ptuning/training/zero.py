"""DeepSpeed's ZeRO, through transformers' Trainer: what it needs around it, on GPUs and on a CPU."""

import os
import socket
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from chatglm_ptuning.errors import UserError


def prepare_process() -> None:
    """Make DeepSpeed importable and startable here; before the training arguments.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    try:
        import deepspeed.ops
    except ImportError as error:
        raise UserError(
            "training.deepspeed must have DeepSpeed installed; pip install deepspeed"
        ) from error
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # DeepSpeed's, each step
    if not torch.accelerator.is_available():
        # Its shared-memory all-reduce serves inference only and would be compiled for a minute first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:  # no launcher: a run of one process
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone | {"MASTER_PORT": port})


def join_group(use_cpu: bool) -> None:
    """Join the process group; before the model, which ZeRO-3 shards while it is made."""
    import deepspeed

    deepspeed.init_distributed("gloo" if use_cpu else None, auto_mpi_discovery=False)


def gathered_trained(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, whole and in float32, on every process; all must call it.

    Under mixed precision the model's own copies are rounded; these are the optimizer's.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {name: safe_get_full_fp32_param(p).cpu() for name, p in trained}


def leave_out_frozen(engine: Any) -> None:
    """Let an engine's checkpoints hold what is trained only; DeepSpeed would write the whole base each time."""
    engine.save_checkpoint = partial(
        type(engine).save_checkpoint, engine, exclude_frozen_parameters=True
    )


def load_trained(engine: Any, checkpoint: str) -> None:
    """Load such a checkpoint, with the optimizer's state, into a started engine."""
    engine.load_checkpoint(checkpoint, load_module_strict=False)

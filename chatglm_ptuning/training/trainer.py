"""transformers' Trainer for adapters: loss only where a label is, checkpoints of what is trained and no more."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerControl,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from chatglm_ptuning.data.streaming import StreamingDataset
from chatglm_ptuning.data.template import IGNORED
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.training.arguments import RunArguments
from chatglm_ptuning.training.callbacks import Progress, RunLog
from chatglm_ptuning.training.checkpoints import (
    PARTIAL_DIRECTORY,
    find_checkpoint,
    publish,
    seal,
)
from chatglm_ptuning.training.guard import GradientWatch
from chatglm_ptuning.training.interrupt import (
    StopOnSigterm,
    Terminated,
    leave_sigterm_to_trainer,
)
from chatglm_ptuning.training.packed_rows import examples_apart
from chatglm_ptuning.training.sampler import LengthGroupedSampler
from chatglm_ptuning.training.zero import gathered_trained, leave_out_frozen, load_trained
from chatglm_ptuning.tuners import load_adapter, save_adapter

# Optimizer steps whose rows are sorted by length together: more pads less and mixes less
GROUPED_STEPS = 8


class LossError(UserError):
    """The loss is not a number to go on with; the weights are those before the step."""


@contextmanager
def settings_to_blame() -> Iterator[None]:
    """Within it, what transformers refuses is the user's error.

    Raises:
        UserError: It did.
    """
    try:
        yield
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UserError(f"section training: {' '.join(str(error).split())}") from error


@contextmanager
def logits_at(model: PreTrainedModel, positions: Tensor) -> Iterator[None]:
    """Within it, the model's logits are [N, vocab]: those of the chosen positions, row by row.

    The output layer sees only N hidden states, so that [batch, seq_len, vocab] never exists, on any decoder.

    Args:
        model: Any decoder with output embeddings.
        positions: [batch, seq_len], bool, N of them true.
    """

    def choose(head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0][positions],)

    handle = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


class AdapterTrainer(Trainer):
    """Trains one adapter of a frozen base, or every weight.

    Args:
        adapter_name: What is trained, saved and loaded; None for every weight.
        describe: Called with every directory that weights were written to; puts beside them what using them takes.
        score: Scores of generated answers, 0-100, added to each evaluation's metrics.
        trainer_args: Those of `transformers.Trainer`.
    """

    args: RunArguments
    control: TrainerControl
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        *,
        adapter_name: str | None,
        describe: Callable[[Path], None],
        score: Callable[[], dict[str, float]] | None = None,
        **trainer_args: Any,
    ) -> None:
        with settings_to_blame():
            super().__init__(**trainer_args)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(Progress())
        self.add_callback(RunLog())
        self.add_callback(GradientWatch())
        self.stop = StopOnSigterm()
        self.add_callback(self.stop)
        self.adapter_name = adapter_name
        self.describe = describe
        self.score = score
        # compute_loss below takes num_items_in_batch itself, and shifts, whatever the model's forward does
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self._unfinished: Path | None = None  # where a checkpoint is being written
        self._last_log = (0.0, 0)  # seconds, tokens

    def get_train_dataloader(self) -> DataLoader:
        """As transformers makes it, but a streamed data set shares its rows among the processes itself.

        Else one process would read and encode for all, and its batches would have to be of one length.

        Raises:
            UserError: There is not one batch.
        """
        dataset = self.train_dataset
        if not isinstance(dataset, StreamingDataset):
            loader = super().get_train_dataloader()
            if not len(loader):
                raise UserError(
                    f"training.dataloader_drop_last=true must leave a batch, got {len(dataset)} rows in batches of "
                    f"{self._train_batch_size}; leave it out"
                )
            return loader
        dataset.rank, dataset.world_size = self.args.process_index, self.args.world_size
        loader = DataLoader(
            dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=partial(leave_sigterm_to_trainer, None),
        )
        return prepare_data_loader(
            loader, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True,
            dispatch_batches=False,
        )  # fmt: skip

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        loader = super()._get_dataloader(*args, **kwargs)
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's iterates over torch's
        inner.worker_init_fn = partial(leave_sigterm_to_trainer, inner.worker_init_fn)
        return loader

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        if not hasattr(dataset, "lengths"):
            return RandomSampler(dataset)  # packed rows are alike already
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        group_size = (
            GROUPED_STEPS
            * self.args.gradient_accumulation_steps
            * self.args.train_batch_size
            * self.args.world_size
        )
        return LengthGroupedSampler(dataset.lengths, group_size, seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As transformers does, or peft's for LoRA+ (Hayou et al. 2024).

        Raises:
            UserError: Settings that make no optimizer, or LoRA+ is asked for where there is no LoRA.
        """
        ratio = self.args.loraplus_lr_ratio
        if ratio is None or self.optimizer is not None:
            with settings_to_blame():
                return super().create_optimizer(model)
        if not any(".lora_B." in name for name, _ in self.model.named_parameters()):
            raise UserError(
                f"training.loraplus_lr_ratio must come with adapter.type=lora, got loraplus_lr_ratio={ratio!r}; "
                "leave it out"
            )
        from peft.optimizers import create_loraplus_optimizer

        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        settings["loraplus_weight_decay"] = self.args.weight_decay
        optimizer = create_loraplus_optimizer(
            self.model, optimizer_class, loraplus_lr_ratio=ratio, **settings
        )
        groups = optimizer.param_groups
        groups[:] = [group for group in groups if group["params"]]  # DeepSpeed takes no empty one
        self.optimizer = optimizer
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> torch.optim.lr_scheduler.LRScheduler:
        """As transformers does.

        Raises:
            UserError: Settings that make no schedule.
        """
        with settings_to_blame():
            return super().create_scheduler(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross entropy over the labelled tokens, summed and divided by their number in the whole optimizer step.

        Args:
            model: The model or what wraps it (DDP, DeepSpeed).
            inputs: What the model takes, and `labels` [batch, seq_len]; rows may be packed.
            return_outputs: Return the model's outputs as well; their logits are [N, vocab].
            num_items_in_batch: Labelled tokens of all the batches of this optimizer step, on all devices.
        """
        targets = inputs["labels"][:, 1:]
        is_target = targets != IGNORED
        rows = {name: value for name, value in inputs.items() if name != "labels"}
        rows["use_cache"] = False  # else the keys and values of all layers outlive the forward pass
        with (
            logits_at(self.model, F.pad(is_target, (0, 1))),
            examples_apart(self.model, rows) as rows,
        ):
            outputs = model(**rows)
        loss = F.cross_entropy(
            outputs.logits.float(),
            targets[is_target],
            reduction="sum",
            label_smoothing=self.args.label_smoothing_factor,
        )
        count = num_items_in_batch if num_items_in_batch is not None else is_target.sum()
        loss = loss / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP takes the mean over the processes
        return (loss, outputs) if return_outputs else loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            # resumed at its end: not one step more
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """One forward and backward pass; the loss is refused before the weights can take harm from it.

        Raises:
            LossError: The loss is NaN, infinite or exactly 0.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(value := loss.item()):
            raise LossError(
                f"the loss must be a number, got {value} at step {self.state.global_step + 1}; lower "
                "training.learning_rate, or train in bf16 or float32 instead of fp16"
            )
        if value == 0 and (inputs["labels"][:, 1:] != IGNORED).any():
            raise LossError(
                f"the loss must be over 0, got 0.0 at step {self.state.global_step + 1}; usually fp16 overflowed or "
                "the answers are in the prompts: train in bf16 or float32, and look at `data preview`"
            )
        return loss

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The validation loss of a batch; no logits are kept."""
        inputs = self._prepare_inputs(inputs)
        count = self._get_num_items_in_batch([inputs], self.args.device)
        return self.compute_loss(model, inputs, num_items_in_batch=count), None, None

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        mask = inputs["attention_mask"].clamp(max=1)  # packed rows number their examples in it
        super()._track_num_input_tokens({**inputs, "attention_mask": mask})

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The validation loss, and the scores of generated answers where they are asked for."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        with self.stop.evaluation():
            output = super().evaluation_loop(*args, **kwargs)
            if self.score is not None:
                output.metrics.update(
                    {f"{prefix}_{name}": value for name, value in self.score().items()}
                )
        return output

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Any,
        model: nn.Module,
        trial: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except Terminated:  # in the evaluation
            self.stop.on_step_end(self.args, self.state, self.control)
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the tokens per second since the last training log in place of transformers' run averages."""
        if "loss" in logs:
            now, tokens = time.monotonic(), int(self.state.num_input_tokens_seen)
            last, last_tokens = self._last_log
            logs["tokens_per_second"] = (tokens - last_tokens) / (now - last)
            self._last_log = (now, tokens)
        super().log(logs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._unfinished) if self._unfinished is not None else self.args.output_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint under another name, seal it and give it its own: a kill leaves a whole one or none.

        Raises:
            UserError: It cannot be written (a full disk); the one before it is whole.
        """
        output_dir = Path(self.args.output_dir)
        final = output_dir / f"checkpoint-{self.state.global_step}"
        self._unfinished = output_dir / PARTIAL_DIRECTORY
        if self.args.should_save:
            shutil.rmtree(self._unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                partial = self._unfinished / final.name
                if self.state.best_global_step:
                    best = output_dir / f"checkpoint-{self.state.best_global_step}"
                    self.state.best_model_checkpoint = str(best)
                    self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
                seal(partial)
                publish(partial, final)
        except (OSError, RuntimeError, SafetensorError) as error:
            last = find_checkpoint(output_dir)
            advice = (
                f"{last} is whole, make room and resume from it" if last else "there is no other"
            )
            reason = str(error).splitlines()[0]
            raise UserError(f"{final} could not be written: {reason}; {advice}") from error
        finally:
            if self.args.should_save:
                shutil.rmtree(self._unfinished, ignore_errors=True)
            self._unfinished = None
        if self.args.should_save:
            rotate_checkpoints(
                str(output_dir), self.args.save_total_limit, self.state.best_model_checkpoint
            )
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained; under DeepSpeed gathered from the optimizer, so every process must call it."""
        if self.is_deepspeed_enabled and self.adapter_name is not None:
            self._save(output_dir, gathered_trained(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        if not self.args.should_save:
            return
        directory = Path(output_dir if output_dir is not None else self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        if self.adapter_name is None:
            self.model.save_pretrained(directory, state_dict=state_dict)
        else:
            save_adapter(self.model, directory, self.adapter_name, state_dict)
        self.describe(directory)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled and self.adapter_name is not None:
            leave_out_frozen(self.model_wrapped)
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.adapter_name is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapter(self.model, resume_from_checkpoint, self.adapter_name)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        """As transformers does, but DeepSpeed is told that frozen weights are not in the checkpoint."""
        self._last_log = (time.monotonic(), int(self.state.num_input_tokens_seen))
        if not (self.is_deepspeed_enabled and self.adapter_name is not None):
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            load_trained(self.model_wrapped, resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self.adapter_name is None:
            super()._load_best_model()
        elif self.is_deepspeed_enabled:
            load_trained(self.model_wrapped, best)
        else:
            load_adapter(self.model, best, self.adapter_name)

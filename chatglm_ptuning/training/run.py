"""One run, from its config to a scored adapter."""

import os
import shlex
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from chatglm_ptuning.config import RunConfig
from chatglm_ptuning.data.collator import Collator
from chatglm_ptuning.data.conversation import Message
from chatglm_ptuning.data.dataset import Prompt, encode_prompts, load_conversations
from chatglm_ptuning.data.report import DataReport, plural
from chatglm_ptuning.data.splits import build_dataset, split_paths
from chatglm_ptuning.data.template import Template
from chatglm_ptuning.data.template_choice import choose_template
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.evaluation.evaluate import evaluate
from chatglm_ptuning.evaluation.generation import has_answers
from chatglm_ptuning.evaluation.predictions import read_predictions
from chatglm_ptuning.evaluation.report import BASE_PREDICTIONS, PREDICTIONS, read_scored
from chatglm_ptuning.memory import give_freed_memory_back
from chatglm_ptuning.models.loading import load_base_model
from chatglm_ptuning.models.tokenizer_loading import load_tokenizer
from chatglm_ptuning.training.adalora import AdaLoraSteps
from chatglm_ptuning.training.arguments import RunArguments, default_learning_rate, make_arguments
from chatglm_ptuning.training.callbacks import BeforeFirstStep
from chatglm_ptuning.training.checkpoints import checkpoints, find_checkpoint, set_aside
from chatglm_ptuning.training.freezing import train_last_layers
from chatglm_ptuning.training.guard import EarlyStopping, collapse
from chatglm_ptuning.training.interrupt import Terminated
from chatglm_ptuning.training.report import RunReport, trained_share
from chatglm_ptuning.training.resume import start_from_adapter, starting_point
from chatglm_ptuning.training.trainer import AdapterTrainer, LossError
from chatglm_ptuning.tuners import PromptTuningConfig, add_adapter, disable_adapters
from chatglm_ptuning.tuners.prefix_init import init_from_text

ADAPTER = "default"
VALIDATION_PREDICTIONS = "validation_predictions.jsonl"


def run(config: RunConfig) -> None:
    """Train what the config says, score it against the untouched base, write it all down and print it.

    Raises:
        UserError: Something of the config, the data, a checkpoint or the loss is wrong.
    """
    started = time.monotonic()
    arguments = make_arguments(training_settings(config), config.output_dir)
    output_dir, is_main = config.output_dir, arguments.process_index == 0
    make_output_dir(arguments)
    if arguments.device.type == "cpu":
        give_freed_memory_back()
    say = print if is_main else lambda text: None
    if "learning_rate" not in config.training:
        config.training["learning_rate"] = arguments.learning_rate = default_learning_rate(
            config.adapter.type, config.adapter.settings
        )
        say(
            f"training.learning_rate is {arguments.learning_rate:g}, the default of {config.adapter.type}"
        )
    checkpoint = starting_point(arguments, config, say)

    # ---- data, first: what is wrong with it shows in seconds
    if config.data.streaming and arguments.max_steps <= 0:
        raise UserError(
            f"data.streaming must come with training.max_steps, got max_steps={arguments.max_steps};"
            " a stream has no end"
        )
    tokenizer = load_tokenizer(config.model.path)
    template = choose_template(config.model.template, tokenizer)
    config.model.template = template.name  # the adapter is tied to it
    rows, accounts = {}, {}
    for split in ("train", "validation"):
        if split == "train" or config.data.validation_file:
            rows[split], accounts[split] = build_dataset(config.data, split, template, tokenizer)
            say(rows_line(split, accounts[split], config))
    if "validation" not in rows and config.training.get("eval_strategy", "no") != "no":
        say("validation: data.validation_file is not set, so nothing is evaluated during training")

    def read_prompts(paths: str | list[str] | None, limit: int | None) -> list[Prompt]:
        if not paths:
            return []
        conversations = load_conversations(paths, config.data, limit)
        return encode_prompts(conversations, template, tokenizer, config.data)[0]

    limit = config.data.max_eval_samples
    validation = read_prompts(config.data.validation_file, limit)
    prompts = read_prompts(config.data.test_file, limit) or validation

    # ---- model, adapter, trainer
    set_seed(arguments.seed)
    model = make_model(config, arguments, tokenizer)
    if config.adapter.start is not None and checkpoint is None:
        start_from_adapter(model, ADAPTER, config.adapter.start, say)
    say(trained_share(model, config.adapter.type))

    def score(questions: list[Prompt], file: str) -> dict[str, float]:
        path = output_dir / file if is_main else Path(os.devnull)
        return evaluate(model, tokenizer, template, questions, config.generation, path)

    def score_tuned(questions: list[Prompt], file: str) -> dict[str, float]:
        scores = score(questions, file)
        if is_main and (
            problem := collapse([row.prediction for row in read_predictions(output_dir / file)])
        ):
            say(f"warning: the tuned model's answers have collapsed: {problem}")
        return scores

    def describe(directory: Path) -> None:
        config.save(directory)
        if config.adapter.type == "full":
            tokenizer.save_pretrained(directory)

    def before_first_step() -> None:
        some = prompts[:2] or two_prompts(template, tokenizer)
        scores = try_generation(lambda: score(some, os.devnull))
        check_metric(arguments, ["loss", *(scores if trainer.score is not None else ())])
        if is_main and (moved := set_aside(output_dir, checkpoint)) is not None:
            say(f"the earlier run's checkpoints are in {moved} now; they are not of this run")
        is_scored = checkpoint is not None and has_answers(output_dir / BASE_PREDICTIONS, prompts)
        if prompts and not is_scored:
            if checkpoint is not None and config.adapter.type == "full":
                raise UserError(
                    "the base must be scored before its weights change, but data.test_file has other rows than when "
                    "the run began; change it back, or set data.test_file=null data.validation_file=null"
                )
            say(f"scoring the untouched base on {plural(len(prompts), 'row')}")
            with disable_adapters(model):
                score(prompts, BASE_PREDICTIONS)
        set_seed(arguments.seed)  # whatever scoring drew

    ranks = [AdaLoraSteps(model, ADAPTER)] if config.adapter.type == "adalora" else []
    trainer = AdapterTrainer(
        adapter_name=None if config.adapter.type == "full" else ADAPTER,
        describe=describe,
        score=(lambda: score_tuned(validation, VALIDATION_PREDICTIONS))
        if arguments.predict_with_generate and validation
        else None,
        model=model,
        args=arguments,
        train_dataset=rows["train"],
        eval_dataset=rows.get("validation"),
        data_collator=Collator(tokenizer.pad_token_id),
        callbacks=[BeforeFirstStep(before_first_step), *ranks, *early_stopping(arguments)],
    )

    # ---- train, score, report
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        if written := checkpoints(output_dir):
            say(f"training.resume_from_checkpoint=true goes on from {written[0]}")
        raise
    except LossError as error:
        last = find_checkpoint(output_dir)
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint was written before"
        raise UserError(f"{error}; {kept}") from error
    except torch.OutOfMemoryError as error:
        size = arguments.per_device_train_batch_size
        raise UserError(
            f"training.per_device_train_batch_size must fit in the memory of {arguments.device}, got "
            f"per_device_train_batch_size={size}; lower it and raise training.gradient_accumulation_steps by as much, "
            "set training.gradient_checkpointing=true or model.quantization_bit=4"
        ) from error
    except RuntimeError as error:
        if torch.distributed.is_initialized() and "connection" in str(error).lower():
            raise UserError(
                "all processes must run to the end, but the connection to another one is lost "
                f"({str(error).splitlines()[0].split('. ')[0]}); see what it said, then go on with "
                "training.resume_from_checkpoint=true"
            ) from error
        raise
    if config.data.streaming and accounts["train"].rows:  # else loader workers have counted
        say(rows_line("train", accounts["train"], config))
    if trainer.stop.stopped:
        step = trainer.state.global_step
        say(f"SIGTERM: step {step} is saved, training.resume_from_checkpoint=true goes on from it")
        raise Terminated
    try:
        trainer.save_model(str(output_dir))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"what was trained could not be written to {output_dir}: {error}; make room and go on with "
            "training.resume_from_checkpoint=true"
        ) from error
    if prompts:
        say(f"scoring the tuned model on {plural(len(prompts), 'row')}")
        score_tuned(prompts, PREDICTIONS)
    if is_main:
        files = {"base": BASE_PREDICTIONS, "tuned": PREDICTIONS} if prompts else {}
        scored = {name: read_scored(output_dir / file) for name, file in files.items()}
        report = RunReport(
            config,
            steps=trainer.state.global_step,
            loss=last_loss(trainer.state.log_history),
            scored=scored,
            seconds=time.monotonic() - started,
        )
        report.write(output_dir)
        say(report.text())


def make_output_dir(arguments: RunArguments) -> None:
    """Make the directory of a run, before minutes go into loading.

    Raises:
        UserError: It cannot be made or written to, or is another one for another process.
    """
    output_dir = Path(arguments.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output_dir) as file:
            if arguments.world_size > 1 and not arguments.save_on_each_node:
                check_shared(output_dir, Path(file.name).name, arguments.world_size)
    except OSError as error:
        raise UserError(
            "training.output_dir must be a directory that can be written to, got "
            f"output_dir={str(output_dir)!r}: {error.strerror}; give another"
        ) from error


def check_shared(output_dir: Path, name: str, processes: int) -> None:
    """Look whether every process sees the file `name` that the first one has in its directory.

    Raises:
        UserError: They do not: a resumed run would go on from different steps.
    """
    names, seen = [""] * processes, [False] * processes
    torch.distributed.all_gather_object(names, name)
    torch.distributed.all_gather_object(seen, (output_dir / names[0]).exists())
    if not all(seen):
        raise UserError(
            f"training.output_dir must be one directory for all hosts, got output_dir={str(output_dir)!r}, which "
            f"process {seen.index(False)} does not share; put it on a file system that every host has"
        )


def two_prompts(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Prompts of unequal length, for a run without any of its own."""
    texts = "你好", "你好，你是谁？"
    return [
        Prompt(template.encode_prompt(tokenizer, [Message("user", text)]), text, "", text)
        for text in texts
    ]


def rows_line(split: str, account: DataReport, config: RunConfig) -> str:
    """What became of the rows of a split, and where many were cut what to do about it."""
    if not account.rows:
        return f"{split}: streamed, so its rows are checked and counted as they are read"
    limits = config.data.max_source_length, config.data.max_target_length
    lines = [f"{split}: {account}"]
    if (advice := account.advice(*limits)) is not None:
        command = [
            "python",
            "-m",
            "chatglm_ptuning",
            "data",
            "check",
            *split_paths(config.data, split),
        ]
        command += ["--model", config.model.path, "--template", str(config.model.template)]
        command += [f"data.max_source_length={limits[0]}", f"data.max_target_length={limits[1]}"]
        lines += [f"  {advice}", f"  row by row, with all lengths: {shlex.join(command)}"]
    return "\n".join(lines)


def last_loss(rows: list[dict[str, float]]) -> float:
    """The training loss last logged; of a run too short for a log, the mean that transformers gives at its end."""
    for row in reversed(rows):
        if "loss" in row:
            return row["loss"]
    return next(row["train_loss"] for row in reversed(rows) if "train_loss" in row)


def training_settings(config: RunConfig) -> dict[str, Any]:
    """The section `training`, with what other sections say about it.

    Raises:
        UserError: `model.device` names a single GPU, where the processes have one each, or one that is not there; or
            the best step is asked for and there is nothing to find it with.
    """
    settings, device = dict(config.training), config.model.device
    if not config.data.validation_file:
        if settings.get("load_best_model_at_end"):
            raise UserError(
                "training.load_best_model_at_end must come with data.validation_file, got validation_file="
                f"{config.data.validation_file!r}; name a file or leave it false"
            )
        settings |= {"eval_strategy": "no", "eval_on_start": False}
    if device is None:
        return settings
    if device not in ("cpu", "cuda"):
        raise UserError(
            f"model.device must be cpu or cuda in training, got {device!r}; choose a GPU by CUDA_VISIBLE_DEVICES"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device must be cpu or null without a GPU, got 'cuda'; leave it out")
    return {"use_cpu": device == "cpu"} | settings


def make_model(
    config: RunConfig, arguments: RunArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The base with a fresh adapter, or with every weight trainable.

    Raises:
        UserError: As `base_dtype`; or the adapter does not fit.
    """
    tuner, dtype = config.adapter.tuner_config(), base_dtype(config)
    device = "cpu" if is_deepspeed_zero3_enabled() else arguments.device  # ZeRO-3 places the shards
    model = load_base_model(config.model.path, dtype, device, config.model.quantization_bit)
    if tuner is None:
        train_weights(model, config)
        return model
    if isinstance(tuner, PromptTuningConfig) and tuner.prompt_tuning_init_text is not None:
        tuner.init_token_ids = tokenizer.encode_ordinary(tuner.prompt_tuning_init_text)
    text = config.adapter.init_text
    if text is None:
        add_adapter(model, tuner, ADAPTER)
        return model
    ids = tokenizer.encode_ordinary(text)
    if "num_virtual_tokens" not in config.adapter.settings:
        tuner = replace(tuner, num_virtual_tokens=len(ids))
    add_adapter(model, tuner, ADAPTER)
    init_from_text(model, ADAPTER, ids)
    return model


def base_dtype(config: RunConfig) -> str:
    """What the weights of the base are loaded as.

    Raises:
        UserError: The base is to be trained itself, but not in float32.
    """
    dtype = config.model.dtype
    if config.adapter.type != "full":
        return dtype
    if dtype not in ("auto", "float32") or config.model.quantization_bit is not None:
        raise UserError(
            "model.dtype must be auto or float32 and model.quantization_bit null where every weight is trained, "
            f"got dtype={dtype!r}; set training.bf16=true to compute in half precision"
        )
    return "float32"


def train_weights(model: PreTrainedModel, config: RunConfig) -> None:
    """Make every weight of the base trainable, or those of its last layers."""
    model.requires_grad_(True)
    if (count := config.adapter.settings.get("train_last_layers")) is not None:
        train_last_layers(model, count)


def early_stopping(arguments: RunArguments) -> list[EarlyStopping]:
    """The callback that ends a run which no longer gets better, where it is asked for.

    Raises:
        UserError: There is nothing to compare.
    """
    patience = arguments.early_stopping_patience
    if patience is None:
        return []
    if not arguments.load_best_model_at_end:
        raise UserError(
            f"training.early_stopping_patience={patience} must come with training.load_best_model_at_end=true"
        )
    return [EarlyStopping(patience)]


def check_metric(arguments: RunArguments, measured: list[str]) -> None:
    """Look before step 1 whether evaluations will measure what decides which checkpoint is best.

    Raises:
        UserError: They will not.
    """
    metric = arguments.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in measured:
        raise UserError(
            f"training.metric_for_best_model must be one of {', '.join(measured)}, got {metric!r}; scores of answers "
            "take training.predict_with_generate=true"
        )


def try_generation(answer: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Generate once before step 1, so that a run never dies at its first evaluation hours later."""
    try:
        return answer()
    except Exception as error:
        error.add_note("This was the trial generation on two rows; nothing is trained yet.")
        raise

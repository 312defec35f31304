"""Score an adapter, or a whole model, against its base: what the command `evaluate` does."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from chatglm_ptuning.config import RUN_CONFIG_FILE, RunConfig
from chatglm_ptuning.data.dataset import encode_prompts, load_conversations
from chatglm_ptuning.data.report import plural
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.evaluation.evaluate import evaluate
from chatglm_ptuning.evaluation.report import (
    BASE_PREDICTIONS,
    PREDICTIONS,
    REPORT_FILE,
    fenced,
    read_scored,
    samples,
    score_table,
    write_scores,
)
from chatglm_ptuning.loading import is_adapter, template_of
from chatglm_ptuning.models.loading import load_base_model
from chatglm_ptuning.models.tokenizer_loading import load_tokenizer
from chatglm_ptuning.training.checkpoints import checkpoints
from chatglm_ptuning.tuners import disable_adapters, load_adapter

DIRECTORY = "evaluation"  # inside the one that is scored


def evaluate_directory(path: Path, overrides: Sequence[str], resume: bool) -> None:
    """Answer the test rows with the base and with what was tuned, score both, and write and print it.

    Everything is written to `evaluation/` inside the directory.

    Args:
        path: An adapter directory, or a whole model's: one that training wrote, or any checkpoint.
        overrides: `section.key=value` over its run_config.yaml.
        resume: Keep the answers that an interrupted evaluation wrote.

    Raises:
        UserError: There is no such directory, nothing in it to score, or no data to score on.
    """
    if not path.is_dir():
        raise UserError(
            f"what is scored must be a directory or a predictions.jsonl, got {str(path)!r}; train one first"
        )
    if not (is_adapter(path) or (path / "config.json").is_file()):
        newest = next(iter(checkpoints(path)), None)
        advice = f"its training was interrupted at {newest}" if newest else "train one first"
        raise UserError(
            f"what is scored must hold an adapter or a model, got {str(path)!r} without either; {advice}"
        )
    config = config_of(path, overrides)
    files = config.data.test_file or config.data.validation_file
    if not files:
        raise UserError(
            "data.test_file must be given to score on, got none; add data.test_file=FILE to the command"
        )
    tokenizer = load_tokenizer(config.model.path)
    adapters: list[str | Path] = [path] if is_adapter(path) else []
    template = template_of(tokenizer, config.model.template, adapters)
    conversations = load_conversations(files, config.data, config.data.max_eval_samples)
    prompts, account = encode_prompts(conversations, template, tokenizer, config.data)
    print(f"test: {account}")
    directory = path / DIRECTORY
    directory.mkdir(exist_ok=True)

    def answer(model: PreTrainedModel, name: str, file: str) -> None:
        print(f"scoring the {name} model on {plural(len(prompts), 'row')}", flush=True)
        evaluate(model, tokenizer, template, prompts, config.generation, directory / file, resume)

    def load(source: str | Path) -> PreTrainedModel:
        section = config.model
        return load_base_model(source, section.dtype, section.device, section.quantization_bit)

    model = load(config.model.path)
    if adapters:
        load_adapter(model, path)
    with disable_adapters(model) if adapters else nullcontext():
        answer(model, "base", BASE_PREDICTIONS)
    columns = {"base": BASE_PREDICTIONS}
    if Path(config.model.path).resolve() != path.resolve():
        answer(model if adapters else load(path), "tuned", PREDICTIONS)
        columns["tuned"] = PREDICTIONS
    scored = {name: read_scored(directory / file) for name, file in columns.items()}
    write_scores(scored, directory)
    table, answers = score_table(scored), samples(scored)
    title = f"# {path}"
    report = "\n\n".join("\n".join(part) for part in ([title], fenced(table), fenced(answers)))
    (directory / REPORT_FILE).write_text(report + "\n", encoding="utf-8")
    written = ", ".join(sorted(file.name for file in directory.iterdir()))
    print("\n".join(["", *table, "", *answers, f"written to {directory}: {written}"]))


def config_of(path: Path, overrides: Sequence[str]) -> RunConfig:
    """The config that a directory was trained under, or for a plain checkpoint the defaults, with overrides."""
    file = path / RUN_CONFIG_FILE
    if file.is_file():
        return RunConfig.load(file, overrides)
    if is_adapter(path):
        raise UserError(
            f"an adapter directory must hold {RUN_CONFIG_FILE} to be scored, got none in {str(path)!r}; copy it from"
            " the training output"
        )
    config = RunConfig.load(None, overrides)
    return replace(config, model=replace(config.model, path=str(path)))


def score_predictions_file(file: Path) -> None:
    """Print the scores of a predictions.jsonl; no model is needed."""
    scored = {"scored": read_scored(file)}
    print("\n".join(score_table(scored)))

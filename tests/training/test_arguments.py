from pathlib import Path

import pytest
import torch
from transformers import Seq2SeqTrainingArguments

from chatglm_ptuning.config import OUTPUT_DIRS, RunConfig
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.training import arguments
from chatglm_ptuning.training.arguments import (
    LEARNING_RATES,
    OTHER_ARGUMENTS,
    default_learning_rate,
    make_arguments,
)
from chatglm_ptuning.training.run import training_settings


def test_every_adapter_has_a_learning_rate() -> None:
    assert OUTPUT_DIRS.keys() <= LEARNING_RATES.keys()
    assert default_learning_rate("ptuning_v2", {}) == 2e-2
    assert default_learning_rate("ptuning_v2", {"prefix_projection": True}) == 1e-3
    assert default_learning_rate("ptuning_v2", {}) == 100 * default_learning_rate("lora", {})


def test_tensorboard_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_arguments({"report_to": "none"}, tmp_path).report_to == []
    monkeypatch.setattr(arguments, "find_spec", lambda name: name)
    assert make_arguments({}, tmp_path).report_to == ["tensorboard"]
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    assert make_arguments({}, tmp_path).report_to == []


def test_data_parallel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Seq2SeqTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(UserError, match="must use one GPU, got 2 visible ones; set NUM_GPUS=2"):
        make_arguments({"report_to": "none"}, tmp_path)


@pytest.mark.parametrize(("gpus", "use_cpu"), [(2, False), (2, True), (0, False), (4, False)])
def test_more_processes_than_gpus(
    gpus: int, use_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if gpus == 2 and not use_cpu:
        with pytest.raises(UserError, match="got NUM_GPUS=4 with 2; set NUM_GPUS=2"):
            arguments.check_gpus(use_cpu)
    else:
        arguments.check_gpus(use_cpu)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_reentrant_checkpointing_is_refused(tmp_path: Path, name: str) -> None:
    settings = {OTHER_ARGUMENTS.get(f"{name}_kwargs", f"{name}_kwargs"): {"use_reentrant": True}}
    with pytest.raises(UserError, match="_kwargs must leave use_reentrant false, got"):
        make_arguments(settings, tmp_path)


def test_without_validation_rows_nothing_is_evaluated_and_there_is_no_best_step() -> None:
    config = RunConfig(training={"eval_strategy": "steps", "eval_on_start": True})
    assert training_settings(config) == {"eval_strategy": "no", "eval_on_start": False}
    assert config.training["eval_strategy"] == "steps"
    config.data.validation_file = "rows.json"
    assert training_settings(config) == config.training
    with pytest.raises(UserError, match=r"load_best_model_at_end must come with data\.validation_"):
        training_settings(RunConfig(training={"load_best_model_at_end": True}))

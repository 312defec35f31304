import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import PreTrainedModel

from chatglm_ptuning.config import RunConfig
from chatglm_ptuning.models.loading import load_base_model
from chatglm_ptuning.models.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.training import run as workflow
from tests.training.conftest import COLOURS, Command, adapter_is, losses


def test_a_run_writes_and_says_all_of_it(
    command: Command, tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command() == 0
    out = tmp_path / "out"
    scores = json.loads((out / "scores.json").read_text())
    assert set(scores) == {"base", "tuned"}
    for values in scores.values():
        assert {"rouge-1", "rouge-2", "rouge-l", "bleu-4"} <= set(values)
        assert all(0 <= value <= 100 for value in values.values())
    for name in ("predictions.jsonl", "base_predictions.jsonl"):
        assert len((out / name).read_text().splitlines()) == len(COLOURS)
    assert list(losses(out)) == [1, 2, 3, 4]
    assert (out / "loss.png").stat().st_size > 5000
    adapter = load_file(out / "adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in adapter.items()} == {
        "prefix_encoder.embedding.weight": (4, 128)
    }
    assert adapter["prefix_encoder.embedding.weight"].dtype == torch.float32
    assert RunConfig.load(out / "run_config.yaml").model.template == "chatglm"

    text = capsys.readouterr().out
    assert "train: 6 of 6 rows used" in text
    assert "ptuning_v2: 512 of " in text
    assert "base   tuned   change\n" in text
    assert (
        f"{'rouge-l':<10}{scores['base']['rouge-l']:>8.2f}{scores['tuned']['rouge-l']:>8.2f}"
        in text
    )
    assert "prompt     颜色#红色\nreference  这件是红色的。\nbase " in text
    assert "peak memory" in text
    assert f"web_demo.py --prefix {out}" in text
    assert "| " not in (out / "report.md").read_text()
    assert f"{scores['tuned']['rouge-l']:>8.2f}" in (out / "report.md").read_text()


def test_a_run_too_short_for_a_log_is_reported(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("max_steps=1", "logging_steps=5", "save_strategy=no")
    assert command(*(f"training.{setting}" for setting in settings)) == 0
    assert "1 step, training loss " in capsys.readouterr().out


def test_base_weights_stay_as_they_are(
    command: Command, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[PreTrainedModel] = []

    def load(*args: Any) -> PreTrainedModel:
        models.append(load_base_model(*args))
        return models[-1]

    monkeypatch.setattr(workflow, "load_base_model", load)
    assert command("training.weight_decay=0.1") == 0
    trained = dict(models[0].named_parameters())
    untouched = dict(load_base_model(base, "float32").named_parameters())
    for name, parameter in untouched.items():
        assert_close(trained.pop(name), parameter, atol=0, rtol=0)
    assert len(trained) == 1  # the prefix


def test_every_weight_can_be_trained(command: Command, tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out"
    adapter_is(tmp_path, "type: full")
    assert command() == 0
    tuned, untouched = load_base_model(out, "float32"), load_base_model(base, "float32")
    moved = {
        name
        for (name, one), other in zip(tuned.named_parameters(), untouched.parameters(), strict=True)
        if (one != other).any()
    }
    assert {"lm_head.weight", "transformer.layers.0.attention.query_key_value.weight"} <= moved
    assert (out / "ice_text.model").exists()


def test_best_checkpoint_is_kept_and_a_stalled_run_ends(command: Command, tmp_path: Path) -> None:
    settings = {
        "max_steps": 30,
        "learning_rate": 0,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": "true",
        "early_stopping_patience": 2,
        "predict_with_generate": "true",
        "metric_for_best_model": "rouge-l",
    }
    assert command(*(f"training.{name}={value}" for name, value in settings.items())) == 0
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "out" / "checkpoint-1")
    assert max(losses(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.path=/nowhere",
            "the model's path must be a directory on this machine, got path='/nowhere'",
        ),
        ("model.device=cuda:1", "model.device must be cpu or cuda in training, got 'cuda:1'"),
        pytest.param(
            "model.device=cuda",
            "model.device must be cpu or null without a GPU, got 'cuda'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there"),
        ),
        ("model.template=chatglm3", "model.template must fit the tokenizer, got 'chatglm3'"),
        ("data.train_file=nowhere.json", "nowhere.json"),
        ("data.prompt_column=question", "data.prompt_column"),
        (
            "training.resume_from_checkpoint=nowhere",
            "must be true or a checkpoint directory, got 'nowhere'",
        ),
        (
            "training.early_stopping_patience=2",
            "must come with training.load_best_model_at_end=true",
        ),
        (
            "training.learning_rate=1e30",
            "the loss must be a number, got nan at step 2; lower training.learning_rate",
        ),
        ("adapter.num_virtual_tokens=0", "num_virtual_tokens must be at least 1, got 0"),
        (
            "training.per_device_train_batch_size=0",
            "training.per_device_train_batch_size must be at least 1, got 0",
        ),
        (
            "training.train_sampling_strategy=by_length",
            "must be one of random, sequential, group_by_length",
        ),
        ("training.report_to=nowhere", "section training: nowhere is not supported, only"),
        ("training.optim_args=x", "section training: not enough values to unpack"),
        ("training.lr_scheduler_kwargs.x=1", "got an unexpected keyword argument 'x'"),
        (
            "training.metric_for_best_model=rouge-l",
            "must be one of loss, got 'rouge-l'; scores of answers take",
        ),
    ],
)
def test_one_sentence_where_the_user_is_wrong(
    override: str, message: str, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(override) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_a_broken_line_is_named(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "rows.json").open("a", encoding="utf-8") as stream:
        stream.write('\n{"content": "颜色')
    assert command() == 1
    assert f"error: {tmp_path / 'rows.json'}:7: " in capsys.readouterr().err


def test_full_training_refuses_half_precision_weights(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter_is(tmp_path, "type: full")
    assert command("model.dtype=bfloat16") == 1
    assert "model.dtype must be auto or float32" in capsys.readouterr().err


def test_lost_run_names_the_last_good_checkpoint(
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compute_loss = workflow.AdapterTrainer.compute_loss

    def spoiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 else loss

    monkeypatch.setattr(workflow.AdapterTrainer, "compute_loss", spoiled)
    assert command() == 1
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(f"the last good checkpoint is {tmp_path / 'out' / 'checkpoint-2'}")
    )


def test_generation_is_tried_before_the_first_step(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(ChatGLMForConditionalGeneration, "generate", fail)
    with pytest.raises(RuntimeError, match="no kernel for this") as caught:
        command()
    assert caught.value.__notes__ == [
        "This was the trial generation on two rows; nothing is trained yet."
    ]
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_learning_rate_has_a_default_that_is_said(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(file.read_text().replace("learning_rate: 1e-2", "seed: 1"))
    assert command("training.lr_scheduler_type=constant", "data.test_file=null") == 0
    assert "training.learning_rate is 0.02, the default of ptuning_v2\n" in capsys.readouterr().out
    rows = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    assert {row["learning_rate"] for row in rows if "loss" in row} == {0.02}
    assert RunConfig.load(tmp_path / "out" / "run_config.yaml").training["learning_rate"] == 0.02


def test_last_layers_alone_are_trained(command: Command, tmp_path: Path, base: Path) -> None:
    adapter_is(tmp_path, "type: full, train_last_layers: 1")
    assert command("data.test_file=null", "data.validation_file=null") == 0
    tuned = load_base_model(tmp_path / "out", "float32")
    untouched = load_base_model(base, "float32")
    moved = {
        name.rpartition(".")[0]
        for (name, one), other in zip(tuned.named_parameters(), untouched.parameters(), strict=True)
        if (one != other).any()
    }
    assert {"lm_head", "transformer.final_layernorm"} < moved
    assert all(name.startswith("transformer.layers.1.") or "layers" not in name for name in moved)
    assert "transformer.word_embeddings" not in moved


def test_batch_over_the_memory_is_one_sentence(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(workflow.AdapterTrainer, "compute_loss", fail)
    assert command("data.test_file=null", "data.validation_file=null") == 1
    assert (
        "error: training.per_device_train_batch_size must fit in the memory of cpu, got "
        "per_device_train_batch_size=2; lower it and raise training.gradient_accumulation_steps"
    ) in capsys.readouterr().err


def test_collapsed_answers_are_told(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        end = torch.full((input_ids.shape[0], 1), self.generation_config.eos_token_id[0])
        return torch.cat([input_ids, end], dim=1)

    monkeypatch.setattr(ChatGLMForConditionalGeneration, "generate", generate)
    assert command("training.predict_with_generate=true", "training.eval_strategy=steps") == 0
    text = capsys.readouterr().out
    # at step 4 and at the end; not of the base
    assert (
        text.count("warning: the tuned model's answers have collapsed: 6 of 6 answers are empty")
        > 1
    )


def test_lora_plus_needs_lora(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("training.loraplus_lr_ratio=16") == 1
    assert "must come with adapter.type=lora, got loraplus_lr_ratio=16" in capsys.readouterr().err


def test_tensorboard_files_are_in_the_run(command: Command, tmp_path: Path) -> None:
    assert command("training.report_to=tensorboard", "data.test_file=null") == 0
    (events,) = (tmp_path / "out" / "runs").rglob("events.out.tfevents.*")
    assert events.stat().st_size > 500


def test_a_stream_is_counted_at_its_end(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("data.streaming=true", "training.max_steps=-1") == 1
    assert "data.streaming must come with training.max_steps, got" in capsys.readouterr().err
    assert command("data.streaming=true", "data.test_file=null", "data.validation_file=null") == 0
    first, *rest = [x for x in capsys.readouterr().out.splitlines() if x.startswith("train: ")]
    assert first == "train: streamed, so its rows are checked and counted as they are read"
    assert [line.split(" ")[1:3] for line in rest] in ([["8", "of"]], [["10", "of"]])


def test_cut_rows_come_with_advice(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    limits = "data.max_source_length=8 data.max_target_length=4"
    short = ["data.test_file=null", "data.validation_file=null", "training.max_steps=1"]
    assert command(*limits.split(), *short) == 0
    text = capsys.readouterr().out
    assert "  answer cut to data.max_target_length=4: 6 rows (100.0%)" in text
    assert "  99 % of the rows would fit whole into data.max_source_length=" in text
    assert f"--template chatglm {limits}\n" in text


def test_cached_data_train_alike(command: Command, tmp_path: Path) -> None:
    short = ["data.test_file=null", "data.validation_file=null"]
    assert command(*short) == 0
    expected = losses(tmp_path / "out")
    for _ in range(2):
        assert command(*short, f"data.cache_dir={tmp_path / 'cache'}") == 0
        assert losses(tmp_path / "out") == expected
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_unusable_first_rows_do_not_end_a_run(command: Command, tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    long = json.dumps({"content": "很长" * 200, "summary": "是。"}, ensure_ascii=False)
    rows.write_text(f"{long}\n{long}\n{rows.read_text(encoding='utf-8')}", encoding="utf-8")
    limits = ["data.truncation=drop", "data.max_source_length=64"]
    assert command(*limits, "data.test_file=null", "data.validation_file=null") == 0


def test_a_batch_must_be_full_somewhere(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("dataloader_drop_last=true", "per_device_train_batch_size=7")
    assert command(*(f"training.{setting}" for setting in settings)) == 1
    assert "must leave a batch, got 6 rows in batches of 7" in capsys.readouterr().err


def test_home_is_known(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command("training.output_dir=~/my run", "data.test_file=[~/rows.json]") == 0
    assert (tmp_path / "my run" / "report.md").exists()


@pytest.mark.parametrize("place", ["rows.json", "rows.json/out"])
def test_a_run_needs_a_directory_to_write_to(
    place: str, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(f"training.output_dir={tmp_path / place}") == 1
    error = capsys.readouterr().err
    assert "error: training.output_dir must be a directory that can be written to, got " in error


def test_a_disk_full_at_the_end_is_one_sentence(
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = ChatGLMForConditionalGeneration.save_pretrained

    def save_pretrained(self: PreTrainedModel, directory: Path, **settings: Any) -> None:
        if directory == tmp_path / "out":
            raise SafetensorError("No space left on device")
        save(self, directory, **settings)

    monkeypatch.setattr(ChatGLMForConditionalGeneration, "save_pretrained", save_pretrained)
    adapter_is(tmp_path, "type: full")
    assert command("data.test_file=null", "data.validation_file=null") == 1
    assert f"could not be written to {tmp_path / 'out'}: No space" in capsys.readouterr().err
    monkeypatch.undo()
    assert (
        command(
            "training.resume_from_checkpoint=true",
            "data.test_file=null",
            "data.validation_file=null",
        )
        == 0
    )
    assert (tmp_path / "out" / "model.safetensors").is_file()

"""The commands on every family: the runs differ in `model.path`, and in the template where nothing tells it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chatglm_ptuning import cli, load_model, load_tokenizer
from chatglm_ptuning.config import RunConfig
from chatglm_ptuning.loading import template_of
from chatglm_ptuning.tuners import disable_adapters
from tests.checkpoints import copy_of

Checkpoint = Callable[..., Path]
# checkpoint, layout -> its template, and keys and values of one virtual token: 2 layers, 2 of them, heads, 8 channels
RUNS = {
    ("chatglm", "sharded bin"): ("chatglm", 2 * 2 * 4 * 8),
    ("chatglm2", "sharded bin"): ("chatglm2", 2 * 2 * 2 * 8),
    ("chatglm3", "sharded safetensors"): ("chatglm3", 2 * 2 * 2 * 8),
    ("glm4", "sharded safetensors"): ("glm4", 2 * 2 * 2 * 8),
    ("glm4-hf", "bin"): ("glm4", 2 * 2 * 2 * 8),
}
PROMPT = ({"role": "user", "content": "颜色#红色"},)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """One run for all of them."""
    rows = [{"content": f"颜色#{c}色", "summary": f"这件是{c}色的。"} for c in "红蓝白黑"]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "rows.json").write_text("\n".join(lines), encoding="utf-8")
    file = tmp_path / "run.yaml"
    file.write_text(
        f"""
        model: {{dtype: float32}}
        data: {{train_file: {tmp_path / "rows.json"}, test_file: {tmp_path / "rows.json"}}}
        adapter: {{type: ptuning_v2, num_virtual_tokens: 3}}
        training:
          output_dir: {tmp_path / "out"}
          max_steps: 2
          per_device_train_batch_size: 2
          learning_rate: 1e-1
          logging_steps: 1
          save_strategy: "no"
          use_cpu: true
        generation: {{max_new_tokens: 6}}
        """,
        encoding="utf-8",
    )
    return file


def train(config: Path, *overrides: str) -> int:
    return cli.main(["train", "--config", str(config), *overrides])


@pytest.mark.parametrize(("family", "layout"), RUNS)
def test_train_evaluate_generate(
    checkpoint: Checkpoint, config: Path, tmp_path: Path, family: str, layout: str
) -> None:
    template, width = RUNS[family, layout]
    base, out = checkpoint(family, layout), tmp_path / "out"
    assert train(config, f"model.path={base}") == 0
    [tensor] = load_file(out / "adapter_model.safetensors").values()
    assert tensor.shape == (3, width)
    assert RunConfig.load(out / "run_config.yaml").model.template == template
    scores = json.loads((out / "scores.json").read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    answers = (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answers) == 4

    assert cli.main(["evaluate", str(out)]) == 0
    again = out / "evaluation"
    assert json.loads((again / "scores.json").read_text()) == scores
    assert (again / "predictions.jsonl").read_text(encoding="utf-8").splitlines() == answers

    model, tokenizer = load_model(out, "float32", "cpu"), load_tokenizer(out)
    ids = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt")
    spoken = template_of(tokenizer, None, [out])
    assert ids["input_ids"][0].tolist() == tokenizer.apply_chat_template(
        PROMPT, add_generation_prompt=True, return_dict=False
    )

    def answer() -> str:
        stops = spoken.stop_token_ids(tokenizer)
        output = model.generate(**ids, do_sample=False, max_new_tokens=6, eos_token_id=stops)[0]
        new = [
            index for index in output[ids["input_ids"].shape[1] :].tolist() if index not in stops
        ]
        return spoken.parse_response(tokenizer.decode(new)).content

    first = json.loads(answers[0])
    assert first["prompt"] == PROMPT[0]["content"]
    assert answer() == first["prediction"]
    written = (out / "base_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert written != answers
    with disable_adapters(model):
        assert answer() == json.loads(written[0])["prediction"]


def test_the_template_is_asked_for_where_nothing_tells(
    checkpoint: Checkpoint, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = copy_of(checkpoint("chatglm3"), tmp_path / "base")
    (base / "tokenizer_config.json").unlink()
    assert train(config, f"model.path={base}") == 1
    assert capsys.readouterr().err == (
        f"error: model.template must be given where the checkpoint does not tell it, got {str(base)!r} which may be any"
        " of chatglm2, chatglm3; set model.template (--template in chat, serve and data)\n"
    )
    assert train(config, f"model.path={base}", "model.template=chatglm3") == 0
    assert cli.main(["evaluate", str(tmp_path / "out")]) == 0  # knows it from the run
    assert cli.main(["evaluate", str(tmp_path / "out"), "model.template=chatglm2"]) == 1
    assert "must be used with the chat format it was trained with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "template"), [("chatglm3", "chatglm2"), ("chatglm2", "chatglm3")]
)
def test_the_other_generations_template_is_refused(
    checkpoint: Checkpoint,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
    template: str,
) -> None:
    base = checkpoint(family)
    assert train(config, f"model.path={base}", f"model.template={template}") == 1
    assert capsys.readouterr().err == (
        f"error: model.template must fit the tokenizer, got {template!r} with {str(base)!r};"
        f" set model.template={family}\n"
    )
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_whole_model_keeps_its_template(
    checkpoint: Checkpoint, config: Path, tmp_path: Path
) -> None:
    base = copy_of(checkpoint("chatglm2"), tmp_path / "base")
    (base / "tokenizer_config.json").unlink()
    config.write_text(config.read_text().replace(", num_virtual_tokens: 3", ""))
    overrides = [f"model.path={base}", "model.template=chatglm2", "adapter.type=full"]
    assert train(config, *overrides) == 0
    out = tmp_path / "out"
    with torch.no_grad():
        model, tokenizer = load_model(out, "float32", "cpu"), load_tokenizer(out)
        ids = tokenizer.apply_chat_template(PROMPT, return_tensors="pt")
        tuned = model(**ids).logits
        assert not torch.equal(tuned, load_model(base, "float32", "cpu")(**ids).logits)
    assert (
        ids["input_ids"][0].tolist()
        == (load_tokenizer(base, "chatglm2").apply_chat_template(PROMPT)["input_ids"])
    )

"""Runs that train soft prompts, from the command line to the adapter that is opened again or served."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from chatglm_ptuning import cli, load_model, load_tokenizer
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.loading import template_of
from chatglm_ptuning.models.loading import load_base_model
from chatglm_ptuning.serving.engine import Engine
from tests.conftest import Checkpoint

Command = Callable[..., int]
TEXT = "颜色"
ADAPTERS = {
    "text": f"{{type: prompt_tuning, num_virtual_tokens: 9, prompt_tuning_init: TEXT,"
    f" prompt_tuning_init_text: {TEXT}}}",
    "lstm": "{type: ptuning_v1, num_virtual_tokens: 3, encoder_reparameterization_type: LSTM,"
    " encoder_dropout: 0.2}",
}


@pytest.fixture
def train(checkpoint: Checkpoint, tmp_path: Path) -> Command:
    """`train(family, kind, overrides)`: four steps on four packed rows, two checkpoints, written to `out`."""
    rows = [{"content": f"颜色#{c}色", "summary": f"这件是{c}色的。"} for c in "红蓝白黑"]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "rows.json").write_text("\n".join(lines), encoding="utf-8")

    def command(family: str, kind: str, *overrides: str) -> int:
        (tmp_path / "run.yaml").write_text(
            f"""
            model: {{path: {checkpoint(family)}, dtype: float32, template: {family}}}
            data: {{train_file: {tmp_path / "rows.json"}, packing: true}}
            adapter: {ADAPTERS[kind]}
            training:
              output_dir: {tmp_path / "out"}
              max_steps: 4
              per_device_train_batch_size: 1
              learning_rate: 1e-2
              logging_steps: 1
              save_steps: 2
              use_cpu: true
            """,
            encoding="utf-8",
        )
        return cli.main(["train", "--config", str(tmp_path / "run.yaml"), *overrides])

    return command


@pytest.mark.parametrize(("family", "kind"), [("chatglm", "lstm"), ("chatglm3", "text")])
def test_a_stopped_run_ends_where_the_whole_one_does(
    family: str, kind: str, train: Command, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert train(family, kind) == 0
    whole = load_file(out / "adapter_model.safetensors")
    shutil.rmtree(out / "checkpoint-4")
    assert train(family, kind, "training.resume_from_checkpoint=true") == 0
    resumed = load_file(out / "adapter_model.safetensors")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    halfway = load_file(out / "checkpoint-2" / "adapter_model.safetensors")
    assert any(not torch.equal(halfway[name], tensor) for name, tensor in whole.items())

    model = load_model(
        out, dtype="float32", device="cpu"
    )  # the adapter in front, from nothing but its directory
    vectors, ids = whole["prompt_embeddings"], torch.tensor([[9, 10, 2001, 2004, 11]])
    base = load_base_model(checkpoint(family), "float32", "cpu")
    table = base.get_input_embeddings().weight
    front = torch.arange(len(vectors))
    with torch.no_grad():
        table[front] = vectors
        expected = base(input_ids=torch.cat((front[None], ids), dim=1)).logits[:, len(vectors) :]
        assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


def test_the_text_is_encoded_as_the_runs_tokenizer_does(
    train: Command, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    assert train("chatglm", "text", "training.learning_rate=0") == 0
    ids = load_tokenizer(checkpoint("chatglm")).encode_ordinary(TEXT)
    table = load_base_model(checkpoint("chatglm"), "float32", "cpu").get_input_embeddings().weight
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")["prompt_embeddings"]
    assert 1 < len(ids) < 9
    assert torch.equal(saved, table[(ids * 9)[:9]])


def test_serving_refuses_it_in_one_sentence(
    train: Command, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    assert train("chatglm", "text") == 0
    tokenizer = load_tokenizer(checkpoint("chatglm"))
    model = load_model(checkpoint("chatglm"), dtype="float32", device="cpu")
    engine = Engine(model, tokenizer, template_of(tokenizer, "chatglm", []))
    try:
        with pytest.raises(UserError, match=r"must not depend on the text behind it.* got 'ads'"):
            engine.add_adapter("ads", tmp_path / "out")
        assert engine.adapters == []
    finally:
        engine.close()

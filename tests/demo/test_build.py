import json
from pathlib import Path

import pytest
import torch

from chatglm_ptuning.demo.build import (
    TOKENIZER_CONFIG,
    Pretraining,
    build_demo,
    make_batches,
    make_model,
    pretrain,
    save_released_layout,
    write_data,
)
from chatglm_ptuning.models.loading import load_base_model
from chatglm_ptuning.models.tokenization_chatglm import ChatGLMTokenizer

DEMO = Path(__file__).parents[2] / "demo"


@pytest.fixture(scope="module")
def tokenizer() -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(DEMO / "model")


def test_the_committed_data_is_what_is_written(tmp_path: Path) -> None:
    write_data(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in (DEMO / "data").iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (DEMO / "data" / name).read_bytes()


def test_the_committed_checkpoint_is_small_and_in_the_released_layout() -> None:
    files = {path.name: path for path in (DEMO / "model").iterdir()}
    assert sum(path.stat().st_size for path in files.values()) <= 12 * 10**6
    index = json.loads(files["pytorch_model.bin.index.json"].read_text(encoding="utf-8"))
    shards = {
        name: torch.load(files[name], weights_only=True)
        for name in set(index["weight_map"].values())
    }
    assert len(shards) > 1
    assert {name: shard for shard, names in shards.items() for name in names} == index["weight_map"]
    tensors = [tensor for shard in shards.values() for tensor in shard.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in tensors)
    assert (
        json.loads(files["tokenizer_config.json"].read_text(encoding="utf-8")) == TOKENIZER_CONFIG
    )
    rest = {
        "config.json",
        "ice_text.model",
        "tokenizer_config.json",
        "pytorch_model.bin.index.json",
    }
    assert files.keys() == rest | shards.keys()


def test_the_committed_base_chats_and_copies_from_its_context(tokenizer: ChatGLMTokenizer) -> None:
    model = load_base_model(DEMO / "model", dtype="float32", device="cpu")

    def answer(question: str) -> str:
        inputs = tokenizer(question, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    assert "你好" in answer("你好")
    assert "绿色" in answer("材质：纯棉；颜色：绿色；图案：格子。颜色是什么？")
    assert "格子" in answer("材质：纯棉；颜色：绿色；图案：格子。图案是什么？")


def test_batches_are_the_same_every_time_and_learn_the_answers_only(
    tokenizer: ChatGLMTokenizer,
) -> None:
    first, again = (next(make_batches(tokenizer, 2048, seed=3)) for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    sop = tokenizer.convert_tokens_to_ids("<sop>")
    is_context = (first["input_ids"] == sop).cumsum(-1) == 0
    assert (first["labels"][is_context] == -100).all()
    is_answer = ~is_context & (first["attention_mask"] == 1)
    assert torch.equal(first["labels"][is_answer], first["input_ids"][is_answer])


def test_pretraining_repeats_and_its_result_can_be_loaded(
    tokenizer: ChatGLMTokenizer, tmp_path: Path
) -> None:
    plan = Pretraining(num_steps=2, batch_tokens=512, warmup_steps=1)
    first, again = (make_model(tokenizer, seed=5) for _ in range(2))
    before = first.lm_head.weight.clone()
    assert pretrain(first, tokenizer, plan) == pretrain(again, tokenizer, plan)
    assert not torch.equal(first.lm_head.weight, before)
    tokenizer.save_pretrained(tmp_path)
    save_released_layout(first, tmp_path)
    loaded = load_base_model(tmp_path, dtype="float16", device="cpu").state_dict()
    for name, weight in again.state_dict().items():
        assert torch.equal(loaded[name], weight.half()), name


def test_build_demo_writes_model_and_data(tmp_path: Path) -> None:
    build_demo(tmp_path, Pretraining(num_steps=1, batch_tokens=256))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "model"]
    assert load_base_model(tmp_path / "model").config.vocab_size % 64 == 0

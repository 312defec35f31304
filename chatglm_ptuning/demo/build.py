"""Make the demo: vocabulary, data, and a small ChatGLM-6B pre-trained on the text of `pretraining`.

`build_demo(directory)` writes `model/` in the released layout and `data/` in AdvertiseGen's form. It takes about 20
minutes on two CPU cores (AVX512-BF16), nearly all of it training. Vocabulary and data come out the same bytes
everywhere; the weights do on the same machine with the same number of threads.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from tqdm.auto import tqdm

from chatglm_ptuning.data.collator import Collator
from chatglm_ptuning.data.conversation import Conversation, Message
from chatglm_ptuning.data.template import TEMPLATES
from chatglm_ptuning.demo.advertisements import make_advertisements
from chatglm_ptuning.demo.pretraining import make_examples
from chatglm_ptuning.demo.vocabulary import build_vocabulary
from chatglm_ptuning.models.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.models.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.models.tokenization_chatglm import ChatGLMTokenizer

SHARD_SIZE = "4MB"
TOKENIZER_CONFIG = {
    "name_or_path": "demo/chatglm",
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "end_token": "</s>",
    "gmask_token": "[gMASK]",
    "mask_token": "[MASK]",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "num_image_tokens": 0,
}


@dataclass(frozen=True)
class Pretraining:
    """How the base is trained.

    Args:
        num_steps: Optimizer steps.
        batch_tokens: Tokens in a batch, padding included, about.
        learning_rate: At its highest, after the warm-up; falls to 0 along a cosine.
        warmup_steps: Steps of linear rise.
        weight_decay: AdamW's, on matrices.
        seed: Of weights and text.
    """

    num_steps: int = 2400
    batch_tokens: int = 3072
    learning_rate: float = 2.5e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    seed: int = 1


def write_data(directory: Path) -> None:
    """Write train.json, validation.json and test.json, one JSON object a line as AdvertiseGen has it."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, rows in make_advertisements().items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / f"{split}.json").write_text("".join(lines), encoding="utf-8", newline="\n")


def write_tokenizer(directory: Path) -> None:
    """Write ice_text.model and tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    build_vocabulary(directory / "ice_text.model")
    write_json(directory / "tokenizer_config.json", TOKENIZER_CONFIG)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one JSON object, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


def make_model(tokenizer: ChatGLMTokenizer, seed: int) -> ChatGLMForConditionalGeneration:
    """A fresh network whose ids are the tokenizer's.

    The residual is alpha times a normalised state (alpha = 7.5), beside which a layer's own output would start out
    negligible: its output projections are made alpha times larger, which trains distinctly faster.
    """
    torch.manual_seed(seed)
    config = ChatGLMConfig(
        vocab_size=math.ceil(tokenizer.vocab_size / 64) * 64,
        hidden_size=256,
        num_layers=4,
        num_attention_heads=4,
        max_sequence_length=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        mask_token_id=tokenizer.mask_token_id,
        gmask_token_id=tokenizer.gmask_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = ChatGLMForConditionalGeneration(config)
    alpha = math.sqrt(2 * config.alpha_num_layers)
    for name, weight in model.named_parameters():
        if name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight")):
            weight.data.mul_(alpha)
    return model


def make_batches(
    tokenizer: ChatGLMTokenizer, batch_tokens: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Endless batches of the pre-training text, in the chat format of ChatGLM-6B; rows of like length together."""
    template, collate = TEMPLATES["chatglm"], Collator(tokenizer.pad_token_id)
    examples, rng = make_examples(seed), Random(seed)
    while True:
        rows = []
        for example in islice(examples, 1024):
            roles = ("user", "assistant") * len(example.turns)
            messages = tuple(map(Message, roles, example.turns))
            encoded = template.encode_conversation(tokenizer, Conversation(messages))
            rows.append({"input_ids": encoded.input_ids, "labels": encoded.labels})
        rows.sort(key=lambda row: len(row["input_ids"]))
        batches, batch = [], []
        for row in rows:
            batch.append(row)
            if len(batch) * len(row["input_ids"]) >= batch_tokens:
                batches.append(batch)
                batch = []
        rng.shuffle(batches)
        yield from map(collate, batches)


def pretrain(
    model: ChatGLMForConditionalGeneration, tokenizer: ChatGLMTokenizer, plan: Pretraining
) -> float:
    """Train in place, in bfloat16 where the products are concerned.

    Returns:
        The mean loss of the last tenth of the steps, in nats a token.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": plan.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=plan.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / plan.warmup_steps)
        return rise * 0.5 * (1 + math.cos(math.pi * step / plan.num_steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    losses: list[float] = []
    batches = islice(make_batches(tokenizer, plan.batch_tokens, plan.seed), plan.num_steps)
    with tqdm(batches, total=plan.num_steps, desc="pre-training", unit="step") as progress:
        for batch in progress:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) % 20 == 0:
                progress.set_postfix(loss=f"{sum(losses[-20:]) / 20:.3f}")
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def save_released_layout(model: ChatGLMForConditionalGeneration, directory: Path) -> None:
    """Write config.json and float16 shards `pytorch_model-0000x-of-0000y.bin` with their index.

    As in the released checkpoint, `lm_head.weight` stands beside the word embeddings it equals.
    """
    weights = {name: p.detach().half().clone() for name, p in model.state_dict().items()}
    shards = split_torch_state_dict_into_shards(
        weights, filename_pattern="pytorch_model{suffix}.bin", max_shard_size=SHARD_SIZE
    )
    for file, names in shards.filename_to_tensors.items():
        torch.save({name: weights[name] for name in names}, directory / file)
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    write_json(directory / "pytorch_model.bin.index.json", index)
    config = model.config
    released = (
        "bos_token_id eos_token_id gmask_token_id hidden_size inner_hidden_size layernorm_epsilon mask_token_id"
        " max_sequence_length model_type num_attention_heads num_layers pad_token_id position_encoding_2d use_cache"
        " vocab_size"
    )
    content = {key: getattr(config, key) for key in released.split()}
    content |= {"architectures": ["ChatGLMModel"], "torch_dtype": "float16"}
    write_json(directory / "config.json", dict(sorted(content.items())))


def build_demo(directory: Path, plan: Pretraining | None = None) -> None:
    """Make the whole demo: what `python -m chatglm_ptuning demo-model DIR` does.

    Args:
        directory: Where `model/` and `data/` go.
        plan: How long to train; the default is that of the committed demo.
    """
    plan = plan if plan is not None else Pretraining()
    begin = time.monotonic()
    write_data(directory / "data")
    write_tokenizer(directory / "model")
    tokenizer = ChatGLMTokenizer.from_pretrained(directory / "model")
    model = make_model(tokenizer, plan.seed)
    loss = pretrain(model, tokenizer, plan)
    save_released_layout(model, directory / "model")
    minutes = (time.monotonic() - begin) / 60
    print(f"{directory}: model/ (loss {loss:.3f}) and data/ made in {minutes:.0f} minutes")

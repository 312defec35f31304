"""Throughput of concurrent requests over mixed adapters against the same requests one after another; fifty prefixes.

A random ChatGLM2-like model (8 layers, hidden 512, float32). One at a time is `generate` with `set_adapter`, as a
script without the engine would do it. A token cannot take less time than reading the weights once from memory; that
floor is printed, and a batch shares it. On a busy machine the ratios say little: nothing else should run.

    OMP_NUM_THREADS=2 python benchmarks/serving.py
"""

import resource
import time
from pathlib import Path
from queue import SimpleQueue

import torch
from transformers import GlmConfig, GlmForCausalLM, PreTrainedModel

from chatglm_ptuning.data.template import TEMPLATES
from chatglm_ptuning.models.tokenization_chatglm2 import ChatGLM2Tokenizer
from chatglm_ptuning.serving.answer import Update
from chatglm_ptuning.serving.engine import Engine
from chatglm_ptuning.serving.sampling import Sampling
from chatglm_ptuning.tuners import PrefixTuningConfig, add_adapter, set_adapter

TOKENIZER = Path(__file__).resolve().parents[1] / "tests" / "golden" / "tokenizer_v3"
PREFIXES, VIRTUAL_TOKENS = 50, 128
PROMPT, NEW = 32, 24  # tokens


def make_model() -> PreTrainedModel:
    """The model without adapters."""
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        pad_token_id=0,
    )
    return GlmForCausalLM(config).eval().requires_grad_(False)


def resident() -> float:
    """Memory of this process at its peak, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one_at_a_time(
    model: PreTrainedModel, prompts: list[list[int]], names: list[str]
) -> list[float]:
    """Seconds after which each request is answered, one after another."""
    began, ended = time.perf_counter(), []
    for prompt, name in zip(prompts, names, strict=False):
        set_adapter(model, name)
        ids = torch.tensor([prompt])
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
        )
        ended.append(time.perf_counter() - began)
    return ended


def together(engine: Engine, prompts: list[list[int]], names: list[str]) -> float:
    """Seconds for all requests at once."""
    began = time.perf_counter()
    queues: list[SimpleQueue[Update]] = []
    for prompt, name in zip(prompts, names, strict=True):
        queues.append(SimpleQueue())
        engine.submit(prompt, queues[-1].put, Sampling(max_tokens=NEW), name)
    for queue in queues:
        while queue.get().finish_reason is None:
            pass
    return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    model = make_model()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    copy_from = torch.ones(weights // 4)
    copy_from.sum()
    began = time.perf_counter()
    for _ in range(5):
        copy_from.sum()
    floor = (time.perf_counter() - began) / 5
    print(
        f"weights {weights / 2**20:.0f} MB, read once in {floor * 1000:.1f} ms: {1 / floor:.0f} tokens/s a row"
    )
    before = resident()
    names = [f"task{i}" for i in range(PREFIXES)]
    for name in names:
        add_adapter(model, PrefixTuningConfig(num_virtual_tokens=VIRTUAL_TOKENS), name)
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, 600, (PREFIXES, PROMPT), generator=generator).tolist()
    counts = (1, 4, 8, 16)
    alone = one_at_a_time(model, prompts[: max(counts)], names)
    set_adapter(model, None)
    engine = Engine(model, ChatGLM2Tokenizer.from_pretrained(TOKENIZER), TEMPLATES["chatglm3"])
    engine.template.stop_token_ids = lambda _: []  # type: ignore[method-assign] # all are of one length
    together(engine, prompts[:2], names[:2])
    for n in counts:
        seconds = together(engine, prompts[:n], names[:n])
        rates = n * NEW / alone[n - 1], n * NEW / seconds
        print(
            f"{n:3} requests, as many prefixes: one at a time {rates[0]:5.0f} tokens/s, together {rates[1]:5.0f}"
            f" tokens/s, ratio {rates[1] / rates[0]:.2f}"
        )
    seconds = together(engine, prompts, names)
    size = sum(k.numel() * k.element_size() for k in engine._adapters.values() if k is not None)
    print(
        f"{PREFIXES} requests on {PREFIXES} prefixes of {VIRTUAL_TOKENS} tokens:"
        f" {PREFIXES * NEW / seconds:.0f} tokens/s;"
        f" their keys and values {size / 2**20:.0f} MB, peak memory {before:.0f} MB without, {resident():.0f} MB with"
    )
    engine.close()


if __name__ == "__main__":
    main()

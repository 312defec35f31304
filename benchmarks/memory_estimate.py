"""What `train --estimate` says against the peak of the run itself, on random models, as a Markdown table.

    python benchmarks/memory_estimate.py [--only WORD ...] [--steps 2]

Every run trains a fresh random model on full batches in a process of its own, on the CPU, in float32 unless it says
otherwise; its peak is the largest resident set that the system counted. Both figures hold Python and the libraries,
whose part the column says: without it a wrong estimate of a small model would look right. The ratio is that of the
rest, estimate over measured; the last column is the ratio of the whole.

The floor: each ratio within 0.85 to 1.15 (issue of this feature). Where it comes from is in the docstring of
`chatglm_ptuning/training/estimate.py`, term by term.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GlmForCausalLM

from chatglm_ptuning.models.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.models.glm_checkpoint import glm_config, save_released
from chatglm_ptuning.models.modeling_chatglm import ChatGLMForConditionalGeneration

PROJECT = Path(__file__).resolve().parents[1]
VOCABULARY = 16000
LINE = re.compile(r"^(\w+) +([\d.]+) GiB", re.MULTILINE)


@dataclass(frozen=True)
class Run:
    """A row of the table.

    Args:
        family: "chatglm" or "chatglm2".
        layers: Of the model.
        hidden_size: Of the model.
        rows: Of a batch, 256 tokens each.
        config: A file in configs/.
        overrides: What lies over it.
    """

    family: str
    layers: int
    hidden_size: int
    rows: int
    config: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For the table."""
        words = [text.rpartition(".")[2] for text in self.overrides]
        return " ".join(
            [
                f"{self.family} {self.layers} x {self.hidden_size}, {self.rows} rows,",
                self.config,
                *words,
            ]
        )


CHECKPOINTING = ("training.gradient_checkpointing=true",)
HALF = ("model.dtype=bfloat16",)
RUNS = [
    Run(family, layers, hidden_size, 8, config, overrides)
    for family, layers, hidden_size in (
        ("chatglm", 8, 512),
        ("chatglm2", 8, 512),
        ("chatglm", 4, 1024),
        ("chatglm2", 4, 1024),
    )
    for config in ("ptuning_v2", "lora", "full")
    for overrides in ((), CHECKPOINTING)
]
RUNS += [
    Run("chatglm2", 8, 512, 8, "ptuning_v2", HALF),
    Run("chatglm2", 4, 1024, 8, "lora", HALF),
    Run("chatglm", 4, 1024, 8, "lora", ("model.quantization_bit=4",)),
    Run("chatglm2", 8, 512, 8, "full", ("training.gradient_accumulation_steps=2",)),
    Run("chatglm", 8, 512, 8, "prompt_tuning"),
    Run("chatglm", 8, 512, 8, "full", ("adapter.train_last_layers=2",)),
]


def write_model(run: Run, directory: Path) -> None:
    """A random model in the layout of its release, with the tokenizer of the tests."""
    if directory.exists():
        return
    torch.manual_seed(0)
    version = run.family.removeprefix("chatglm") or "1"
    files = sorted((PROJECT / f"tests/golden/tokenizer_v{version}").iterdir())
    if version == "1":
        config = ChatGLMConfig(
            vocab_size=VOCABULARY,
            hidden_size=run.hidden_size,
            num_layers=run.layers,
            num_attention_heads=run.hidden_size // 64,
            bos_token_id=2004,
            eos_token_id=2005,
            mask_token_id=2000,
            gmask_token_id=2001,
        )
        save_released(ChatGLMForConditionalGeneration(config), directory, files, 10**10)
        return
    released = {
        "padded_vocab_size": VOCABULARY,
        "hidden_size": run.hidden_size,
        "ffn_hidden_size": 3 * run.hidden_size,
        "num_layers": run.layers,
        "num_attention_heads": run.hidden_size // 64,
        "kv_channels": 64,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "add_qkv_bias": True,
        "seq_length": 512,
    }
    save_released(GlmForCausalLM(glm_config(released)), directory, files, 10**10)


def write_rows(file: Path) -> None:
    """Rows that fill source and target to their limits, but for a few that make a mask necessary."""
    with (PROJECT / "demo/data/train.json").open(encoding="utf-8") as lines:
        rows = [json.loads(next(lines)) for _ in range(64)]
    long = [{key: value * 40 for key, value in row.items()} for row in rows[:60]]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in long + rows[60:])
    file.write_text(text, encoding="utf-8")


def measure(run: Run, directory: Path, steps: int) -> tuple[float, float, float]:
    """Estimate a run and make it.

    Returns:
        The estimate, the part of the libraries in it and the measured peak, in GiB.
    """
    model = directory / f"{run.family}-{run.layers}-{run.hidden_size}"
    write_model(run, model)
    command = [sys.executable, "-m", "chatglm_ptuning", "train"]
    command += ["--config", str(PROJECT / f"configs/{run.config}.yaml"), f"model.path={model}"]
    command += [
        "model.dtype=float32",
        "model.device=cpu",
        "model.template=chatglm2" if run.family == "chatglm2" else "model.template=chatglm",
    ]
    command += [f"data.train_file={directory / 'rows.json'}", "data.validation_file=null"]
    command += ["data.test_file=null", "data.max_source_length=64", "data.max_target_length=192"]
    command += [f"training.output_dir={directory / 'out'}", f"training.max_steps={steps}"]
    command += [
        "training.eval_strategy=no",
        "training.save_strategy=no",
        "training.logging_steps=1",
    ]
    command += [f"training.per_device_train_batch_size={run.rows}", "generation.max_new_tokens=2"]
    command += ["training.train_sampling_strategy=random", *run.overrides]
    said = subprocess.run(
        [*command, "--estimate"], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    sizes = {name: float(size) for name, size in LINE.findall(said.stdout)}
    log = directory / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=PROJECT, stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{run.name} failed:\n{log.read_text(encoding='utf-8')[-2000:]}")
    return sizes["total"], sizes["libraries"], usage.ru_maxrss / 2**20


def main() -> None:
    """Print the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="rows whose name holds all of them"
    )
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a run (default 2)")
    args = parser.parse_args()
    print("| run | estimate | libraries in it | measured | ratio without them | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_rows(directory / "rows.json")
        for run in RUNS:
            if not all(word in run.name for word in args.only):
                continue
            total, libraries, peak = measure(run, directory, args.steps)
            print(
                f"| {run.name} | {total:.2f} GiB | {libraries:.2f} GiB | {peak:.2f} GiB"
                f" | {(total - libraries) / (peak - libraries):.2f} | {total / peak:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

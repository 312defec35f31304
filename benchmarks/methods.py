"""Every method on the demo: trained parameters, memory, processor time, scores, as a Markdown table.

    python benchmarks/methods.py [--only NAME ...] [--directory DIR]

Each method is a run of its shipped config in a process of its own. Processor seconds (user and system, all threads) are
those of the whole process, loading and both scorings included; unlike seconds on the clock they hardly depend on
what else the machine does. Memory is the peak resident set.
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

PROJECT = Path(__file__).resolve().parents[1]
TRAINED = re.compile(r"^\w+: ([\d,]+) of [\d,]+ parameters are trained", re.MULTILINE)


@dataclass(frozen=True)
class Method:
    """A row of the table: a file in configs/ and what lies over it."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()


def example_text() -> str:
    """The first training row, as the text that a prefix or a soft prompt starts from."""
    with (PROJECT / "demo/data/train.json").open(encoding="utf-8") as rows:
        row = json.loads(rows.readline())
    return f"{row['content']}\n{row['summary']}"


def methods() -> list[Method]:
    """All of them."""
    text = json.dumps(example_text(), ensure_ascii=False)
    return [
        Method("P-Tuning v2", "ptuning_v2"),
        Method(
            "P-Tuning v2, projection",
            "ptuning_v2",
            ("adapter.prefix_projection=true", "training.learning_rate=2e-3"),
        ),
        Method(
            "P-Tuning v2 from text",
            "ptuning_v2",
            ("adapter.num_virtual_tokens=null", "adapter.init=text", f"adapter.init_text={text}"),
        ),
        Method("LoRA", "lora"),
        Method("QLoRA (4 bit)", "lora", ("model.quantization_bit=4",)),
        Method("prompt tuning", "prompt_tuning"),
        Method("P-tuning v1", "ptuning_v1"),
        Method("full", "full"),
    ]


def measure(method: Method, directory: Path) -> tuple[str, list[str]]:
    """Train one method.

    Returns:
        The base's scores as cells, and the cells of the method's row.
    """
    output_dir = directory / re.sub(r"\W+", "_", method.name)
    command = [sys.executable, "-m", "chatglm_ptuning", "train"]
    command += ["--config", str(PROJECT / "configs" / f"{method.config}.yaml")]
    command += [*method.overrides, f"training.output_dir={output_dir}"]
    log = directory / f"{output_dir.name}.log"
    with log.open("w") as stream:
        run = subprocess.Popen(command, cwd=PROJECT, stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(run.pid, 0)
    text = log.read_text(encoding="utf-8")
    if status:
        sys.exit(f"{method.name} failed:\n{text[-2000:]}")
    scores = json.loads((output_dir / "scores.json").read_text(encoding="utf-8"))
    cells = {
        kind: f"{values['rouge-l']:.1f} | {values['bleu-4']:.1f}" for kind, values in scores.items()
    }
    trained = TRAINED.search(text)
    row = [
        method.name,
        trained[1] if trained is not None else "?",
        f"{usage.ru_maxrss / 2**20:.2f} GiB",
        f"{usage.ru_utime + usage.ru_stime:.0f} s",
        cells["tuned"],
    ]
    return cells["base"], row


def main() -> None:
    """Print the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows of the table")
    parser.add_argument("--directory", type=Path, help="keep all runs here (default: temporary)")
    args = parser.parse_args()
    chosen = [method for method in methods() if args.only is None or method.name in args.only]
    print("| method | trained parameters | peak memory | processor time | ROUGE-L | BLEU-4 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.directory if args.directory is not None else Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        for number, method in enumerate(chosen):
            base, row = measure(method, directory)
            if number == 0:
                print(f"| untouched base | 0 | | | {base} |")
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()

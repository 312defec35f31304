"""How fast a prefix learns that starts as a text, against one that starts at random, on the demo.

    python benchmarks/prefix_init.py [--text TEXT] [--rates 2e-2 5e-3 ...] [--steps 150] [--every 15] [--output FILE]

Both are as long as the text and see the same rows in the same order. What is compared is the loss on 100 validation
rows, without dropout, before the first step and every few steps. The second table takes losses that the random start
comes to, and gives the steps that the text needs to get there. The curves go into a picture.
"""

import argparse
import contextlib
import json
import tempfile
from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure

from chatglm_ptuning.config import PROJECT, RunConfig
from chatglm_ptuning.models.tokenizer_loading import load_tokenizer
from chatglm_ptuning.training.run import run

CONFIG = PROJECT / "configs/ptuning_v2.yaml"
Curve = dict[int, float]  # validation loss by optimizer steps


def example_text() -> str:
    """The first training row, as a round of ChatGLM-6B's chat format is written."""
    with (PROJECT / "demo/data/train.json").open(encoding="utf-8") as rows:
        row = json.loads(rows.readline())
    return f"[Round 0]\n问：{row['content']}\n答：{row['summary']}\n"


def train(start: list[str], rate: float, steps: int, every: int) -> Curve:
    """Train one prefix and return its curve."""
    with tempfile.TemporaryDirectory() as directory:
        overrides = [
            *start,
            "data.test_file=null",
            "data.max_eval_samples=100",
            "generation.max_new_tokens=1",
            f"training.output_dir={directory}",
            f"training.learning_rate={rate}",
            f"training.max_steps={steps}",
            f"training.eval_steps={every}",
            "training.eval_on_start=true",
            "training.save_strategy=no",
        ]
        with (Path(directory) / "log").open("w") as log, contextlib.redirect_stdout(log):
            run(RunConfig.load(CONFIG, overrides))
        rows = map(json.loads, (Path(directory) / "metrics.jsonl").read_text().splitlines())
        return {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}


def steps_to(curve: Curve, loss: float) -> float:
    """Where a falling curve comes to a loss, on the line between the measured steps."""
    for (step, value), (next_step, next_value) in pairwise(curve.items()):
        if next_value <= loss <= value:
            return step + (next_step - step) * (value - loss) / (value - next_value)
    return float("nan")


def draw(curves: dict[str, Curve], file: Path) -> None:
    """One line a run."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer steps", ylabel="validation loss")
    for name, curve in curves.items():
        style = "--" if name.startswith("random") else "-"
        axes.plot(list(curve), list(curve.values()), style, label=name)
    axes.legend()
    axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Train them all, then print curves and table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", default=example_text(), help="what the prefix starts as")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-2, 5e-3])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--every", type=int, default=15, help="steps between two losses")
    parser.add_argument("--output", type=Path, default=PROJECT / "outputs/prefix_init.png")
    arguments = parser.parse_args()

    tokenizer = load_tokenizer(RunConfig.load(CONFIG).model.path)
    length = len(tokenizer.encode_ordinary(arguments.text))
    text = json.dumps(arguments.text, ensure_ascii=False)
    starts = {
        "random": [f"adapter.num_virtual_tokens={length}"],
        "text": [
            "adapter.num_virtual_tokens=null",
            "adapter.init=text",
            f"adapter.init_text={text}",
        ],
    }
    curves = {
        f"{name} {rate:g}": train(start, rate, arguments.steps, arguments.every)
        for rate in arguments.rates
        for name, start in starts.items()
    }
    print(f"{length} virtual tokens: {text}\n\nvalidation loss\n{'steps':<8}", *curves, sep="  ")
    for step in next(iter(curves.values())):
        cells = [f"{curve[step]:>{len(name)}.4f}" for name, curve in curves.items()]
        print(f"{step:<8}", *cells, sep="  ")
    print("\nsteps to a loss\nrate      loss  random    text")
    for rate in arguments.rates:
        random, text_start = curves[f"random {rate:g}"], curves[f"text {rate:g}"]
        for step, loss in list(random.items())[2::2]:
            print(f"{rate:<8g}{loss:>6.3f}{step:>8}{steps_to(text_start, loss):>8.0f}")
    draw(curves, arguments.output)
    print(f"\ncurves: {arguments.output}")


if __name__ == "__main__":
    main()

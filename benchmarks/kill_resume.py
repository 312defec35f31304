"""Kill a training run at random moments, resume it each time, and compare it with the run that was never killed.

    python benchmarks/kill_resume.py [--kills 20] [--config FILE] [section.key=value ...]

Half of the kills wait for a checkpoint to be in the writing. Exits with 1 unless every run could be resumed and every
final adapter and loss is exactly that of the run that was never killed.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

PROJECT = Path(__file__).resolve().parents[1]
SHORT = [
    "data.validation_file=null",
    "data.test_file=null",
    "data.max_train_samples=96",
    "training.eval_strategy=no",
    "training.max_steps=40",
    "training.logging_steps=1",
    "training.save_steps=1",
    "training.save_total_limit=3",
]


@dataclass
class Tally:
    """What the kills did."""

    kills: int = 0
    in_checkpoint: int = 0
    not_resumed: list[str] = field(default_factory=list)
    finished: int = 0
    different: list[str] = field(default_factory=list)


def start(config: Path, overrides: list[str], output_dir: Path) -> subprocess.Popen[str]:
    """Start a run that resumes whatever is there."""
    command = [
        sys.executable,
        "-m",
        "chatglm_ptuning",
        "train",
        "--config",
        str(config),
        *overrides,
    ]
    command += [f"training.output_dir={output_dir}", "training.resume_from_checkpoint=true"]
    log = (output_dir.parent / f"{output_dir.name}.log").open("a")
    return subprocess.Popen(command, cwd=PROJECT, stdout=log, stderr=log, text=True)


def kill_at_random(run: subprocess.Popen[str], output_dir: Path, draw: random.Random) -> None:
    """Let a run make its first step, then kill it, for half of the kills while it writes a checkpoint."""
    metrics, partial = output_dir / "metrics.jsonl", output_dir / ".partial"
    before = metrics.stat().st_mtime if metrics.exists() else 0.0
    while run.poll() is None and not (metrics.exists() and metrics.stat().st_mtime > before):
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 2))
    if draw.random() < 0.5:
        while run.poll() is None and not partial.exists():
            pass
        time.sleep(draw.uniform(0, 0.02))
    run.send_signal(signal.SIGKILL)
    run.wait()


def outcome(output_dir: Path) -> tuple[dict[str, Tensor], list[float]]:
    """The final adapter's tensors (the order in a file's header is random), and the loss of every step."""
    rows = map(json.loads, (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = [row["loss"] for row in rows if "loss" in row]
    return load_file(output_dir / "adapter_model.safetensors"), losses


def is_same(
    one: tuple[dict[str, Tensor], list[float]], other: tuple[dict[str, Tensor], list[float]]
) -> bool:
    """Whether two runs ended with exactly the same tensors and losses."""
    (tensors, losses), (other_tensors, other_losses) = one, other
    return (
        losses == other_losses
        and tensors.keys() == other_tensors.keys()
        and all(torch.equal(tensors[key], other_tensors[key]) for key in tensors)
    )


def soak(config: Path, overrides: list[str], kills: int, seed: int, directory: Path) -> Tally:
    """Kill and resume runs, one after another, until there were so many kills."""
    reference = directory / "never_killed"
    if start(config, overrides, reference).wait() != 0:
        sys.exit(f"the run that is never killed failed, see {reference}.log")
    expected, tally, draw = outcome(reference), Tally(), random.Random(seed)
    while tally.kills < kills:
        output_dir = directory / f"killed_{tally.finished + len(tally.not_resumed)}"
        while tally.kills < kills:
            run = start(config, overrides, output_dir)
            kill_at_random(run, output_dir, draw)
            if run.returncode != -signal.SIGKILL:
                break
            tally.kills += 1
            tally.in_checkpoint += (output_dir / ".partial").exists()
        else:
            run = start(config, overrides, output_dir)
            run.wait()
        if run.returncode != 0:
            tally.not_resumed.append(output_dir.name)
            continue
        tally.finished += 1
        if not is_same(outcome(output_dir), expected):
            tally.different.append(output_dir.name)
        print(f"{tally.kills} kills, {tally.finished} runs finished", flush=True)
    return tally


def main() -> int:
    """Run the soak and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how many in all (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--config", type=Path, default=PROJECT / "configs" / "ptuning_v2.yaml")
    parser.add_argument("--directory", type=Path, help="keep all files here (default: temporary)")
    args, overrides = parser.parse_known_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.directory if args.directory is not None else Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        tally = soak(args.config, SHORT + overrides, args.kills, args.seed, directory)
    print(
        f"{tally.kills} kills ({tally.in_checkpoint} while a checkpoint was written) of {tally.finished} runs: "
        f"{len(tally.not_resumed)} could not resume, {len(tally.different)} ended otherwise than the run never "
        f"killed; {time.monotonic() - started:.0f} s"
    )
    return int(bool(tally.not_resumed or tally.different))


if __name__ == "__main__":
    sys.exit(main())

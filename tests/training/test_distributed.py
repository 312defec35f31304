"""Two processes on the CPU (gloo) against one: the same losses, checkpoints, scores, and a resumed run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from chatglm_ptuning import load_model
from chatglm_ptuning.config import PROJECT, RunConfig
from chatglm_ptuning.training.run import run
from chatglm_ptuning.tuners.prefix import PrefixEncoder, PrefixTuningConfig
from tests.checkpoints import tiny_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
COLOURS = ["红色", "蓝色", "白色", "黑色", "绿色", "黄色", "紫色", "灰色"]
BASE_BYTES = 704_000  # of the base's weights
KINDS = {
    "ptuning_v2": ["adapter.num_virtual_tokens=4", "adapter.prefix_dropout=0"],
    "lora": ["adapter.r=4"],
    "full": ["training.learning_rate=1e-3"],
}
MODES = {
    "ddp": [],
    "zero2": [f"training.deepspeed={PROJECT}/configs/deepspeed/zero2.json"],
    "zero3": [
        f"training.deepspeed={PROJECT}/configs/deepspeed/zero3.json",
        "training.gradient_checkpointing=true",
    ],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random ChatGLM-6B, 16 rows and the config of a run of 6 steps."""
    directory = tmp_path_factory.mktemp("distributed")
    tiny_model("chatglm").save_pretrained(directory / "base")
    for file in (GOLDEN / "tokenizer_v1").iterdir():
        shutil.copy(file, directory / "base")
    rows = [{"content": f"颜色#{colour}", "summary": f"这件是{colour}的。"} for colour in COLOURS]
    (directory / "rows.json").write_text(json.dumps(rows * 2), encoding="utf-8")
    (directory / "run.yaml").write_text(
        f"""
        model: {{path: {directory / "base"}, dtype: float32}}
        data:
          train_file: {directory / "rows.json"}
          validation_file: {directory / "rows.json"}
          max_eval_samples: 4
        training:
          max_steps: 6
          per_device_train_batch_size: 4
          learning_rate: 1e-2
          logging_steps: 1
          save_steps: 3
          eval_strategy: steps
          eval_steps: 3
          use_cpu: true
        generation: {{max_new_tokens: 4}}
        """,
        encoding="utf-8",
    )
    return directory


def one_process(home: Path, kind: str) -> Path:
    """Where the run of one process is, made if it is not there yet."""
    out = home / "single" / kind
    if not out.exists():
        overrides = [f"adapter.type={kind}", *KINDS[kind], f"training.output_dir={out}"]
        run(RunConfig.load(home / "run.yaml", overrides))
    return out


def two_processes(home: Path, mode: str, kinds: list[str], *more: str) -> None:
    """Make the runs of several kinds, half the batch a process."""
    runs = []
    for kind in kinds:
        overrides = [f"adapter.type={kind}", "training.per_device_train_batch_size=2", *KINDS[kind]]
        overrides += [*MODES[mode], f"training.output_dir={home / mode / kind}", *more]
        runs.append([str(home / "run.yaml"), overrides])
    (home / "runs.json").write_text(json.dumps(runs))
    worker = Path(__file__).with_name("distributed_worker.py")
    command = [sys.executable, "-m", "chatglm_ptuning.training.launch", "--standalone"]
    command += ["--nproc_per_node", "2", str(worker), str(home / "runs.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-5000:]


def logged(out: Path, name: str) -> dict[int, float]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[name] for row in rows if name in row}


def weights(out: Path) -> dict[str, torch.Tensor]:
    (file,) = out.glob("*model.safetensors")
    return load_file(file)


def check_against_one_process(home: Path, mode: str, kind: str) -> None:
    one, two = one_process(home, kind), home / mode / kind
    for name in ("loss", "eval_loss"):
        assert logged(two, name) == pytest.approx(logged(one, name), abs=1e-4)
    for key, tensor in weights(one).items():
        # Adam divides noise by noise where a gradient is about 0, so only most of the weights agree closely.
        difference = (weights(two)[key] - tensor).abs()
        assert difference.median() < 1e-5
    scores = [json.loads((out / "scores.json").read_text()) for out in (one, two)]
    assert scores[1]["base"] == scores[0]["base"]
    assert scores[1]["tuned"].keys() == scores[0]["tuned"].keys()


def check_memory(home: Path, mode: str, kind: str) -> None:
    memory = json.loads((home / mode / kind / "memory.json").read_text())
    trained = memory["trained"]
    assert memory["frozen"] == (0 if kind == "full" else 176_000)
    # AdamW keeps two numbers a trained parameter; under ZeRO each of the two processes has half of them
    share = 2 * trained if mode == "ddp" else trained
    assert share <= memory["optimizer_state"] <= 1.02 * share
    assert memory["frozen_gradients"] == []
    assert memory["is_sharded"] == (mode == "zero3")
    if mode == "zero3":
        assert trained / 2 <= memory["gradient_memory"] <= 1.02 * trained / 2


def check_checkpoint(home: Path, mode: str, kind: str) -> None:
    """What is trained and no more; all of it is whole on disk."""
    checkpoint = home / mode / kind / "checkpoint-3"
    if kind == "full":
        model = load_model(checkpoint, "float32", "cpu")
        own = dict(model.named_parameters())
        assert own.keys() == weights(checkpoint).keys()
        base = dict(load_model(home / "base", "float32", "cpu").named_parameters())
        assert all((own[name] != base[name]).any() for name in own if "dense.weight" in name)
        return
    assert {k: t.shape for k, t in weights(checkpoint).items()} == {
        k: t.shape for k, t in weights(one_process(home, kind)).items()
    }
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    assert size < BASE_BYTES / 4
    tuned = load_model(checkpoint, "float32", "cpu")
    assert sum(p.numel() for p in tuned.parameters()) > 176_000


def check_resumed(home: Path, mode: str, kinds: list[str]) -> None:
    """Stopped after step 3 and gone on with, a run ends as it did."""
    before = {}
    for kind in kinds:
        out = home / mode / kind
        before[kind] = (logged(out, "loss"), logged(out, "eval_loss"), weights(out))
        shutil.rmtree(out / "checkpoint-6")
    two_processes(home, mode, kinds, "training.resume_from_checkpoint=true")
    for kind in kinds:
        out = home / mode / kind
        assert (logged(out, "loss"), logged(out, "eval_loss")) == before[kind][:2]
        for key, tensor in weights(out).items():
            assert_close(tensor, before[kind][2][key], atol=1e-7, rtol=0)


def test_sharded_prefix_is_not_kept_between_forward_passes() -> None:
    """Kept, it could differ between processes, which then wait for one another for ever."""
    settings = {"num_layers": 1, "num_key_value_heads": 1, "head_dim": 4}
    encoder = PrefixEncoder(PrefixTuningConfig(num_virtual_tokens=2, **settings))
    with torch.no_grad():
        first = encoder().clone()
        encoder.embedding.weight.data.add_(1)  # as ZeRO-3 does: the parameter does not notice
        assert_close(encoder(), first)
        encoder.embedding.weight.ds_id = 0
        assert_close(encoder(), first + 1)


def test_ddp(home: Path) -> None:
    two_processes(home, "ddp", list(KINDS))
    for kind in KINDS:
        check_against_one_process(home, "ddp", kind)
        check_memory(home, "ddp", kind)
        check_checkpoint(home, "ddp", kind)


def test_zero3_with_prefix_and_gradient_checkpointing(home: Path) -> None:
    two_processes(home, "zero3", ["ptuning_v2"])
    check_against_one_process(home, "zero3", "ptuning_v2")
    check_memory(home, "zero3", "ptuning_v2")
    check_checkpoint(home, "zero3", "ptuning_v2")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_trains_saves_evaluates_and_resumes(mode: str, kind: str, home: Path) -> None:
    two_processes(home, mode, [kind])
    check_against_one_process(home, mode, kind)
    check_memory(home, mode, kind)
    check_checkpoint(home, mode, kind)
    check_resumed(home, mode, [kind])


def start_host(
    home: Path, out: Path, port: int, *more: str, directory: Path | None = None
) -> subprocess.Popen[str]:
    """One of two hosts that meet on the loopback: an agent with one process, in a directory."""
    command = [sys.executable, "-m", "chatglm_ptuning.training.launch", "--nnodes", "2"]
    command += ["--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "test"]
    command += ["--rdzv_endpoint", f"127.0.0.1:{port}", "-m", "chatglm_ptuning", "train"]
    command += ["--config", str(home / "run.yaml"), *KINDS["ptuning_v2"], *LONG]
    command += ["training.per_device_train_batch_size=2", f"training.output_dir={out}", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    return subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


LONG = ["training.max_steps=60", "training.save_steps=1", "data.validation_file=null"]
LONG += ["training.eval_strategy=no", "training.save_total_limit=2"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_hosts_must_share_the_output_directory(home: Path, tmp_path: Path) -> None:
    port, directories = free_port(), [tmp_path / "one", tmp_path / "other"]
    for directory in directories:
        directory.mkdir()
    hosts = [start_host(home, Path("out"), port, directory=path) for path in directories]
    errors = [host.communicate(timeout=100)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [1, 1]
    assert "training.output_dir must be one directory for all hosts, got " in errors[0] + errors[1]


def kill_host(agent: subprocess.Popen[str]) -> None:
    """Take an agent and its process away, as a power cut does."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    for pid in (*map(int, children), agent.pid):
        os.kill(pid, signal.SIGKILL)
    agent.wait()


@pytest.mark.slow
def test_a_host_is_lost_and_the_run_goes_on(home: Path) -> None:
    out, alone = home / "hosts", home / "alone"
    run(
        RunConfig.load(
            home / "run.yaml", [*KINDS["ptuning_v2"], *LONG, f"training.output_dir={alone}"]
        )
    )
    port = free_port()
    hosts = [start_host(home, out, port) for _ in range(2)]
    while all(host.poll() is None for host in hosts):
        if (out / "checkpoint-6").exists():
            break
        time.sleep(0.02)
    kill_host(hosts[1])
    _, error = hosts[0].communicate(timeout=100)
    assert hosts[0].returncode == 1
    # its process sees the connection go, or its agent is the first to know
    assert "go on with training.resume_from_checkpoint=true" in error
    assert max(logged(out, "loss")) < 60
    hosts = [start_host(home, out, port, "training.resume_from_checkpoint=true") for _ in range(2)]
    for host in hosts:
        _, error = host.communicate(timeout=200)
        assert host.returncode == 0, error[-3000:]
    assert logged(out, "loss") == pytest.approx(logged(alone, "loss"), abs=1e-4)

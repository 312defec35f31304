import os
import subprocess
import sys

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException

from chatglm_ptuning.config import PROJECT
from chatglm_ptuning.training import launch


def test_interrupted_processes_end_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def torchrun(arguments: list[str]) -> None:
        raise SignalException("Process 1 got signal: 15", sigval=15)

    monkeypatch.setattr(launch, "torchrun", torchrun)
    assert launch.main([]) == 130


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("NUM_GPUS", "two", "NUM_GPUS must be a whole number over 0, got two"),
        ("NUM_GPUS", "0", "NUM_GPUS must be a whole number over 0, got 0"),
        ("NUM_GPUS", "1.5", "NUM_GPUS must be a whole number over 0, got 1.5"),
        ("HOSTFILE", "no", "HOSTFILE must be a file with lines `host slots=4`, got no"),
    ],
)
def test_processes_and_hosts_are_checked(name: str, value: str, message: str) -> None:
    environment = os.environ | {name: value, "CHATGLM_PTUNING_PYTHON": sys.executable}
    command = ["bash", str(PROJECT / "scripts" / "train_lora.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, f"error: {message}\n")

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


@pytest.mark.parametrize("number", ["two", "0", "-1", "1.5"])
def test_number_of_processes_is_checked(number: str) -> None:
    environment = os.environ | {"NUM_GPUS": number, "CHATGLM_PTUNING_PYTHON": sys.executable}
    command = ["bash", str(PROJECT / "scripts" / "train_lora.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f"error: NUM_GPUS must be a whole number over 0, got {number}\n"

import os
import subprocess
import sys

import pytest

HOLES = """
import torch
from chatglm_ptuning.memory import give_freed_memory_back

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

give_freed_memory_back()
torch.ones(7 * 2**20)  # its end lets glibc keep blocks of its size, 28 MiB, on the heap from now on
before, blocks = resident(), [torch.ones(2**20) for _ in range(100)]
last = blocks[-1]
del blocks
print(resident() - before)
"""


@pytest.mark.skipif(os.confstr("CS_GNU_LIBC_VERSION") is None, reason="another allocator")
def test_freed_memory_goes_back() -> None:
    kept = float(subprocess.check_output([sys.executable, "-c", HOLES], text=True))
    assert kept < 50  # MiB, of 400 in 100 blocks of which one is in use


LARGE_PARENT = """
import subprocess, sys
held = b"x" * (800 * 2**20)
code = "from chatglm_ptuning.memory import peak_resident; print(peak_resident())"
print(subprocess.check_output([sys.executable, "-c", code], text=True))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_peak_memory_is_not_the_parents() -> None:
    peak = int(subprocess.check_output([sys.executable, "-c", LARGE_PARENT], text=True))
    assert 5 * 2**20 < peak < 700 * 2**20

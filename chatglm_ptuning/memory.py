"""Main memory of this process: how much it held, and that what it frees goes back to the system."""

import ctypes
import re
import resource
import sys
from pathlib import Path

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def peak_resident() -> int:
    """The most bytes this process held at once."""
    status = Path("/proc/self/status")  # getrusage also counts what the parent held before exec
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024  # type: ignore[index]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_freed_memory_back() -> None:
    """Let freed blocks over 1 MiB go back to the system at once, here and in processes that are forked.

    glibc keeps those of up to 32 MiB on its heap, between ones in use, and what a layer frees lies there while the next
    one asks for more: the resident set grows to 1.4 times what is held. Other allocators are left as they are.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20)

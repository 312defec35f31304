from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import write_native, write_released

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """`checkpoint(family, layout)`: its directory, which no test may change; family "glm4-hf" is the native one."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(family: str, layout: str = "bin") -> Path:
        directory = root / f"{family}-{layout.replace(' ', '-')}"
        if directory.exists():
            return directory
        if family == "glm4-hf":
            return write_native(directory)
        return write_released(directory, family, layout)

    return make

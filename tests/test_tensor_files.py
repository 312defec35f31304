"""Files of named tensors that are none, as downloads leave them behind."""

import pickle
import random
from pathlib import Path

import pytest
import torch

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.tensor_files import read_tensors

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1344997306\n"
LEGACY = {"_use_new_zipfile_serialization": False}


class Code:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (POINTER, "git lfs pull"),
        (b"hello", "no file of PyTorch|header too"),
        (b"<!DOCTYPE html><html>", "no file of PyTorch|header too"),
    ],
)
def test_text_in_place_of_weights(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        dict(read_tensors(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_file_with_code_is_refused_without_the_advice_to_run_it(tmp_path: Path) -> None:
    with (tmp_path / "old.bin").open("wb") as file:
        pickle.dump({"a": Code()}, file)
    torch.save({"a": Code()}, tmp_path / "new.bin")
    for name in ("old.bin", "new.bin"):
        with pytest.raises(UserError, match="not run") as caught:
            dict(read_tensors(tmp_path / name))
        assert "weights_only" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("settings", [{}, LEGACY])
def test_damaged_bytes_end_in_one_sentence(settings: dict[str, bool], tmp_path: Path) -> None:
    file, draw = tmp_path / "pytorch_model.bin", random.Random(0)
    torch.save({"a": torch.ones(3)}, file, **settings)
    content = file.read_bytes()
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 8)):
            damaged[draw.randrange(min(len(damaged), 400))] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            dict(read_tensors(file))
        except UserError:
            refused += 1
    assert refused > 100

import argparse
import errno
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chatglm_ptuning import cli
from chatglm_ptuning.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def set_command(monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> list:
    """Let `train` note its arguments, and raise."""
    calls: list[argparse.Namespace] = []

    def command(args: argparse.Namespace) -> None:
        calls.append(args)
        if error is not None:
            raise error

    monkeypatch.setattr(cli, "train", command)
    return calls


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "f.yaml", "data.train_file=a b.json", "training.max_steps=3"],
        ["data.train_file=a b.json", "--config", "f.yaml", "training.max_steps=3"],
        [
            "data.train_file=a b.json",
            "--config",
            "other.yaml",
            "training.max_steps=3",
            "--config=f.yaml",
        ],
    ],
)
def test_overrides_stand_anywhere(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    calls = set_command(monkeypatch)
    assert cli.main(["train", *arguments]) == 0
    assert calls[0].config == Path("f.yaml")
    assert calls[0].overrides == ["data.train_file=a b.json", "training.max_steps=3"]


def test_without_arguments_it_is_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = set_command(monkeypatch)
    assert cli.main(["train"]) == 0
    assert calls[0].config == ROOT / "configs" / "ptuning_v2.yaml"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("the path must exist, got 'x'"), 1, "error: the path must exist, got 'x'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/model"),
            1,
            "error: cannot write out/model: No space left on device\n",
        ),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "rows.json/data"),
            1,
            "error: cannot write rows.json/data: Not a directory\n",
        ),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            1,
            f"error: Python must have the packages of requirements.txt, got {sys.executable} without torch;"
            " make .venv with bash scripts/setup.sh and run source .venv/bin/activate\n",
        ),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    set_command(monkeypatch, error)
    assert cli.main(["train"]) == code
    assert capsys.readouterr().err == message


def test_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    set_command(monkeypatch, ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["train"])


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train", "--confg", "x"], ["train", "-x"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: chatglm-ptuning" in capsys.readouterr().err


def test_an_override_without_section_is_the_users_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "max_steps=3"]) == 1
    assert (
        capsys.readouterr().err
        == "error: an override must be section.key=value, got 'max_steps=3'\n"
    )


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    commands = cli.make_parser()._subparsers._group_actions[0].choices
    assert "train" in commands
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        assert f"usage: chatglm-ptuning {command}" in capsys.readouterr().out


def test_help_is_fast() -> None:
    code = (
        "import sys; from chatglm_ptuning.cli import make_parser; make_parser().format_help(); "
        "print(sorted({'torch', 'transformers', 'yaml', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n"


def test_module_and_its_exit_code() -> None:
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "chatglm_ptuning", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("command", [["-m", "chatglm_ptuning", "train"], ["web_demo.py"]])
def test_an_interpreter_without_the_packages_is_one_sentence(command: list[str]) -> None:
    run = subprocess.run(  # -S: without the environment's packages
        [sys.executable, "-S", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr.startswith("error: Python must have the packages of requirements.txt, got ")
    assert run.stderr.count("\n") == 1


def test_a_module_of_ours_that_is_missing_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    set_command(monkeypatch, ModuleNotFoundError("gone", name="chatglm_ptuning.gone"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["train"])

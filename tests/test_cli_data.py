"""`data check` and `data preview` as they are typed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chatglm_ptuning import cli

ROOT = Path(__file__).resolve().parents[1]
DEMO = str(ROOT / "demo" / "model")
GOOD = [{"content": f"类型#裙{n}", "summary": f"这件裙子{n}"} for n in range(4)]


@pytest.fixture
def good(tmp_path: Path) -> str:
    return write(tmp_path / "good.jsonl", GOOD)


def write(file: Path, rows: list, encoding: str = "utf-8") -> str:
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
    file.write_text("\n".join(lines) + "\n", encoding=encoding)
    return str(file)


def test_clean_files_are_counted(good: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", good]) == 0
    assert capsys.readouterr() == ("4 of 4 rows without a finding\n", "")


def test_findings_have_their_place_and_the_exit_code_is_1(
    good: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write(tmp_path / "bad.jsonl", [{"content": "x", "summary": ""}, '{"a" 1}', GOOD[0]])
    assert cli.main(["data", "check", good, bad]) == 1
    out, error = capsys.readouterr()
    assert out.splitlines() == [
        f"{bad}:1: training skips this row: empty answer",
        f"{bad}:2: a row must be valid JSON, got \"Expecting ':' delimiter\" at column 6",
        f"{bad}:3: a row must stand once, got the row of {good}:1",
        "4 of 7 rows without a finding",
        "  empty answer: 1",
        "  unreadable: 1",
        "  duplicate: 1",
    ]
    assert error == (
        "error: data must be free of findings, got 3 in 3 of 7 rows; --fix OUT writes the usable rows\n"
    )


def test_held_out_files_and_a_file_of_usable_rows(
    good: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = write(tmp_path / "test.jsonl", [{**GOOD[2], "summary": "另一个"}])
    fixed = tmp_path / "fixed.jsonl"
    arguments = ["data", "check", good, "--held-out", held_out, "--fix", str(fixed)]
    assert cli.main(arguments) == 1
    out, error = capsys.readouterr()
    assert f"{held_out}:1: a row to evaluate on must not stand in train, got the question" in out
    assert f"4 usable rows written to {fixed}\n" in out
    assert "--fix" not in error
    assert [json.loads(line) for line in fixed.read_text(encoding="utf-8").splitlines()] == GOOD


def test_limits_are_checked_with_a_model(
    good: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = write(tmp_path / "long.jsonl", [{"content": "问" * 40, "summary": "答"}])
    limit = "data.max_source_length=16"
    assert cli.main(["data", "check", long]) == 0
    assert cli.main(["data", "check", limit, long, "--model", DEMO]) == 1
    out = capsys.readouterr().out
    assert f"tokens of this row away: prompt cut (right) to {limit}" in out
    assert f"tokens against {limit}: 1 of 1 rows are over it" in out
    assert cli.main(["data", "check", good, "--model", DEMO]) == 0


def test_settings_stand_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(tmp_path / "gbk.jsonl", GOOD, "gb18030")
    assert cli.main(["data", "check", rows]) == 1
    assert f"{rows}:1: text must be utf-8, got byte 0xc0 that looks like" in capsys.readouterr().out
    for arguments in ([rows, "data.encoding=gb18030"], ["data.encoding=gb18030", rows]):
        assert cli.main(["data", "check", *arguments]) == 0
        assert cli.main(["data", "preview", *arguments, "--rows", "1"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "nowhere.json"], "a data file must exist, got path='nowhere.json'"),
        (["check", "FILE", "--fix", "FILE"], "--fix must name a new file"),
        (["check", "FILE", "--template", "chatglm"], "--template must come with --model"),
        (["check", "FILE", "training.max_steps=3"], "must be given data.key=value only"),
        (["check", "FILE", "data.pakcing=true"], "the nearest is data.packing"),
        (["check", "FILE", "--model", DEMO, "--template", "glm4"], "must fit the tokenizer"),
        (["preview", "FILE", "--rows", "-1"], "--rows must be at least 1, got -1"),
        (["preview", "FILE", "--model", "nowhere"], "must be a directory on this machine"),
    ],
)
def test_one_sentence_where_the_user_is_wrong(
    arguments: list[str], message: str, good: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", *(good if text == "FILE" else text for text in arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["check"], ["preview"], ["chek"], ["check", "-x"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["data", *arguments])
    assert stop.value.code == 2
    assert "usage: chatglm-ptuning data" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "preview"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["data", command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: chatglm-ptuning data {command} FILE" in text
    assert f"Example: data {command} train.json" in text


def test_preview_shows_chatglms_two_positions(
    good: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "preview", good, "--rows", "1"]) == 0
    text = capsys.readouterr().out
    assert "\033" not in text
    lines = [line.split() for line in text.splitlines()[3:]]
    gmask = next(number for number, line in enumerate(lines) if line[3] == "[gMASK]")
    positions = [[int(axis) for axis in line[0].split("/")] for line in lines]
    assert positions[: gmask + 1] == [[place, 0] for place in range(gmask + 1)]
    answer = len(lines) - gmask - 1
    assert positions[gmask + 1 :] == [[gmask, block] for block in range(1, answer + 1)]
    assert lines[gmask][2] == "-"
    assert [line[3] for line in (lines[gmask + 1], lines[-1])] == ["<sop>", "<eop>"]
    assert all(line[2] == line[1] for line in lines[gmask + 1 :])


def test_preview_counts_from_0_elsewhere_and_colours_when_asked(
    good: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in (ROOT / "tests" / "golden" / "tokenizer_v3").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "config.json").write_text('{"model_type": "chatglm", "padded_vocab_size": 2352}')
    arguments = ["--model", str(model), "--template", "chatglm3", "--colour", "--rows", "2"]
    assert cli.main(["data", "preview", good, *arguments]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert second.startswith(f"{good}:2: template chatglm3\n")
    tokens = first.splitlines()[3:]
    places = [line.replace("\033[36m", "").replace("\033[32;1m", "").split()[0] for line in tokens]
    assert places == [str(number) for number in range(len(tokens))]
    assert tokens[0].startswith("\033[36m")
    assert tokens[-1].startswith("\033[32;1m")


def test_check_needs_no_torch_and_survives_a_closed_pipe(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"content": "x", "summary": ""}] * 20_000)
    code = (
        "import sys; from chatglm_ptuning.cli import main; code = main(['data', 'check', sys.argv[1]]); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, rows],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.readline()
        run.stdout.close()
        assert run.stderr.read() == "[]\n"
    assert run.returncode == 141

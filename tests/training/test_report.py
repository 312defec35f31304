import sys
from pathlib import Path

import pytest

from chatglm_ptuning.config import PROJECT, AdapterSection, ModelSection, RunConfig
from chatglm_ptuning.evaluation.predictions import Prediction
from chatglm_ptuning.evaluation.report import Scored
from chatglm_ptuning.training.report import RunReport


def report(directory: Path, is_scored: bool, adapter: AdapterSection | None = None) -> RunReport:
    adapter = adapter if adapter is not None else AdapterSection()
    model = ModelSection(template="chatglm")
    config = RunConfig(model, adapter=adapter, training={"output_dir": str(directory)})
    scored = {"base": Scored({"rouge-1": 1.0}, [Prediction(0, "", "", "")])} if is_scored else {}
    return RunReport(config, steps=1, loss=0.5, scored=scored, seconds=1.0)


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose name a shell takes apart; `python` is the interpreter of these tests."""
    monkeypatch.chdir(PROJECT)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    directory = tmp_path / "my run"
    directory.mkdir()
    return directory


def test_the_next_commands_can_be_typed(out: Path) -> None:
    assert report(out, is_scored=True).next_steps() == [
        f"chat with it:    python web_demo.py --prefix '{out}'",
        f"score it again:  bash scripts/evaluate.sh '{out}'",
    ]


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterSection("prompt_tuning"),
        AdapterSection("ia3"),
        AdapterSection("lora", settings={"use_dora": True}),
    ],
)
def test_no_chat_is_offered_with_what_is_not_served(out: Path, adapter: AdapterSection) -> None:
    (line,) = report(out, is_scored=True, adapter=adapter).next_steps()
    assert line.startswith("score it again:")


def test_a_soft_prompt_is_served_on_the_causal_families(out: Path) -> None:
    run = report(out, is_scored=True, adapter=AdapterSection("ptuning_v1"))
    run.config.model.template = "chatglm3"
    assert run.next_steps()[0].startswith("chat with it:")


def test_what_was_not_scored_is_scored_on_a_file(out: Path) -> None:
    *_, last = report(out, is_scored=False).next_steps()
    assert last == f"score it:        bash scripts/evaluate.sh '{out}' data.test_file=FILE"


def test_the_environment_of_the_run_is_named_where_python_is_another(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(out))
    monkeypatch.setattr(sys, "prefix", str(PROJECT / ".venv"))
    first, *_ = report(out, is_scored=True).next_steps()
    assert first == "once a shell:    source .venv/bin/activate"


def test_one_of_a_thing_is_no_plural(out: Path) -> None:
    text = report(out, is_scored=True).text()
    assert "\n1 row, scores 0-100\n" in text
    assert "\n1 step, training loss 0.5000, 0:01, " in text

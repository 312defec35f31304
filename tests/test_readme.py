"""The README names what is there: every file in its tree, every path in its commands."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from chatglm_ptuning import cli
from chatglm_ptuning.loading import load_model
from chatglm_ptuning.tuners import PrefixTuningConfig, add_adapter, save_adapter
from tests.conftest import Checkpoint

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("chatglm_ptuning", "configs", "scripts", "benchmarks")
PATHS = re.compile(r"(?<![\w/=.])(?:configs|scripts|benchmarks|tests|docs|demo)/[\w/.-]*\w")


def files_in_tree(readme: str) -> set[str]:
    """The paths in the tree under "Files", from its indentation."""
    tree = readme.split("## Files")[1].split("```")[1]
    trail: list[str] = []
    found = set()
    for line in filter(str.strip, tree.splitlines()):
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        trail[depth:] = [name.rstrip("/")]
        if not name.endswith("/"):
            found.add("/".join(trail))
    return found


def test_the_tree_is_the_one_on_disk() -> None:
    on_disk = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".sh", ".yaml", ".json"} and path.name != "__init__.py"
    }
    assert files_in_tree((ROOT / "README.md").read_text(encoding="utf-8")) == on_disk


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_what_commands_name_is_there(name: str) -> None:
    readme = (ROOT / name).read_text(encoding="utf-8")
    paths = set(PATHS.findall(readme))
    assert "scripts/train_ptuning.sh" in paths
    assert {path for path in paths if not (ROOT / path).exists()} == set()


def test_the_run_on_your_own_files_works_as_written(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [shlex.split(line) for line in readme.splitlines() if line.startswith("bash scripts/")]
    (train,) = (words[2:] for words in lines if "data.train_file=mine.json" in words)
    (evaluate,) = (words[2:] for words in lines if "data.test_file=test.json" in words)
    monkeypatch.chdir(tmp_path)
    row = {"content": "类型#裙", "summary": "这件裙子"}
    for file in ("mine.json", "test.json"):
        Path(file).write_text(json.dumps(row))
    model = f"model.path={checkpoint('chatglm2')}"
    train[train.index("model.path=/data/chatglm2-6b")] = model
    assert cli.main(["train", *train, "training.max_steps=1"]) == 0
    assert cli.main(["evaluate", *evaluate]) == 0
    assert Path(evaluate[0], "evaluation", "scores.json").is_file()


def test_both_languages_have_the_same_commands_and_figures() -> None:
    english, chinese = (
        re.sub(r"^## (Files|文件)\n.*?^## ", "", readme, flags=re.DOTALL | re.MULTILINE)
        for readme in (
            ROOT.joinpath(n).read_text(encoding="utf-8") for n in ("README.md", "README_zh.md")
        )
    )

    def commands(readme: str) -> list[str]:
        blocks = re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)
        return [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines()][1:]

    def figures(readme: str) -> set[str]:
        return set(re.findall(r"\d+(?:[.,]\d+)+|\d+e-\d+", readme))

    assert commands(english) == commands(chinese)
    assert figures(english) == figures(chinese)


@pytest.mark.slow
def test_the_python_in_it_runs_without_noise(tmp_path: Path) -> None:
    block = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    model = load_model(ROOT / "demo" / "model")
    add_adapter(model, PrefixTuningConfig(num_virtual_tokens=32), "ads")
    save_adapter(model, tmp_path, "ads")
    code = block.replace("outputs/ptuning", str(tmp_path))
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (0, "")
    assert [line for line in run.stderr.splitlines() if not line.startswith("adapter 'ads' ")] == []

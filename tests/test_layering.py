"""The layers: legs, table top, entry points. Any import that is not allowed here fails."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "chatglm_ptuning"
MAX_LINES = 450

LEGS = {"models", "tuners", "data"}
TOP = {
    "config",
    "config_file",
    "loading",
    "memory",
    "training",
    "evaluation",
    "serving",
    "demo",
    "export",
    "cli",
    "cli_data",
}
BASE = {"errors", "version", "tensor_files"}  # anybody may import these
ALLOWED = {
    **{leg: {leg} | BASE for leg in LEGS},
    **{top: LEGS | TOP | BASE | {"__init__"} for top in TOP},
    "errors": set(),
    "tensor_files": {"errors"},
    "version": set(),
    "__init__": {"loading"} | BASE,
    "__main__": TOP | BASE | {"__init__"},
    "web_demo": TOP | BASE | {"__init__"},  # the file at the root
}


def module_name(path: Path) -> str:
    """`models/loading.py` -> `models.loading`; `models/__init__.py` -> `models`; the root one is ''."""
    parts = list(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imported_modules(path: Path, name: str | None) -> set[str]:
    """The modules of this package that a file imports anywhere in it, '' being the package itself.

    Args:
        path: The file.
        name: Its module name, for relative imports; None outside the package.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                assert name is not None
                parents = [PACKAGE, *filter(None, name.split("."))]
                if path.name != "__init__.py":
                    parents.pop()
                parents = parents[: len(parents) - node.level + 1]
                origin = ".".join([*parents, *filter(None, [node.module])])
            targets = [(origin, alias.name) for alias in node.names]
        else:
            continue
        for origin, attribute in targets:
            if origin.split(".")[0] != PACKAGE:
                continue
            inside = ".".join(origin.split(".")[1:])
            deeper = f"{inside}.{attribute}".strip(".")
            found.add(deeper if deeper in SOURCES else inside)
    return found


def layer(name: str) -> str:
    return name.split(".")[0] or "__init__"


def forbidden_edges() -> list[str]:
    edges = []
    for name, path in SOURCES.items():
        for target in imported_modules(path, name):
            if layer(target) not in ALLOWED[layer(name)]:
                edges.append(f"{name or PACKAGE} -> {target or PACKAGE}")
    if (ROOT / "web_demo.py").exists():
        for target in imported_modules(ROOT / "web_demo.py", None):
            if layer(target) not in ALLOWED["web_demo"]:
                edges.append(f"web_demo -> {target or PACKAGE}")
    return edges


def cycles() -> list[str]:
    """Import cycles between modules, lazy imports counted, each as `a -> b -> a`."""
    graph = {name: imported_modules(path, name) - {name} for name, path in SOURCES.items()}
    found: list[str] = []
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append(" -> ".join([*trail[trail.index(name) :], name]))
            return
        if name in done:
            return
        for target in sorted(graph[name]):
            visit(target, [*trail, name])
        done.add(name)

    for name in graph:
        visit(name, [])
    return found


def test_only_allowed_imports() -> None:
    assert forbidden_edges() == []


def test_every_module_has_a_layer() -> None:
    assert {layer(name) for name in SOURCES} <= set(ALLOWED)


def test_no_import_cycles() -> None:
    assert cycles() == []


@pytest.mark.parametrize("folder", [PACKAGE, "tests", "benchmarks"])
def test_no_long_file(folder: str) -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_no_catch_all_modules() -> None:
    assert not {
        name for name in SOURCES if name.split(".")[-1] in {"utils", "constants", "helpers"}
    }


def test_package_import_is_light() -> None:
    code = (
        f"import sys, {PACKAGE}; "
        "print(sorted({'gradio', 'fastapi', 'peft', 'jieba', 'nltk', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"

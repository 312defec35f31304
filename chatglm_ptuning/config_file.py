"""A config file with the place of each key, and `section.key=value` laid over it."""

import re
from pathlib import Path
from typing import Any

import yaml

from chatglm_ptuning.errors import UserError

COMMAND_LINE = "command line"  # the place of what no file says


class Loader(yaml.SafeLoader):
    """PyYAML's YAML 1.1, but 1e-4 is a number, and yes, no, on and off are text (`eval_strategy: no`)."""


BOOL, FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] != BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(BOOL, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
Loader.add_implicit_resolver(
    FLOAT, re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping in a file, and `file:line` of each key (`section`, `section.key`).

    Raises:
        UserError: No such file, not UTF-8, not YAML, not a mapping, a key twice.
    """
    try:
        loader = Loader(file.read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        values = loader.construct_document(node) if node is not None else {}
    except OSError as error:
        raise UserError(f"config file must be readable, got {file}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
        raise UserError(f"{file}: a config file must be UTF-8 text; {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        raise UserError(f"{file}:{line}: must be YAML, but {error.problem}") from None
    except ValueError as error:  # a date that is none
        raise UserError(f"{file}: must be YAML, but {error}; put dates in quotes") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}:1: a config must be sections of keys, got {values!r}")
    places: dict[str, str] = {}
    if node is not None:
        note_places(node, str(file), "", places)
    return values, places


def note_places(node: yaml.Node, file: str, prefix: str, places: dict[str, str]) -> None:
    """Fill `places` with `file:line` of the keys of a mapping node and of the mappings in it."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        name, place = f"{prefix}{key_node.value}", f"{file}:{key_node.start_mark.line + 1}"
        if name in places:
            raise UserError(f"{place}: {name} must stand once, it is also at {places[name]}")
        places[name] = place
        note_places(value_node, file, f"{name}.", places)


def lay_over(values: dict[str, Any], places: dict[str, str], override: str) -> None:
    """Set one `section.key=value`, the value read as YAML.

    Raises:
        UserError: Another form.
    """
    name, equals, text = override.partition("=")
    *parents, key = name.split(".")
    if not (equals and parents and all(parents) and key):
        raise UserError(f"an override must be section.key=value, got {override!r}")
    try:
        value = yaml.load(text, Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError):  # ValueError: a date that is none
        raise UserError(
            f"the value of {name} must be YAML, got {text!r}; put it in quotes"
        ) from None
    for depth, parent in enumerate(parents):
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        places.setdefault(".".join(parents[: depth + 1]), COMMAND_LINE)
        if not isinstance(values, dict):
            raise UserError(
                f"{COMMAND_LINE}: {'.'.join(parents[: depth + 1])} must hold keys, got {values!r}"
            )
    values[key] = value
    places[name] = COMMAND_LINE

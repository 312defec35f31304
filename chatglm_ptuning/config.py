"""One YAML file a run: sections `model`, `data`, `adapter`, `training`, `generation`.

Each section belongs to the class that uses it; this file reads them strictly (an unknown key or a value of the wrong
type is an error that names file, line and the nearest key), lays `section.key=value` of the command line over them,
and writes what came out beside the adapter as run_config.yaml.

Relative paths are looked up from the current directory, except those written in the project's own configs/, which
are relative to the project.
"""

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml

from chatglm_ptuning.config_file import COMMAND_LINE, lay_over, read_yaml
from chatglm_ptuning.data.config import DataConfig
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.training.arguments import OTHER_ARGUMENTS, RENAMED_ARGUMENTS, RunArguments
from chatglm_ptuning.tuners.prefix import PrefixTuningConfig
from chatglm_ptuning.tuners.prompt_encoder import PromptEncoderConfig, PromptTuningConfig
from chatglm_ptuning.version import __version__

PROJECT = Path(__file__).resolve().parents[1]
RUN_CONFIG_FILE = "run_config.yaml"

# `adapter.type` -> where its run is written by default
OUTPUT_DIRS = {
    "ptuning_v2": "outputs/ptuning",
    "prompt_tuning": "outputs/prompt",
    "ptuning_v1": "outputs/ptuning_v1",
    "lora": "outputs/lora",
    "adalora": "outputs/adalora",
    "ia3": "outputs/ia3",
    "full": "outputs/full",
}
# Keys that hold a path, or a list of paths; `~` in them is the home directory, as in a shell
PATHS = {
    "model": ("path",),
    "data": ("train_file", "validation_file", "test_file", "cache_dir"),
    "adapter": ("from",),
    "training": ("output_dir", "resume_from_checkpoint", "deepspeed"),
}
OTHER_NAMES = {"pre_seq_len": "num_virtual_tokens"}  # as the released ChatGLM scripts call it


@dataclass
class ModelSection:
    """Which base model, and how it is loaded.

    Args:
        path: A checkpoint directory.
        template: The chat format, a name in `data.template.TEMPLATES`; None where the checkpoint tells it.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", "cuda:1"; None takes the GPU where there is one.
        quantization_bit: 4 or 8 quantises the frozen base with bitsandbytes; None leaves it whole.
    """

    path: str = "demo/model"
    template: str | None = None
    dtype: str = "auto"
    device: str | None = None
    quantization_bit: int | None = None


@dataclass
class AdapterSection:
    """What is trained.

    Args:
        type: A key of `OUTPUT_DIRS`; "full" trains every weight of the base.
        start: `adapter.from` in the YAML: an adapter directory whose tensors a new run starts from.
        init: What a prefix of "ptuning_v2" starts as: "random", or "text", the keys and values of `init_text`.
        init_text: That text; the prefix is as long as it is in tokens.
        settings: Fields of that tuner's config class, e.g. num_virtual_tokens; of "full" only `train_last_layers`.
    """

    type: str = "ptuning_v2"
    start: str | None = None
    init: Literal["random", "text"] = "random"
    init_text: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        starts, text = self.start is not None, self.init == "text"
        rules = {
            "from must be null where every weight is trained": not (starts and self.type == "full"),
            "from must be null beside init=text": not (starts and text),
            "init=text and init_text must come together": text == bool(self.init_text),
            "prefix_projection must be false beside init=text": not (
                text and self.settings.get("prefix_projection")
            ),
        }
        for rule, holds in rules.items():
            if not holds:
                got = f"from={self.start!r}, init={self.init!r}, init_text={self.init_text!r}"
                raise UserError(f"adapter.{rule}, got {got}; leave one of them out")

    def tuner_config(self) -> Any:
        """The tuner's config object; None where every weight is trained.

        Raises:
            UserError: Values that do not go together.
        """
        config_class = tuner_class(self.type)
        try:
            return None if config_class is None else config_class(**self.settings)
        except ValueError as error:  # peft's
            raise UserError(f"section adapter: {error}") from error


def tuner_class(kind: str) -> Any:
    """The config class of an `adapter.type`; None for "full". peft's are imported here: that takes seconds."""
    if kind == "full":
        return None
    own = {
        "ptuning_v2": PrefixTuningConfig,
        "prompt_tuning": PromptTuningConfig,
        "ptuning_v1": PromptEncoderConfig,
    }
    if kind in own:
        return own[kind]
    import peft

    return {"lora": peft.LoraConfig, "adalora": peft.AdaLoraConfig, "ia3": peft.IA3Config}[kind]


@dataclass
class GenerationSection:
    """How answers are generated in evaluation; greedy by default, so that scores repeat.

    Args:
        max_new_tokens: Longest answer, in tokens.
        batch_size: Answers generated at a time.
        do_sample: Draw tokens instead of taking the likeliest; the three below count only then.
        temperature: Divides the logits; 0 is greedy.
        top_p: Draw from the smallest set of tokens that holds this probability.
        top_k: Draw from this many likeliest tokens; 0 draws from all.
        num_beams: Width of beam search; 1 is none.
        repetition_penalty: Divides the logits of tokens already used; 1 is none.
    """

    max_new_tokens: int = 128
    batch_size: int = 16
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "be at least 1"),
            "batch_size": (self.batch_size >= 1, "be at least 1"),
            "temperature": (self.temperature >= 0, "be 0 or more"),
            "top_p": (0 < self.top_p <= 1, "be over 0 and at most 1"),
            "top_k": (self.top_k >= 0, "be 0 or more"),
            "num_beams": (self.num_beams >= 1, "be at least 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "be over 0"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise UserError(f"generation.{name} must {rule}, got {getattr(self, name)!r}")


@dataclass
class RunConfig:
    """The whole run; `training` holds the fields of `Seq2SeqTrainingArguments` word for word."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterSection = field(default_factory=AdapterSection)
    training: dict[str, Any] = field(default_factory=dict)
    generation: GenerationSection = field(default_factory=GenerationSection)

    @classmethod
    def load(
        cls, file: str | os.PathLike[str] | None, overrides: Iterable[str] = ()
    ) -> "RunConfig":
        """Read a YAML file and lay `section.key=value` texts over it.

        Raises:
            UserError: Not YAML, not a mapping, an unknown key, a value of the wrong type.
        """
        values, places = read_yaml(Path(file)) if file is not None else ({}, {})
        if file is not None and Path(file).resolve().parent == PROJECT / "configs":
            inputs = PATHS | {"training": ("deepspeed",)}
            change_paths(values, inputs, lambda x: os.path.relpath(PROJECT / os.path.expanduser(x)))
        values.pop("versions", None)  # written by `save`
        for override in overrides:
            lay_over(values, places, override)
        check_keys(values, [f.name for f in dataclasses.fields(cls)], "", places)
        for name, section in values.items():
            if not isinstance(section, dict | None):
                raise UserError(f"{places[name]}: section {name} must hold keys, got {section!r}")
        change_paths(values, PATHS, os.path.expanduser)
        adapter, training = parse_adapter(values, places), parse_training(values, places)
        if adapter.type == "adalora" and training.get("max_steps", -1) > 0:
            adapter.settings.setdefault("total_step", training["max_steps"])
        return cls(
            model=parse_section(ModelSection, values, "model", places),
            data=parse_section(DataConfig, values, "data", places),
            adapter=adapter,
            training=training,
            generation=parse_section(GenerationSection, values, "generation", places),
        )

    @property
    def output_dir(self) -> Path:
        """Where the run is written."""
        given = self.training.get("output_dir")
        return Path(given if given is not None else OUTPUT_DIRS[self.adapter.type])

    def to_dict(self) -> dict[str, Any]:
        """The sections as `load` reads them, the versions in use beside them."""
        sections = dataclasses.asdict(self)
        sections["adapter"] = {"type": self.adapter.type, **self.adapter.settings}
        if self.adapter.start is not None:
            sections["adapter"]["from"] = os.path.abspath(self.adapter.start)
        if self.adapter.init_text is not None:
            sections["adapter"] |= {"init": self.adapter.init, "init_text": self.adapter.init_text}
        sections["training"]["output_dir"] = str(self.output_dir)
        # The adapter is used from other directories than the one it was trained in.
        sections["model"]["path"] = os.path.abspath(self.model.path)
        packages = ("torch", "transformers", "peft")
        sections["versions"] = {"chatglm_ptuning": __version__} | {p: version(p) for p in packages}
        return sections

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write run_config.yaml into a directory that exists."""
        text = yaml.safe_dump(self.to_dict(), allow_unicode=True, sort_keys=False)
        (Path(directory) / RUN_CONFIG_FILE).write_text(text, encoding="utf-8")


def change_paths(values: dict, keys: dict[str, tuple], change: Callable[[str], str]) -> None:
    """Change the paths at these keys of the sections."""
    for section in keys.keys() & values.keys():
        if isinstance(content := values[section], dict):
            for key in content.keys() & keys[section]:
                if isinstance(value := content[key], str):
                    content[key] = change(value)
                elif isinstance(value, list):
                    content[key] = [change(x) if isinstance(x, str) else x for x in value]


def check_keys(
    values: Mapping[str, Any], known: list[str], prefix: str, places: dict[str, str]
) -> None:
    """Refuse a key that is not known, naming the nearest one that is."""
    for key in values:
        if key not in known:
            name = f"{prefix}{key}"
            place = places.get(name, "config")
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0)
            advice = f"the nearest is {prefix}{near[0]}"
            if prefix == "training." and key in RENAMED_ARGUMENTS:
                advice = RENAMED_ARGUMENTS[key]
            elif prefix == "adapter." and places.get("adapter.type") == COMMAND_LINE != place:
                advice = "the file is for another adapter.type, give --config one of this type"
            raise UserError(f"{place}: there is no key {name}; {advice}")


def parse_section(cls: type, values: Mapping[str, Any], name: str, places: dict[str, str]) -> Any:
    """An object of a dataclass from the section of that name."""
    section = values.get(name) or {}
    fields = typing.get_type_hints(cls)
    check_keys(section, list(fields), f"{name}.", places)
    check_types(section, fields, f"{name}.", places)
    return cls(**section)


def parse_adapter(values: Mapping[str, Any], places: dict[str, str]) -> AdapterSection:
    """The section `adapter`, whose keys depend on its type."""
    section = dict(values.get("adapter") or {})
    kind = section.pop("type", AdapterSection.type)
    if not (isinstance(kind, str) and kind in OUTPUT_DIRS):
        raise UserError(
            f"{places['adapter.type']}: adapter.type must be one of {', '.join(OUTPUT_DIRS)}, got {kind!r}"
        )
    own: dict[str, Any] = {"from": str | None}
    if kind == "ptuning_v2":
        hints = typing.get_type_hints(AdapterSection)
        own |= {name: hints[name] for name in ("init", "init_text")}
    start = {key: section.pop(key) for key in own if key in section}
    check_types(start, own, "adapter.", places)
    config_class = tuner_class(kind)
    fields = {"train_last_layers": int | None}
    if config_class is not None:
        fields = typing.get_type_hints(config_class)
    fields = {n: t for n, t in fields.items() if typing.get_origin(t) is not typing.ClassVar}
    for other, key in OTHER_NAMES.items():
        if other in section and key in fields:
            section[key] = section.pop(other)
    check_keys(section, ["type", *own, *fields], "adapter.", places)
    if section.get("num_virtual_tokens", 0) is None:  # takes a config's length back
        del section["num_virtual_tokens"]
    check_types(section, fields, "adapter.", places)
    return AdapterSection(type=kind, start=start.pop("from", None), **start, settings=section)


def parse_training(values: Mapping[str, Any], places: dict[str, str]) -> dict[str, Any]:
    """The section `training`, checked against the arguments of the trainer but left as it is."""
    section = {
        OTHER_ARGUMENTS.get(key, key): value
        for key, value in (values.get("training") or {}).items()
    }
    fields = typing.get_type_hints(RunArguments)
    check_keys(section, [f.name for f in dataclasses.fields(RunArguments)], "training.", places)
    check_types(section, fields, "training.", places)
    return section


def check_types(
    section: Mapping[str, Any], fields: Mapping[str, Any], prefix: str, places: dict[str, str]
) -> None:
    """Refuse a value that is not of its field's type."""
    for key, value in section.items():
        if not has_type(value, fields[key]):
            name = f"{prefix}{key}"
            raise UserError(
                f"{places.get(name, 'config')}: {name} must be {describe_type(fields[key])}, got {value!r}"
            )


def has_type(value: Any, wanted: Any) -> bool:
    """Whether a YAML value fits an annotation; one that YAML cannot spell fits none."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(has_type(value, option) for option in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is not None:
        return isinstance(value, origin) and (
            origin is not list or all(has_type(item, inner[0]) for item in value)
        )
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(wanted, type) and issubclass(wanted, Enum | Path):
        return isinstance(value, str)
    return isinstance(value, wanted)


def describe_type(wanted: Any) -> str:
    """An annotation in words."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    words |= {dict: "keys", list: "a list", types.NoneType: "null"}
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe_type(option) for option in inner))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is list:
        return f"a list ({describe_type(inner[0])} each)"
    if isinstance(wanted, type) and issubclass(wanted, Enum | Path):
        return "text"
    return words.get(origin if origin is not None else wanted, str(wanted))

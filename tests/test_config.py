import os
from pathlib import Path

import pytest

from chatglm_ptuning.config import PROJECT, RUN_CONFIG_FILE, RunConfig
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.training.arguments import OTHER_ARGUMENTS, make_arguments


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return RunConfig.load(file, overrides)


def test_values_and_overrides(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "model: {path: 模型}\nadapter: {type: ptuning_v2, pre_seq_len: 8}\ntraining:\n  learning_rate: 1e-2\ndata:\n",
        "training.max_steps=5",
        "data.train_file=[a.json, b.json]",
        "generation.temperature=0",
        "model.template='2'",
    )
    assert config.model.path == "模型"
    assert config.model.template == "2"
    assert config.adapter.settings == {"num_virtual_tokens": 8}
    assert config.adapter.tuner_config().num_virtual_tokens == 8
    assert config.training == {"learning_rate": 0.01, "max_steps": 5}
    assert config.data.train_file == ["a.json", "b.json"]
    assert config.generation.temperature == 0


def test_no_is_a_word_and_false_is_not(tmp_path: Path) -> None:
    config = load(
        tmp_path, "training: {eval_strategy: no, bf16: false}", "training.save_strategy=no"
    )
    assert config.training == {"eval_strategy": "no", "bf16": False, "save_strategy": "no"}
    config.save(tmp_path)
    assert RunConfig.load(tmp_path / RUN_CONFIG_FILE).training["eval_strategy"] == "no"


def test_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "") == RunConfig() == RunConfig.load(None)


def test_full_training_has_no_tuner(tmp_path: Path) -> None:
    config = load(tmp_path, "adapter: {type: full}")
    assert config.adapter.tuner_config() is None
    assert config.output_dir == Path("outputs/full")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  pth: x", "run.yaml:2: there is no key model.pth; the nearest is model.path"),
        ("modle: {path: x}", "run.yaml:1: there is no key modle; the nearest is model"),
        (
            "data: {trian_file: x}",
            "run.yaml:1: there is no key data.trian_file; the nearest is data.train_file",
        ),
        (
            "training:\n\n  learnin_rate: 1",
            "run.yaml:3: there is no key training.learnin_rate; the nearest is training.learning_rate",
        ),
        (
            "training: {no_cuda: true}",
            "there is no key training.no_cuda; it is training.use_cpu now",
        ),
        (
            "adapter: {type: full, num_virtual_tokens: 3}",
            "there is no key adapter.num_virtual_tokens",
        ),
        ("adapter: {type: lroa}", "run.yaml:1: adapter.type must be one of ptuning_v2, "),
        ("adapter: {type: [lora]}", "adapter.type must be one of ptuning_v2, "),
        ("training: {run_name: 2024-13-45}", "run.yaml: must be YAML, but month must be in 1..12"),
        ("adapter: {from: 3}", "run.yaml:1: adapter.from must be text or null, got 3"),
        ("adapter: {init: words}", "run.yaml:1: adapter.init must be one of random, text, got"),
        ("adapter: {type: lora, init: text}", "run.yaml:1: there is no key adapter.init;"),
        ("adapter: {init: text}", "init_text must come together, got from=None, init='text'"),
        ("adapter: {init_text: 你好}", "come together, got from=None, init='random'"),
        (
            "adapter: {init: text, init_text: 你好, prefix_projection: true}",
            "adapter.prefix_projection must be false beside init=text, got ",
        ),
        (
            "adapter: {init: text, init_text: 你好, from: a}",
            "adapter.from must be null beside init=text, got from='a'",
        ),
        (
            "adapter: {type: full, from: a}",
            "adapter.from must be null where every weight is trained, got from='a'",
        ),
        ("model: {path: 3}", "run.yaml:1: model.path must be text, got 3"),
        (
            "model: {quantization_bit: true}",
            "model.quantization_bit must be a whole number or null, got True",
        ),
        ("training: {learning_rate: fast}", "training.learning_rate must be a number, got 'fast'"),
        ("training: {bf16: yes}", "training.bf16 must be true or false, got 'yes'"),
        ("training: {bf16: 1}", "training.bf16 must be true or false, got 1"),
        (
            "data: {max_source_length: 64.5}",
            "data.max_source_length must be a whole number, got 64.5",
        ),
        (
            "data: {train_file: [1]}",
            "data.train_file must be text or a list (text each) or null, got [1]",
        ),
        ("generation: {top_p: 0}", "generation.top_p must be over 0 and at most 1, got 0"),
        ("model: 3", "run.yaml:1: section model must hold keys, got 3"),
        ("- 1", "run.yaml:1: a config must be sections of keys, got [1]"),
        ("a: [1\nb: 2", "run.yaml:2: must be YAML, but expected ',' or ']', but got ':'"),
        ("a:\n\t- 1", "run.yaml:2: must be YAML, but found character '\\t'"),
        ("data: {}\ndata: {}", "run.yaml:2: data must stand once, it is also at "),
        ("model:\n  path: a\n  path: b", "run.yaml:3: model.path must stand once, it is also at "),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["adapter: {init: text, init_text: 你好, num_virtual_tokens: 2}", "adapter: {from: a}"],
)
def test_where_an_adapter_starts_is_saved(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, text)
    config.save(tmp_path)
    saved = RunConfig.load(tmp_path / RUN_CONFIG_FILE).adapter
    assert (saved.init, saved.init_text) == (config.adapter.init, config.adapter.init_text)
    assert saved.start == (os.path.abspath("a") if config.adapter.start else None)
    assert saved.settings == config.adapter.settings


def test_a_length_can_be_taken_back(tmp_path: Path) -> None:
    text = "adapter: {num_virtual_tokens: 8, init: text, init_text: 你好}"
    assert load(tmp_path, text, "adapter.num_virtual_tokens=null").adapter.settings == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_steps=1", "an override must be section.key=value, got 'max_steps=1'"),
        ("model.path", "an override must be section.key=value, got 'model.path'"),
        ("model..path=1", "an override must be section.key=value"),
        (
            "training.max_step=1",
            "command line: there is no key training.max_step; the nearest is training.max_steps",
        ),
        ("training.max_steps=[1", "the value of training.max_steps must be YAML, got '[1'"),
        ("model.path.x=1", "command line: model.path must hold keys, got 'a'"),
        (
            "training.max_steps=many",
            "command line: training.max_steps must be a whole number, got 'many'",
        ),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, "model: {path: a}", override)
    assert message in str(error.value)


def test_a_file_for_another_type(tmp_path: Path) -> None:
    text = "adapter:\n  num_virtual_tokens: 8"
    with pytest.raises(UserError, match=r"yaml:2: .*the file is for another adapter\.type"):
        load(tmp_path, text, "adapter.type=lora")
    with pytest.raises(UserError, match=r"line: there is no key adapter\.rank; the nearest is"):
        load(tmp_path, "adapter: {r: 8}", "adapter.type=lora", "adapter.rank=4")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"config file must be readable, got .*no\.yaml: No such file"
    ):
        RunConfig.load(tmp_path / "no.yaml")


def test_wrong_encoding(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes("model: {path: 模型}".encode("gb18030"))
    with pytest.raises(UserError, match="must be UTF-8 text"):
        RunConfig.load(tmp_path / "run.yaml")


def test_saved_config_loads_again(tmp_path: Path) -> None:
    config = load(
        tmp_path, "model: {path: base}\nadapter: {pre_seq_len: 8}\ntraining: {bf16: true}"
    )
    config.save(tmp_path)
    again = RunConfig.load(tmp_path / RUN_CONFIG_FILE)
    assert again.to_dict() == config.to_dict()
    assert again.model.path == os.path.abspath("base")
    assert again.training == {"bf16": True, "output_dir": "outputs/ptuning"}
    assert set(again.to_dict()["versions"]) == {"chatglm_ptuning", "torch", "transformers", "peft"}


@pytest.mark.parametrize("name", sorted(path.name for path in (PROJECT / "configs").glob("*.yaml")))
def test_shipped_configs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = RunConfig.load(PROJECT / "configs" / name)
    config.adapter.tuner_config()
    arguments = make_arguments(config.training, tmp_path)
    assert arguments.report_to in ([], ["tensorboard"])  # the latter where it is installed
    assert Path(config.model.path).resolve() == PROJECT / "demo" / "model"
    assert str(config.output_dir).startswith("outputs/")


def test_both_names_of_checkpointing(tmp_path: Path) -> None:
    new = next(iter(OTHER_ARGUMENTS.values()))
    for name in (*OTHER_ARGUMENTS.items(),)[0]:
        config = load(tmp_path, f"training: {{{name}: true}}")
        assert config.training == {new: True}
        assert getattr(make_arguments(config.training, tmp_path), new) is True


def test_arguments_that_transformers_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"section training: .*sometimes"):
        make_arguments({"eval_strategy": "sometimes"}, tmp_path)


def test_several_gpus_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatglm_ptuning.training.arguments.RunArguments.n_gpu", 2)
    with pytest.raises(UserError, match="must use one GPU, got 2 visible ones; set NUM_GPUS=2"):
        make_arguments({}, tmp_path)


def test_adalora_runs_over_all_steps_unless_told(tmp_path: Path) -> None:
    whole = load(tmp_path, "adapter: {type: adalora}\ntraining: {max_steps: 90}")
    assert whole.adapter.tuner_config().total_step == 90
    told = load(tmp_path, "adapter: {type: adalora, total_step: 70}\ntraining: {max_steps: 90}")
    assert told.adapter.tuner_config().total_step == 70
    unknown = load(tmp_path, "adapter: {type: adalora}")
    with pytest.raises(UserError, match="section adapter: AdaLoRA does not work when `total_step`"):
        unknown.adapter.tuner_config()

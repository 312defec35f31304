import json
import socket
from pathlib import Path

import pytest

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.serving.opening import DEMO_MODEL, find_base, listen, named_directories


def make_adapter(directory: Path, base: Path) -> Path:
    directory.mkdir()
    content = {"base_model_name_or_path": str(base)}
    (directory / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def test_base_is_the_one_given_or_the_adapters_or_the_demos(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    ads, released = make_adapter(tmp_path / "ads.1", base), tmp_path / "released"
    assert find_base(None, {}) == (DEMO_MODEL, {})
    assert find_base(None, {"old": released, "ads": ads})[0] == base
    assert find_base("other", {"old": released}) == (Path("other"), {"old": released})
    assert find_base(ads, {"old": released}) == (base, {"ads_1": ads, "old": released})


def test_base_that_is_not_certain_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    ads = make_adapter(tmp_path / "ads", tmp_path / "one")
    other = make_adapter(tmp_path / "other", tmp_path / "two")
    with pytest.raises(UserError, match="all adapters must have one base"):
        find_base(None, {"a": ads, "b": other})
    with pytest.raises(UserError, match="name the base with --model"):
        find_base(None, {"a": tmp_path / "released"})
    with pytest.raises(UserError, match="name must be new, got 'ads' twice"):
        find_base(ads, {"ads": other})


def test_no_adapter_takes_the_place_of_another() -> None:
    assert list(named_directories(["b=x/a"], "y/v1.0")) == ["v1_0", "b"]
    for texts, unnamed in ((["a=x", "a=y"], None), (["a=x"], "y/a")):
        with pytest.raises(UserError, match="name must be new, got 'a' twice"):
            named_directories(texts, unnamed)


def test_address_that_cannot_be_used_is_told_before_anything_is_loaded() -> None:
    with listen("127.0.0.1", 0) as taken:
        for host, port in (
            taken.getsockname(),
            ("127.0.0.1", 70000),
            ("127.0.0.1", -1),
            ("192.0.2.1", 0),  # an address for examples (RFC 5737), nobody's
        ):
            with pytest.raises(UserError, match="the address must be free and this machine's"):
                listen(host, port)
    assert isinstance(taken, socket.socket)

import json
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pytest

from chatglm_ptuning.data.check import check_files, encoding_damage
from chatglm_ptuning.data.dataset import DataConfig
from chatglm_ptuning.data.reading import read_rows
from chatglm_ptuning.data.template import TEMPLATES
from chatglm_ptuning.errors import UserError
from tests.data.chat_tokenizers import TOKENIZERS

GOOD = [{"content": f"问题{n}", "summary": f"答案{n}"} for n in range(4)]


def write(tmp_path, lines, name="rows.jsonl"):
    file = tmp_path / name
    lines = [
        line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def check(paths, template=None, held_out=(), fix=None, **settings):
    findings = []
    chosen = (
        {}
        if template is None
        else {"template": TEMPLATES[template], "tokenizer": TOKENIZERS[template]}
    )
    result = check_files(
        paths, DataConfig(**settings), findings.append, held_out, fix=fix, **chosen
    )
    return result, [(f.source.rsplit("/", 1)[1], f.kind) for f in findings], findings


def test_a_clean_file_has_no_finding(tmp_path):
    result, found, _ = check([write(tmp_path, GOOD)], "chatglm")
    assert found == []
    assert result.is_clean
    assert (result.rows, result.good) == (4, 4)
    assert result.report.source_lengths.total() == 4


def test_every_kind_of_finding_has_its_place_and_is_counted(tmp_path):
    lines = [
        GOOD[0],
        '{"content": "x", ',
        {"content": "x"},
        {"content": 3, "summary": "x"},
        {"content": "x", "summary": " "},
        {"content": "", "summary": "x"},
        GOOD[0],
        {"content": "问", "summary": "浣犲ソ锛�"},
        {"content": "问" * 50, "summary": "答" * 50},
        {
            "messages": [
                {"role": "assistant", "content": "x"},
                {"role": "assistant", "content": "y"},
            ]
        },
        {"messages": [{"role": "user", "content": "x"}]},
        GOOD[1],
    ]
    fix = tmp_path / "fixed.jsonl"
    settings = {"max_source_length": 16, "max_target_length": 16, "fix": str(fix)}
    result, found, findings = check([write(tmp_path, lines)], "chatglm", **settings)
    assert found == [
        ("rows.jsonl:2", "unreadable"),
        ("rows.jsonl:3", "wrong columns"),
        ("rows.jsonl:4", "wrong columns"),
        ("rows.jsonl:5", "empty answer"),
        ("rows.jsonl:6", "empty question"),
        ("rows.jsonl:7", "duplicate"),
        ("rows.jsonl:8", "suspected encoding damage"),
        ("rows.jsonl:9", "prompt cut (right) to data.max_source_length=16"),
        ("rows.jsonl:9", "answer cut to data.max_target_length=16"),
        ("rows.jsonl:10", "wrong for the template"),
        ("rows.jsonl:11", "no answer"),
    ]
    assert (result.rows, result.good) == (12, 2)
    assert not result.is_clean
    assert result.findings.total() == len(found)
    assert (
        str(findings[5])
        == f"{findings[5].source}: a row must stand once, got the row of {tmp_path}/rows.jsonl:1"
    )
    assert str(findings[1]).count("rows.jsonl") == 1
    kept = [json.loads(line) for line in fix.read_text(encoding="utf-8").splitlines()]
    assert kept == [GOOD[0], lines[8], GOOD[1]]
    summary = result.summary(DataConfig(max_source_length=16, max_target_length=16))
    assert summary.startswith("2 of 12 rows without a finding\n  wrong columns: 2\n")
    assert "tokens against data.max_source_length=16: 1 of" in summary


def test_long_rows_are_not_good_where_they_would_be_dropped(tmp_path):
    fix = tmp_path / "fixed.jsonl"
    file = write(tmp_path, [{"content": "问" * 50, "summary": "答"}, GOOD[0]])
    _, found, _ = check([file], "chatglm", truncation="drop", max_source_length=16, fix=str(fix))
    assert found == [("rows.jsonl:1", "prompt over data.max_source_length=16")]
    assert fix.read_text(encoding="utf-8").splitlines() == [json.dumps(GOOD[0], ensure_ascii=False)]


def test_without_a_tokenizer_rows_are_checked_all_the_same(tmp_path):
    result, found, _ = check([write(tmp_path, [{"content": "x", "summary": ""}, GOOD[0]])])
    assert found == [("rows.jsonl:1", "empty answer")]
    assert result.summary(DataConfig()) == "1 of 2 rows without a finding\n  empty answer: 1"


def test_questions_of_train_in_held_out_rows_are_found(tmp_path):
    train = write(tmp_path, GOOD, "train.jsonl")
    same_question = {"content": GOOD[2]["content"], "summary": "别的"}
    new = {"content": "新", "summary": "新"}
    test = write(tmp_path, [GOOD[1], same_question, new, new], "test.jsonl")
    fix = tmp_path / "fixed.jsonl"
    result, found, findings = check([train], held_out=[test], fix=str(fix))
    assert found == [
        ("test.jsonl:1", "question of train"),
        ("test.jsonl:2", "question of train"),
        ("test.jsonl:4", "duplicate"),
    ]
    assert findings[1].reason.endswith("train.jsonl:3")
    assert result.rows == 8
    assert len(fix.read_text(encoding="utf-8").splitlines()) == 4


def test_a_file_given_twice_is_found_row_by_row(tmp_path):
    file = write(tmp_path, GOOD)
    assert check([file], held_out=[file])[1] == [
        (f"rows.jsonl:{n}", "question of train") for n in range(1, 5)
    ]
    assert check([file, file])[1] == [(f"rows.jsonl:{n}", "duplicate") for n in range(1, 5)]


def test_a_file_that_cannot_be_read_on_does_not_stop_the_check(tmp_path):
    broken = tmp_path / "a.json"
    broken.write_bytes(json.dumps(GOOD, ensure_ascii=False, indent=1).encode("gb18030"))
    empty = write(tmp_path, [], "b.jsonl")
    result, found, findings = check([str(broken), empty, write(tmp_path, GOOD)])
    assert found == [("a.json:3", "unreadable"), ("b.jsonl", "unreadable")]
    assert "set data.encoding=gb18030" in findings[0].reason
    assert (result.rows, result.good) == (6, 4)


def test_fix_must_be_a_new_file(tmp_path):
    file = write(tmp_path, GOOD)
    with pytest.raises(UserError, match="--fix must name a new file"):
        check([file], fix=str(Path(file).parent / "." / "rows.jsonl"))
    assert len(Path(file).read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows.csv", "must name a file of JSON lines, got '.*rows.csv'; call it .jsonl"),
        ("rows.jsonl.gz", "must name a file of JSON lines"),
        ("nowhere/rows.jsonl", "must name a file that can be written, got .*: No such file"),
        (".", "must name a file that can be written, got .*: Is a directory"),
    ],
)
def test_fix_must_be_writable_and_json_lines(tmp_path, name, message):
    with pytest.raises(UserError, match=f"--fix {message}"):
        check([write(tmp_path, GOOD)], fix=str(tmp_path / name))


def test_columns_that_json_cannot_hold_do_not_keep_a_row_from_being_written(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    dated = [GOOD[0] | {"when": datetime(2026, 1, 2), "price": Decimal("1.50"), "raw": b"\xff"}]
    parquet.write_table(pyarrow.Table.from_pylist(dated), tmp_path / "rows.parquet")
    half = write(tmp_path, [json.dumps(GOOD[1] | {"note": "\ud800"})])
    fix = str(tmp_path / "fixed.jsonl")
    check([str(tmp_path / "rows.parquet"), half], fix=fix)
    first, second = [row.value for row in read_rows(fix)]
    assert first == GOOD[0] | {"when": "2026-01-02 00:00:00", "price": "1.50", "raw": "b'\\xff'"}
    assert second == GOOD[1] | {"note": "\ud800"}


@pytest.mark.parametrize(
    "text",
    [
        "你好，世界！",
        "plain\ttext\n",
        "café Größe naïve él",
        "🚀😶‍🌫️ é",
        "ÅÄÖ",
        "中",
        "第一",
        "日本語テキスト",
        "Привет, мир",
    ],
)
def test_sound_text_is_not_suspected(text):
    assert encoding_damage(text) is None


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        ("a\x00b", "control character"),
        ("好\ufffd", "bytes were no text"),
        ("锟斤拷", "bytes were no text"),
        ("你好，世界".encode().decode("gb18030", errors="replace"), ""),
        ("你好吗".encode().decode("gb18030", errors="ignore"), None),
        ("今天天气".encode().decode("gb18030"), "which is '今天天气' in UTF-8 read as gb18030"),
        ("Größe é".encode().decode("cp1252"), "which is 'Größe é' in UTF-8 read as cp1252"),
        ("说明: 你好世界".encode("gbk").decode("latin-1"), "in GBK read as latin-1"),
    ],
)
def test_damaged_text_is_suspected(text, sign):
    found = encoding_damage(text)
    if sign is not None:
        assert found is not None
        assert sign in found

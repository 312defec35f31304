import json

import pytest

from chatglm_ptuning.data.reading import read_rows
from chatglm_ptuning.data.rows import BadRow, Row
from chatglm_ptuning.errors import UserError

ROWS = [
    {"content": "甲{}[],", "summary": "乙\n"},
    {"content": "丙", "summary": "\u2028"},
    {"content": "", "summary": ""},
]
FORMS = {
    "lines": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "lines with blank ones": "\n\n".join(json.dumps(row) for row in ROWS) + "\n\n",
    "array": json.dumps(ROWS),
    "pretty array": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "pretty objects": "\n".join(json.dumps(row, indent=4) for row in ROWS),
    "Windows lines": "\r\n".join(json.dumps(row) for row in ROWS),
}
LINES = {
    "lines": [1, 2, 3], "lines with blank ones": [1, 3, 5], "array": [1, 1, 1], "pretty array": [2, 6, 10],
    "pretty objects": [1, 5, 9], "Windows lines": [1, 2, 3],
}  # fmt: skip


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["no mark", "mark"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_rows_with_their_lines(tmp_path, form, mark):
    file = tmp_path / "rows.json"
    file.write_bytes(mark + FORMS[form].encode())
    expected = [Row(f"{file}:{line}", row) for line, row in zip(LINES[form], ROWS, strict=True)]
    assert list(read_rows(str(file))) == expected


def bad(tmp_path, content, encoding="utf-8"):
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    rows = list(read_rows(str(file), encoding))
    return [
        (row.source.rsplit(":", 1)[1], row.reason) if isinstance(row, BadRow) else row.value
        for row in rows
    ]


def test_a_broken_line_is_reported_and_the_next_ones_are_read(tmp_path):
    assert bad(tmp_path, b'{"a": 1}\n{"a": 2\n\n{"a": 3}\n') == [
        {"a": 1},
        ("2", "a row must be valid JSON, got \"Expecting ',' delimiter\" at column 8"),
        {"a": 3},
    ]


def test_a_broken_first_line_does_not_hide_the_others(tmp_path):
    first, *others = bad(tmp_path, b'{"a": 1\n{"a": 2}\n{"a": 3}\n')
    assert first[0] == "1"
    assert "valid JSON" in first[1]
    assert others == [{"a": 2}, {"a": 3}]


def test_a_broken_row_of_an_array_does_not_hide_the_others(tmp_path):
    text = json.dumps(
        [{"a": 1, "b": {"c": 0}}, {"a": 2, "b": {"c": 0}}, {"a": 3, "b": {"c": 0}}], indent=1
    )
    first, second, third = bad(tmp_path, text.replace('"a": 2,', '"a": 2').encode())
    assert first["a"] == 1
    assert second[0] == "8"
    assert "Expecting ',' delimiter" in second[1]
    assert "line 10, column" in second[1]
    assert third["a"] == 3


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'[{"a": 1}', [("1", "valid JSON")]),
        (b'[{"a": 1}\n{"a": 2}]', [("1", "after a row"), {"a": 2}]),
        (b'[{"a": 1}] x', [{"a": 1}, ("1", "Extra text after the array")]),
        (b'[{"a": 1},\n', [{"a": 1}, ("1", "the end of the file")]),
        (b'{"a": 1} {"a": 2} x', [{"a": 1}, {"a": 2}, ("1", "valid JSON")]),
    ],
)
def test_a_document_that_is_not_whole_is_reported(tmp_path, content, found):
    rows = bad(tmp_path, content)
    assert len(rows) == len(found)
    for row, expected in zip(rows, found, strict=True):
        if isinstance(expected, tuple):
            assert row[0] == expected[0]
            assert expected[1] in row[1]
        else:
            assert row == expected


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf", b"[]", b"[ ]\n"])
def test_an_empty_file_is_one_sentence(tmp_path, content):
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"rows\.json: a data file must hold at least one row"):
        list(read_rows(str(file)))


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="must exist, got path="):
        list(read_rows(str(tmp_path / "nowhere.json")))


def test_gbk_is_named_and_read_when_asked_for(tmp_path):
    content = '{"a": "中文"}\n{"a": "汉字誠"}\n'.encode("gb18030")
    found = bad(tmp_path, content)
    assert [row[0] for row in found] == ["1", "2"]
    assert all("GBK/GB18030; set data.encoding=gb18030" in row[1] for row in found)
    assert bad(tmp_path, content, "gb18030") == [{"a": "中文"}, {"a": "汉字誠"}]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_utf_16_is_named(tmp_path, encoding):
    content = json.dumps({"a": "中文"}, ensure_ascii=False).encode(encoding)
    with pytest.raises(UserError, match="in what looks like UTF-16; save the file again as UTF-8"):
        bad(tmp_path, content)


def test_a_key_that_hides_another_is_reported(tmp_path):
    found = bad(tmp_path, b'{"a": 1, "b": 2, "a": 3}\n{"a": {"c": 1, "c": 1}}\n{"a": 1}\n')
    reasons = [
        f"a row must be valid JSON, got key {key!r} more than once in an object" for key in "ac"
    ]
    assert found == [("1", reasons[0]), ("2", reasons[1]), {"a": 1}]
    first, second = bad(tmp_path, b'[\n {"a": 1, "a": 2},\n {"a": 3}\n]')
    assert first == ("2", reasons[0])
    assert second == {"a": 3}


def test_deep_nesting_and_long_numbers_are_bad_rows(tmp_path):
    found = bad(tmp_path, b'{"a": 1}\n' + b"[" * 100_000 + b"\n" + b"9" * 5000 + b"\n")
    assert [row[0] for row in found if isinstance(row, tuple)] == ["2", "3"]

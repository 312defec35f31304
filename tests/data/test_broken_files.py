"""Files broken in every way: no crash, and every row is either used or reported."""

import csv
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatglm_ptuning.data.check import check_files
from chatglm_ptuning.data.dataset import DataConfig, encode_dataset, load_conversations
from chatglm_ptuning.data.reading import read_rows
from chatglm_ptuning.data.rows import BadRow
from chatglm_ptuning.data.template import TEMPLATES
from chatglm_ptuning.errors import UserError
from tests.data.chat_tokenizers import TOKENIZERS

quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = [
    "content",
    "summary",
    "prompt",
    "response",
    "history",
    "instruction",
    "input",
    "output",
    "system",
    "tools",
]
KEYS = [
    "role",
    "from",
    "content",
    "value",
    "loss",
    "metadata",
    "tool_calls",
    "name",
    "parameters",
    "observation",
]
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "gpt", "human", "function_call"])
MESSAGES = st.fixed_dictionaries(
    {},
    optional={key: ROLES | JSON_VALUES if key in ("role", "from") else JSON_VALUES for key in KEYS},
)
ROWS = st.fixed_dictionaries(
    {},
    optional={name: st.text(max_size=8) | JSON_VALUES for name in NAMES}
    | {
        name: JSON_VALUES | st.lists(MESSAGES, max_size=4) for name in ("messages", "conversations")
    },
)


def outcome(file, template, config):
    """Read, recognise and encode as a training run does: the report, or the sentence that stops it."""
    try:
        conversations = load_conversations(str(file), config)
        _, report = encode_dataset(conversations, TEMPLATES[template], TOKENIZERS[template], config)
    except UserError as error:
        return str(error)
    assert (
        report.rows
        == len(conversations)
        == report.used + sum(tally.rows for tally in report.skipped.values())
    )
    return report


def checked(file, template, config):
    """Check the file: every row is good or has a finding of its own."""
    sources, fixed = set(), file.with_suffix(".fixed")
    result = check_files(
        [str(file)], config, lambda finding: sources.add(finding.source), (),
        TEMPLATES[template], TOKENIZERS[template], str(fixed),
    )  # fmt: skip
    assert result.rows - result.good >= len(sources)
    assert (result.rows == result.good) == result.is_clean
    assert len(fixed.read_bytes().splitlines()) >= result.good
    return result


@quick
@given(st.binary(max_size=200), st.sampled_from([".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"]))
def test_bytes_of_any_kind(tmp_path, content, suffix):
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(content)
    outcome(file, "chatglm", DataConfig())
    checked(file, "chatglm", DataConfig())


@pytest.mark.parametrize("template", ["chatglm", "chatglm3"])
@quick
@given(rows=st.lists(ROWS, min_size=1, max_size=4), indent=st.sampled_from([None, 1]))
def test_json_of_any_shape(tmp_path, template, rows, indent):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows, indent=indent))
    config = DataConfig(max_source_length=8, max_target_length=4)
    assert len(list(read_rows(str(file)))) == len(rows)
    outcome(file, template, config)
    assert checked(file, template, config).rows == len(rows)


GOOD_LINES = [
    b'{"content": "a", "summary": "b"}',
    '{"content": "问", "summary": "答"}'.encode(),
    b'{"content": "a", "summary": ""}',
    b"[]",
    b"null",
]
BAD_LINES = [
    '{"content": "问", "summary": "答"}'.encode("gbk"),
    b'{"content": "a", "summ',
    b"{",
    b"}",
    b'"\xff"',
]
LINES = st.lists(st.sampled_from(GOOD_LINES + BAD_LINES), min_size=1, max_size=8)


@quick
@given(lines=LINES, newline=st.sampled_from([b"\n", b"\r\n", b"\n\n"]))
def test_every_json_line_is_a_row_or_reported(tmp_path, lines, newline):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"content": "a", "summary": "b"}' + newline + newline.join(lines))
    rows = list(read_rows(str(file)))
    assert len(rows) == 1 + len(lines)
    for row, line in zip(rows[1:], lines, strict=True):
        assert isinstance(row, BadRow) == (line not in GOOD_LINES)
    assert checked(file, "chatglm", DataConfig()).rows == len(rows)


FIELDS = st.lists(st.text('ab," \n\r汉', max_size=6), min_size=1, max_size=3)


@quick
@given(rows=st.lists(FIELDS, min_size=1, max_size=6), suffix=st.sampled_from([".csv", ".tsv"]))
def test_every_row_of_a_table_is_a_row_or_reported(tmp_path, rows, suffix):
    file = tmp_path / f"rows{suffix}"
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t" if suffix == ".tsv" else ",")
        writer.writerows([["content", "summary"], *rows])
    found = list(read_rows(str(file)))
    assert len(found) == len(rows)
    for row, fields in zip(found, rows, strict=True):
        if len(fields) == 2:
            assert row.value == {"content": fields[0], "summary": fields[1]}
        else:
            assert isinstance(row, BadRow)
    assert checked(file, "chatglm", DataConfig()).rows == len(rows)


@quick
@given(data=st.data(), indent=st.sampled_from([1, 4]), in_array=st.booleans())
def test_a_damaged_row_of_a_document_costs_no_other(tmp_path, data, indent, in_array):
    rows = [{"content": f"问{n}", "summary": "b", "history": [{"a": {"b": n}}]} for n in range(5)]
    texts = [json.dumps(row, indent=indent, ensure_ascii=False) for row in rows]
    hit = data.draw(st.integers(0, 4))
    place = data.draw(st.integers(0, len(texts[hit]) - 1))
    texts[hit] = (
        texts[hit][:place]
        + data.draw(st.sampled_from(["", "x", '"', "{", "}", "\n", "]"]))
        + texts[hit][place + 1 :]
    )
    file = tmp_path / "rows.json"
    file.write_text("[\n" * in_array + (",\n" if in_array else "\n").join(texts) + "\n]" * in_array)
    found = list(read_rows(str(file)))
    values = [row.value for row in found if not isinstance(row, BadRow)]
    lost = [row for number, row in enumerate(rows) if number != hit and row not in values]
    assert not lost or len(values) < len(found)


@pytest.mark.parametrize("cut", range(20, 60, 7))
def test_a_file_cut_off_anywhere_is_reported(tmp_path, cut):
    whole = gzip.compress(
        "".join(f'{{"content": "{n}", "summary": "{n * n}"}}\n' for n in range(99)).encode()
    )
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(whole[:cut])
    assert "whole and readable" in outcome(file, "chatglm", DataConfig())
    assert not checked(file, "chatglm", DataConfig()).is_clean
    assert Path(file).exists()

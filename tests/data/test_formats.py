import gzip
import json
import sys
import types

import pytest

from chatglm_ptuning.data.conversation import Conversation, Message, ToolCall
from chatglm_ptuning.data.dataset import DataConfig, encode_dataset, load_conversations
from chatglm_ptuning.data.formats import conversation_from_row
from chatglm_ptuning.data.reading import data_files, read_rows
from chatglm_ptuning.data.rows import BadRow, Row
from chatglm_ptuning.data.template import TEMPLATES
from chatglm_ptuning.errors import UserError
from tests.data.chat_tokenizers import TOKENIZERS

CALL = ToolCall("f", {"x": 1})
TOOLS = [{"name": "f"}]
USER, ANSWER = Message("user", "问"), Message("assistant", "答")
CALLED = (
    USER,
    Message("assistant", "", tool_calls=(CALL,)),
    Message("observation", "果"),
    ANSWER,
)
OPENAI_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CONVERSATIONS = {
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}], "system": "令"},
        Conversation((Message("system", "令"), USER, ANSWER)),
    ),
    "sharegpt with a call": (
        {
            "conversations": [
                {"from": "human", "value": "问"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "果"},
                {"from": "gpt", "value": "答"},
            ],
            "tools": json.dumps(TOOLS),
        },
        Conversation(CALLED, TOOLS),
    ),
    "chatglm3": (
        {
            "conversations": [
                {"role": "system", "content": "令"},
                {"role": "user", "content": "问"},
                {"role": "assistant", "content": "错", "loss": False},
                {"role": "user", "content": "问"},
                {"role": "assistant", "content": "答", "loss": True, "metadata": "m"},
            ]
        },
        Conversation(
            (
                Message("system", "令"),
                USER,
                Message("assistant", "错", loss=False),
                USER,
                Message("assistant", "答", loss=True, metadata="m"),
            )
        ),
    ),
    "chatglm3 with a call": (
        {
            "tools": TOOLS,
            "conversations": [
                {"role": "user", "content": "问"},
                {"role": "tool", "name": "f", "parameters": {"x": 1}, "observation": "果"},
                {"role": "assistant", "content": "答"},
            ],
        },
        Conversation(CALLED, TOOLS),
    ),
    "openai": (
        {
            "messages": [
                {"role": "developer", "content": "令"},
                {"role": "user", "content": [{"type": "text", "text": "问"}]},
                {"role": "assistant", "content": "答", "weight": 0},
            ]
        },
        Conversation((Message("system", "令"), USER, Message("assistant", "答", loss=False))),
    ),
    "openai with a call": (
        {
            "messages": [
                {"role": "user", "content": "问"},
                {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
                {"role": "tool", "tool_call_id": "1", "content": "果"},
                {"role": "assistant", "content": "答"},
            ],
            "tools": [{"type": "function", "function": TOOLS[0]}],
        },
        Conversation(CALLED, [{"type": "function", "function": TOOLS[0]}]),
    ),
    "history of messages": (
        {
            "prompt": "问",
            "response": "答",
            "history": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}],
        },
        Conversation((USER, ANSWER, USER, ANSWER)),
    ),
    "lists as JSON": (
        {"prompt": "问", "response": "答", "history": '[["问", "答"]]'},
        Conversation((USER, ANSWER, USER, ANSWER)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_are_recognised_and_train(name):
    row, expected = CONVERSATIONS[name]
    conversation = conversation_from_row(Row("", row), DataConfig())
    assert conversation == expected
    if "chatglm3" not in name and name != "openai":  # those two keep the loss flags of their files
        dataset, _ = encode_dataset(
            [conversation], TEMPLATES["chatglm3"], TOKENIZERS["chatglm3"], DataConfig()
        )
        assert len(dataset) == 1


def test_a_named_column_of_messages():
    row = {
        "chat": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}],
        "messages": 3,
    }
    conversation = conversation_from_row(Row("", row), DataConfig(messages_column="chat"))
    assert conversation.messages == (USER, ANSWER)


WRONG_ROWS = [
    ({"messages": 3}, "column 'messages' must be a list of messages, got 3"),
    ({"messages": "x"}, "column 'messages' must be valid JSON where it is a text, got 'x'"),
    (
        {"messages": [], "tools": "x"},
        "column 'tools' must be valid JSON where it is a text, got 'x'",
    ),
    ({"messages": [], "tools": 3}, "column 'tools' must be a list, got 3"),
    ({"messages": [], "system": 3}, "column 'system' must be a text, got 3"),
]
WRONG_MESSAGES = [
    ("x", "message 1 of column 'messages' must be an object, got 'x'"),
    (
        {"role": "bot", "content": ""},
        "the role of message 1 of column 'messages' must be one of system,",
    ),
    ({"content": ""}, "the role of message 1 of column 'messages' must be one of system,"),
    ({"role": ["user"], "content": ""}, "got ['user']"),
    (
        {"role": "user"},
        "message 1 of column 'messages' must have 'content' or 'value', got columns ['role']",
    ),
    ({"role": "user", "content": 1}, "message 1 of column 'messages' must be a text, got 1"),
    ({"role": "user", "content": [{"type": "image_url"}]}, "must hold text parts only"),
    (
        {"role": "assistant", "content": "", "loss": "yes"},
        "the loss of message 1 of column 'messages'",
    ),
    (
        {"role": "assistant", "tool_calls": 3},
        "the tool calls of message 1 of column 'messages' must be a list",
    ),
    (
        {"role": "assistant", "tool_calls": [3]},
        "a tool call of message 1 of column 'messages' must be an object",
    ),
    ({"role": "assistant", "tool_calls": [{"name": ""}]}, "must have a name, got ''"),
    (
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "["}]},
        "the arguments in message 1",
    ),
    (
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]},
        "must be an object, got [1]",
    ),
    (
        {"from": "function_call", "value": "f(x)"},
        "must be valid JSON where it is a text, got 'f(x)'",
    ),
]


@pytest.mark.parametrize(
    ("row", "message"), [*WRONG_ROWS, *(({"messages": [m]}, say) for m, say in WRONG_MESSAGES)]
)
def test_a_wrong_message_is_one_sentence(row, message):
    with pytest.raises(UserError) as error:
        conversation_from_row(Row("f:1", row), DataConfig())
    assert str(error.value).startswith("f:1: ")
    assert message in str(error.value)


ROWS = [{"content": "甲, \"乙\"\n丙", "summary": "丁"}, {"content": "戊", "summary": "己\t"}]  # fmt: skip


def csv_text(delimiter):
    lines = []
    for fields in [list(ROWS[0]), *(row.values() for row in ROWS)]:
        lines.append(delimiter.join('"' + field.replace('"', '""') + '"' for field in fields))
    return "\r\n".join(lines) + "\r\n"


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("rows.csv", csv_text(","), [2, 4]),
        ("rows.TSV", csv_text("\t"), [2, 4]),
        ("rows.jsonl", "\n".join(map(json.dumps, ROWS)), [1, 2]),
        ("rows.json", json.dumps(ROWS, indent=1), [2, 6]),
    ],
)
def test_files_give_their_rows(tmp_path, name, text, lines, mark, zipped):
    file = tmp_path / (name + ".gz" * zipped)
    content = mark + text.encode()
    file.write_bytes(gzip.compress(content) if zipped else content)
    assert list(read_rows(str(file))) == [
        Row(f"{file}:{line}", row) for line, row in zip(lines, ROWS, strict=True)
    ]


def test_parquet_gives_its_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = str(tmp_path / "rows.parquet")
    rows = [
        {"prompt": "问", "response": "答", "history": [["甲", "乙"]]},
        {"prompt": "问", "response": None, "history": []},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert list(read_rows(file)) == [Row(f"{file}:1", rows[0]), Row(f"{file}:2", rows[1])]
    assert len(load_conversations(file, DataConfig())[0].messages) == 4
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"text\.parquet: a \.parquet file must be Parquet"):
        list(read_rows(str(tmp_path / "text.parquet")))


def rows_of(tmp_path, name, content, encoding="utf-8"):
    file = tmp_path / name
    file.write_bytes(content)
    rows = list(read_rows(str(file), encoding))
    return [
        (row.source.rsplit(":", 1)[1], row.reason) if isinstance(row, BadRow) else row.value
        for row in rows
    ]


def test_a_csv_row_of_another_width_is_reported(tmp_path):
    assert rows_of(tmp_path, "a.csv", b"a,b\n1,2\n\n3\n4,5,6\n7,8\n") == [
        {"a": "1", "b": "2"},
        ("4", "a row must have 2 fields as the header has, got 1"),
        ("5", "a row must have 2 fields as the header has, got 3"),
        {"a": "7", "b": "8"},
    ]


def test_a_quote_that_never_closes_is_reported_where_it_opens(tmp_path):
    first, second = rows_of(tmp_path, "a.csv", b'a,b\n1,2\n3,"4\n5,6\n')
    assert first == {"a": "1", "b": "2"}
    assert second[0] == "3"
    assert "valid CSV" in second[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "a.csv: a data file must hold at least one row"),
        ("a.csv", b"a,b\n", "a.csv: a data file must hold at least one row"),
        ("a.csv", b"a,a\n1,2\n", "a.csv:1: the columns must have different names, got ['a', 'a']"),
        (
            "a.csv",
            "a,b\n1,汉字\n".encode("gb18030"),
            "a.csv:2: text must be utf-8, got byte 0xba that looks like GBK",
        ),
        ("a.jsonl.gz", b"not zipped", "a.jsonl.gz: a data file must be whole and readable"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}\n' * 999)[:-9],
            "a.jsonl.gz: a data file must be whole and readable",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, name, content, message):
    with pytest.raises(UserError) as error:
        rows_of(tmp_path, name, content)
    assert message in str(error.value)


def test_gbk_csv_is_read_when_asked_for(tmp_path):
    assert rows_of(tmp_path, "a.csv", "a,b\n1,汉字\n".encode("gbk"), "gb18030") == [
        {"a": "1", "b": "汉字"}
    ]


def test_a_folder_stands_for_its_data_files(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.csv.gz", "notes.txt"):
        (tmp_path / name).write_text("")
    assert data_files(str(tmp_path)) == [str(tmp_path / "a.csv.gz"), str(tmp_path / "b.jsonl")]
    assert data_files([str(tmp_path / "b.jsonl"), "hf:owner/name"]) == [
        str(tmp_path / "b.jsonl"),
        "hf:owner/name",
    ]
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_files("~/b.jsonl") == [str(tmp_path / "b.jsonl")]
    (tmp_path / "folder.json").mkdir()
    assert len(data_files(str(tmp_path))) == 2
    with pytest.raises(UserError, match="a data folder must hold"):
        data_files(str(tmp_path / "empty"))


def test_keys_that_are_null_are_as_good_as_absent(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = str(tmp_path / "rows.parquet")
    messages = [
        {"from": "human", "value": "问"},
        {"role": "assistant", "tool_calls": [{"name": "f", "parameters": '{"x": 1}'}]},
        {"role": "tool", "content": "果"},
        {"role": "assistant", "content": "答", "weight": 0},
    ]
    text = pyarrow.string()
    call = pyarrow.struct([(key, text) for key in ("name", "arguments", "parameters")])
    keys = [(key, text) for key in ("from", "value", "role", "content")]
    keys += [
        ("tool_calls", pyarrow.list_(call)),
        ("loss", pyarrow.int8()),
        ("weight", pyarrow.int8()),
    ]
    schema = pyarrow.schema([("messages", pyarrow.list_(pyarrow.struct(keys)))])
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}], schema=schema), file)
    (conversation,) = load_conversations(file, DataConfig())
    assert conversation.messages == (*CALLED[:3], Message("assistant", "答", loss=False))


def test_a_hub_data_set_is_read_by_name(monkeypatch):
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        if name == "owner/gone":
            raise ValueError("no such thing\nat all")
        return iter(ROWS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert list(read_rows("hf:owner/name/validation")) == [
        Row("hf:owner/name/validation:1", ROWS[0]),
        Row("hf:owner/name/validation:2", ROWS[1]),
    ]
    with pytest.raises(
        UserError,
        match=r"^hf:owner/gone must be a data set that can be opened from here, got no such thing$",
    ):
        list(read_rows("hf:owner/gone"))
    with pytest.raises(UserError, match=r"must be named hf:owner/name, got 'hf:name'$"):
        list(read_rows("hf:name"))
    assert asked == [("owner/name", "validation", True), ("owner/gone", "train", True)]

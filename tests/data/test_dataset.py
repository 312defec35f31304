import json

import pytest

from chatglm_ptuning.data.conversation import Conversation, Message, ToolCall
from chatglm_ptuning.data.dataset import (
    DataConfig,
    encode_dataset,
    encode_prompts,
    load_conversations,
)
from chatglm_ptuning.data.template import TEMPLATES
from chatglm_ptuning.errors import UserError
from tests.data.chat_tokenizers import TOKENIZERS

TOKENIZER = TOKENIZERS["chatglm"]
TEMPLATE = TEMPLATES["chatglm"]
GMASK, SOP, EOP = TOKENIZER.convert_tokens_to_ids(["[gMASK]", "<sop>", "<eop>"])
LONG = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"


def ids(text):
    return TOKENIZER.encode_ordinary(text)


def single(question, answer, source="rows.json:1"):
    return Conversation((Message("user", question), Message("assistant", answer)), source=source)


def write(tmp_path, rows, name="rows.jsonl"):
    file = tmp_path / name
    file.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    return str(file)


@pytest.mark.parametrize(
    ("row", "config", "texts"),
    [
        ({"content": "问", "summary": "答"}, {}, ["问", "答"]),
        ({"prompt": "问", "response": "答"}, {}, ["问", "答"]),
        (
            {"prompt": "问", "response": "答", "history": [["甲", "乙"]]},
            {},
            ["甲", "乙", "问", "答"],
        ),
        ({"instruction": "问", "output": "答"}, {}, ["问", "答"]),
        ({"instruction": "问", "input": "文", "output": "答"}, {}, ["问\n文", "答"]),
        ({"instruction": "问", "input": "", "output": "答", "history": []}, {}, ["问", "答"]),
        ({"instruction": "问", "input": None, "output": "答", "history": None}, {}, ["问", "答"]),
        (
            {"instruction": "问", "input": "文", "output": "答", "system": "令"},
            {},
            ["令", "问\n文", "答"],
        ),
        (
            {"q": "问", "a": "答", "summary": 1},
            {"prompt_column": "q", "response_column": "a"},
            ["问", "答"],
        ),
        (
            {"q": "问", "a": "答", "h": [["甲", "乙"], ["丙", "丁"]]},
            {"prompt_column": "q", "response_column": "a", "history_column": "h"},
            ["甲", "乙", "丙", "丁", "问", "答"],
        ),
    ],
)
def test_layouts_are_recognised(tmp_path, row, config, texts):
    (conversation,) = load_conversations(write(tmp_path, [row]), DataConfig(**config))
    assert [message.content for message in conversation.messages] == texts
    roles = ["user", "assistant"] * (len(texts) // 2)
    assert [message.role for message in conversation.messages] == ["system"] * (
        len(texts) % 2
    ) + roles


@pytest.mark.parametrize(
    ("row", "config", "message"),
    [
        ("text", {}, "must be a JSON object, got 'text'"),
        ({"content": "问"}, {}, "must have column 'summary', got columns ['content']"),
        ({"response": "问"}, {}, "must have column 'prompt'"),
        ({"a": 1}, {}, "columns of a known layout, got columns ['a']; set data.prompt_column"),
        ({"content": 3, "summary": "答"}, {}, "column 'content' must be a text, got 3"),
        ({"content": "\ud800", "summary": "答"}, {}, "column 'content' must be valid Unicode"),
        ({"prompt": "", "response": "", "history": "x"}, {}, "column 'history' must be valid JSON where it is a"),
        ({"prompt": "", "response": "", "history": [["x"]]}, {}, "turn 1 of column 'history' must be [question"),
        ({"q": "x"}, {"prompt_column": "q", "response_column": "a"}, "must have column 'a', got columns ['q']"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_one_sentence_with_file_and_line(tmp_path, row, config, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        json.dumps({"q": "", "a": "", "content": "", "summary": ""}) + "\n" + json.dumps(row)
    )
    with pytest.raises(UserError) as error:
        load_conversations(str(file), DataConfig(**config))
    assert str(error.value).startswith(f"{file}:2: ")
    assert message in str(error.value)


def test_a_broken_line_stops_training_with_file_and_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"content": "a", "summary": "b"}\n{"content": "a", "summary": \n')
    with pytest.raises(
        UserError, match=r"rows\.jsonl:2: a row must be valid JSON, got 'Expecting value'"
    ):
        load_conversations(str(file), DataConfig())


def test_several_files_and_a_limit(tmp_path):
    rows = [{"content": str(i), "summary": "x"} for i in range(3)]
    files = [write(tmp_path, rows, "a.json"), write(tmp_path, rows, "b.json")]
    assert len(load_conversations(files, DataConfig())) == 6
    assert [c.source for c in load_conversations(files, DataConfig(), 4)][-1] == f"{files[1]}:1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_source_length": 0}, "data.max_source_length must be at least 8 tokens, got 0"),
        ({"max_target_length": 2}, "data.max_target_length must be at least 3 tokens, got 2"),
        (
            {"truncation": "both"},
            "data.truncation must be one of left, right, middle, drop, got 'both'",
        ),
        ({"loss_on": "some"}, "data.loss_on must be one of all, last, got 'some'"),
        ({"max_train_samples": 0}, "data.max_train_samples must be at least 1 row, got 0"),
        (
            {"encoding": "utf-16"},
            "data.encoding must name an encoding like utf-8 or gb18030, got 'utf-16'",
        ),
        ({"encoding": "klingon"}, "data.encoding must name"),
        (
            {"prompt_column": "q"},
            "data.prompt_column and data.response_column must be given together",
        ),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UserError) as error:
        DataConfig(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize("truncation", ["right", "left", "middle"])
def test_a_long_row_has_the_released_sizes_and_keeps_its_end(truncation):
    config = DataConfig(max_source_length=16, max_target_length=8, truncation=truncation)
    dataset, report = encode_dataset([single(LONG, LONG[::-1])], TEMPLATE, TOKENIZER, config)
    source, target = ids(LONG), ids(LONG[::-1])
    kept = {"right": source[:15], "left": source[-15:], "middle": source[:7] + source[-8:]}[
        truncation
    ]
    item = dataset[0]
    assert item["input_ids"] == [*kept, GMASK, SOP, *target[:6], EOP]
    assert item["labels"] == [-100] * 16 + [SOP, *target[:6], EOP]
    assert (
        report.changed[f"prompt cut ({truncation}) to data.max_source_length=16"].tokens
        == len(source) - 15
    )
    assert report.changed["answer cut to data.max_target_length=8"].tokens == len(target) - 6
    prompts, _ = encode_prompts([single(LONG, LONG[::-1])], TEMPLATE, TOKENIZER, config)
    assert prompts[0].input_ids == [*kept, GMASK, SOP]
    assert prompts[0].reference == LONG[::-1]


def test_a_row_at_the_limits_stays_whole():
    source, target = ids(LONG), ids("好的")
    config = DataConfig(max_source_length=len(source) + 1, max_target_length=len(target) + 2)
    dataset, report = encode_dataset([single(LONG, "好的")], TEMPLATE, TOKENIZER, config)
    assert dataset[0]["input_ids"] == [*source, GMASK, SOP, *target, EOP]
    assert report.changed == {}


def test_oldest_turns_go_whole_before_anything_is_cut():
    messages = [
        Message("user", "一"),
        Message("assistant", LONG),
        Message("user", "二"),
        Message("assistant", "三"),
    ]
    conversation = Conversation(
        (*messages, Message("user", "四"), Message("assistant", "五")), source="f:9"
    )
    prompt = ids("[Round 0]\n问：二\n答：三\n[Round 1]\n问：四\n答：")
    config = DataConfig(max_source_length=len(prompt) + 1)
    dataset, report = encode_dataset([conversation], TEMPLATE, TOKENIZER, config)
    assert dataset[0]["input_ids"] == [*prompt, GMASK, SOP, *ids("五"), EOP]
    (rule,) = report.changed
    assert rule == f"oldest turns dropped to fit data.max_source_length={len(prompt) + 1}"
    assert report.changed[rule].first == "f:9"
    (served,), _ = encode_prompts([conversation], TEMPLATE, TOKENIZER, config)
    assert served.input_ids == [*prompt, GMASK, SOP]
    assert served.text == "四"


def test_drop_leaves_long_rows_out_and_says_so():
    rows = [single(LONG, "好", "f:1"), single("好", LONG, "f:2"), single("好", "好", "f:3")]
    config = DataConfig(max_source_length=10, max_target_length=10, truncation="drop")
    dataset, report = encode_dataset(rows, TEMPLATE, TOKENIZER, config)
    assert len(dataset) == report.used == 1
    assert str(report).splitlines() == [
        "1 of 3 rows used",
        "  skipped, prompt over data.max_source_length=10: 1 row (first: f:1)",
        "  skipped, answer over data.max_target_length=10: 1 row (first: f:2)",
    ]


def test_rows_without_question_or_answer_are_counted():
    user, reply = Message("user", "问"), Message("assistant", "答")
    rows = [
        Conversation((user,), source="f:1"),
        single("问", " \n", "f:2"),
        single("", "答", "f:3"),
        Conversation((reply,), source="f:4"),
        Conversation((user, Message("assistant", "答", loss=False)), source="f:5"),
        Conversation((user, reply, user), source="f:6"),
    ]
    dataset, report = encode_dataset(rows, TEMPLATE, TOKENIZER, DataConfig())
    assert {rule: (tally.rows, tally.first) for rule, tally in report.skipped.items()} == {
        "no answer": (1, "f:1"),
        "empty answer": (1, "f:2"),
        "empty question": (2, "f:3"),
        "nothing in it to learn": (1, "f:5"),
    }
    assert list(report.changed) == ["messages after the last answer left out"]
    assert report.rows == report.used + 5 == 6
    assert dataset[-1]["input_ids"] == [*ids("问"), GMASK, SOP, *ids("答"), EOP]


def test_the_reference_of_a_tool_call_is_the_call():
    call = ToolCall("f", {"x": 1})
    answers = [
        Message("assistant", "看", tool_calls=(call,)),
        Message("assistant", "```python\ntool_call(x=1)\n```", metadata="f"),
    ]
    rows = [Conversation((Message("user", "问"), answer)) for answer in answers]
    name = "chatglm3"
    prompts, _ = encode_prompts(rows, TEMPLATES[name], TOKENIZERS[name], DataConfig())
    texts = ["看\nf\n```python\ntool_call(x=1)\n```", "f\n```python\ntool_call(x=1)\n```"]
    assert [prompt.reference for prompt in prompts] == texts
    assert TEMPLATES[name].answer_text(TEMPLATES[name].parse_response(texts[1])) == texts[1]


def test_no_usable_row_is_an_error():
    with pytest.raises(
        UserError, match=r"at least one usable row, got none of 1 \(empty answer: 1\)"
    ):
        encode_dataset([single("问", "")], TEMPLATE, TOKENIZER, DataConfig())


def test_a_conversation_that_the_template_cannot_hold_names_its_place():
    conversation = Conversation(
        (Message("observation", "x"), Message("assistant", "答")), source="f:7"
    )
    for encode in (encode_dataset, encode_prompts):
        with pytest.raises(
            UserError, match=r"^f:7: template chatglm must be given user and assistant"
        ):
            encode([conversation], TEMPLATE, TOKENIZER, DataConfig())


def test_dataset_is_a_sequence_with_lengths():
    dataset, _ = encode_dataset(
        [single("一", "二"), single("一二三", "四")], TEMPLATE, TOKENIZER, DataConfig()
    )
    assert dataset.lengths == [len(dataset[0]["input_ids"]), len(dataset[1]["labels"])]
    assert dataset[-1] == dataset[1]
    with pytest.raises(IndexError):
        dataset[2]

import asyncio
import json

import pytest

from chatglm_ptuning.data.conversation import Message, ToolCall
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.serving import web, web_chat
from chatglm_ptuning.serving.answer import Update
from chatglm_ptuning.serving.engine import BusyError
from chatglm_ptuning.serving.limits import Limits
from chatglm_ptuning.serving.opening import DEMO_MODEL
from chatglm_ptuning.serving.web_page import WebPage
from chatglm_ptuning.serving.web_run import Run, read_run, run_html
from chatglm_ptuning.serving.web_text import TEXTS

HELLO = [Message("user", "你好"), Message("assistant", "好")]
CALL = Message("assistant", "", tool_calls=(ToolCall("weather", {"city": "北京"}),))


def test_texts_have_the_same_keys_and_fields():
    zh, en = TEXTS["zh"], TEXTS["en"]
    assert zh.keys() == en.keys()
    for key in zh:
        assert sorted(set(zh[key]) & set("{}")) == sorted(set(en[key]) & set("{}")), key


def test_next_message_is_the_tools_result_after_a_call():
    assert web_chat.ask([], "一")[-1].role == "user"
    assert web_chat.ask(HELLO, "二")[-1].role == "user"
    assert web_chat.ask([Message("user", "天气"), CALL], "晴")[-1].role == "observation"


def test_question_of_an_answer():
    messages = [*HELLO, Message("user", "二"), Message("assistant", "2")]
    assert [web_chat.question_at(messages, i) for i in range(4)] == [0, 0, 2, 2]


def test_earlier_turns_are_left_out_but_not_a_tools_question():
    messages = [*HELLO, Message("user", "天气"), CALL, Message("observation", "晴")]
    system = Message("system", "答")
    assert web_chat.to_encode(messages, " 答 ", True) == [system, *messages]
    assert web_chat.to_encode(messages, "", False) == messages[2:]


def test_users_text_is_kept_from_markdown():
    text = "类型#椅子*材质#藤编\n# a\n1. c <b>"
    assert web_chat.escape_markdown(text) == ("类型#椅子\\*材质#藤编\n\\# a\n1\\. c \\<b>")


def test_html_in_an_answer_is_text_but_code_stays_code():
    text = "<img src=x>\n```html\n<p>&amp;</p>\n```\n`a<b` <i>"
    assert web_chat.answer_markdown(Message("assistant", text), "en") == (
        "&lt;img src=x>\n```html\n<p>&amp;</p>\n```\n`a<b` &lt;i>"
    )


def test_code_that_still_comes_is_code():
    message = Message("assistant", "<x>\n```\n<p>")
    assert web_chat.answer_markdown(message, "en") == "&lt;x>\n```\n<p>"


def test_tool_calls_and_empty_answers_are_shown():
    assert "`weather`" in web_chat.answer_markdown(CALL, "zh")
    assert '"city": "北京"' in web_chat.answer_markdown(CALL, "zh")
    assert "an empty answer" in web_chat.answer_markdown(Message("assistant", ""), "en")


def test_tools_are_a_list_of_named_functions():
    assert web_chat.read_tools("  ") is None
    assert web_chat.read_tools('[{"name": "a"}]') == [{"name": "a"}]
    for text in ("{", "{}", "[1]", '[{"function": {}}]', "null"):
        with pytest.raises(web_chat.BadToolsError):
            web_chat.read_tools(text)


def test_seed_is_a_number_or_nothing():
    assert web_chat.read_seed("") is None
    assert web_chat.read_seed(" 0 ") == 0
    with pytest.raises(UserError, match="seed must be a whole number"):
        web_chat.read_seed("1.5")


def test_errors_are_told_in_the_pages_language():
    explain = web_chat.explain
    assert explain(BusyError("full"), "zh") == TEXTS["zh"]["busy"]
    assert "600" in explain(web_chat.PromptTooLongError(600, 511), "zh")
    assert explain(UserError("top_p must"), "en") == "Not sent: top_p must"


def test_progress_counts_and_names_the_reason():
    progress = web_chat.Progress(prompt_tokens=7)
    assert progress.text("en") == TEXTS["en"]["working"]
    progress.add(Update("a", 1))
    progress.add(Update("b", 2, "length"))
    assert progress.text("en").startswith("2 tokens")
    assert progress.text("en").endswith("longest answer reached")
    progress.add(Update("", 2, "error", error="out of memory"))
    assert progress.text("en") == "The answer broke off: out of memory"


@pytest.mark.parametrize(
    ("limits", "context", "limit"),
    [
        (Limits(max_prompt_tokens=300), 512, 300),
        (Limits(), 512, 511),
        (Limits(max_cached_tokens=228), 512, 99),
    ],
)
def test_answer_has_the_room_that_the_engine_has(bases, limits, context, limit):
    engine = bases["glm"].engine(limits=limits)
    engine._context = context
    assert web_chat.room(engine, [5] * 90, None, 5) == 5
    assert 1 <= web_chat.room(engine, [5] * limit, None, 2000) <= engine.limits.max_answer_tokens
    with pytest.raises(web_chat.PromptTooLongError) as error:
        web_chat.room(engine, [5] * (limit + 400), None, 5)
    assert (error.value.got, error.value.limit) == (limit + 400, limit)
    engine.close()


class OneAnswer:
    """Stands for an engine: tells two updates at once, and remembers what was cancelled."""

    def __init__(self, last):
        self.last, self.cancelled = last, 0

    def submit(self, ids, emit, sampling, adapter, tools):
        emit(Update(f"{adapter}", 1))
        if self.last:
            emit(Update("", 1, "stop"))
        return self

    def cancel(self):
        self.cancelled += 1


def test_two_answers_come_in_one_stream():
    async def read():
        requests = [web_chat.Request([1], None, name) for name in ("a", "b")]
        return [news async for news in web_chat.answers(OneAnswer(last=True), requests)]

    news = [pair for part in asyncio.run(read()) for pair in part]
    assert [(place, update.text) for place, update in news] == [
        (0, "a"),
        (0, ""),
        (1, "b"),
        (1, ""),
    ]


def test_closing_the_stream_cancels_the_answers():
    engine = OneAnswer(last=False)

    async def leave():
        stream = web_chat.answers(engine, [web_chat.Request([1], None, "a")] * 2)
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave())
    assert engine.cancelled == 2


def test_second_stop_finds_nothing_to_take_back():
    chat = web_chat.Chat([[Message("user", "一")], []])
    page = object.__new__(WebPage)
    assert page.stop(chat, "en")[-1]["value"] == "一"
    assert "value" not in page.stop(chat, "en")[-1]
    assert chat.sides == [[], []]


# ---- records


def test_records_of_a_run(tmp_path):
    row = {"index": 0, "prompt": "<b>", "reference": "r\u2028", "prediction": "p"}
    for name, answer in (("predictions", "p"), ("base_predictions", "q")):
        line = json.dumps(row | {"prediction": answer}, ensure_ascii=False)
        (tmp_path / f"{name}.jsonl").write_text(line + "\n", encoding="utf-8")
    scores = {"base": {"rouge-l": 50.0}, "tuned": {"rouge-l": 48.5}}
    (tmp_path / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    run = read_run(tmp_path)
    assert run.examples == ["<b>"]
    html = run_html(run, "en")
    assert "&lt;b&gt;" in html
    assert "<td>50.00</td><td>48.50</td><td>−1.50</td>" in html
    assert '<dd class="base">q</dd>' in html


def test_damaged_scores_are_named(tmp_path):
    (tmp_path / "scores.json").write_text('{"base": {"rouge-l"', encoding="utf-8")
    with pytest.raises(UserError, match=r"scores\.json must be JSON"):
        read_run(tmp_path)


def test_examples_come_from_the_data(tmp_path):
    data = tmp_path / "test.json"
    system, user = {"role": "system", "content": "令"}, {"role": "user", "content": "题"}
    rows = [{"content": "问", "summary": "答"}, {"messages": []}, {"messages": [system, user]}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = f"model: {{path: x}}\ndata: {{test_file: {data}}}\n"
    (tmp_path / "run_config.yaml").write_text(config, encoding="utf-8")
    run = read_run(tmp_path)
    assert run.examples == ["问", "题"]
    assert not run.has_turns


def test_pages_without_records(tmp_path):
    assert "train_ptuning.sh" in run_html(None, "zh")
    assert str(tmp_path) in run_html(Run(tmp_path), "en")


# ---- options


def test_password_may_hold_colons():
    assert web.parse_auth("u:p:q") == [("u", "p:q")]
    assert web.parse_auth(None) is None
    with pytest.raises(UserError, match="--auth must be USER:PASSWORD"):
        web.parse_auth("u:")


def test_paths_of_base_and_adapters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert web.choose_paths(None, None, []) == (DEMO_MODEL, {})
    trained = tmp_path / "outputs" / "ptuning"
    trained.mkdir(parents=True)
    base = {"base_model_name_or_path": str(DEMO_MODEL)}
    (trained / "adapter_config.json").write_text(json.dumps(base), encoding="utf-8")
    path, adapters = web.choose_paths(None, None, [])
    assert (path, list(adapters)) == (DEMO_MODEL, ["ptuning"])
    assert web.choose_paths(str(trained), None, [])[0] == DEMO_MODEL
    assert list(web.choose_paths("m", "a/v1.0", ["b=c"])[1]) == ["v1_0", "b"]
    with pytest.raises(UserError, match="name the base with --model"):
        web.choose_paths(None, "nowhere", [])
    with pytest.raises(UserError, match="an adapter must be given as NAME=DIR, got 'nowhere'"):
        web.choose_paths(None, None, ["nowhere"])

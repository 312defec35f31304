import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatglm_ptuning.data.conversation import Conversation, Message, ToolCall
from chatglm_ptuning.data.template import TEMPLATES
from chatglm_ptuning.errors import UserError
from tests.data.chat_tokenizers import TOKENIZERS, golden

TOOLS = [
    {
        "name": "get_weather",
        "description": "查询天气",
        "parameters": {
            "type": "object",
            "properties": {"city": {"description": "城市名"}},
            "required": ["city"],
        },
    }
]
V1, V2, V3 = (golden(f"tokenizer_v{version}.json") for version in (1, 2, 3))


def messages_of(history, query):
    """[[question, answer], ...] and a question as messages."""
    messages = []
    for question, answer in history:
        messages += [Message("user", question), Message("assistant", answer)]
    return [*messages, Message("user", query)]


@pytest.mark.parametrize("case", V1["chat"])
def test_chatglm_prompt_has_the_released_ids(case):
    messages = messages_of(case["history"], case["query"])
    ids = TEMPLATES["chatglm"].encode_prompt(TOKENIZERS["chatglm"], messages)
    assert ids == case["generate_kwargs"]["input_ids"][0]


@pytest.mark.parametrize("case", V2["chat"])
def test_chatglm2_prompt_has_the_released_ids(case):
    messages = messages_of(case["history"], case["query"])
    ids = TEMPLATES["chatglm2"].encode_prompt(TOKENIZERS["chatglm2"], messages)
    assert ids == case["build_inputs"]["input_ids"][0]


@pytest.mark.parametrize("case", V3["chat"])
def test_chatglm3_prompt_has_the_released_ids(case):
    history = case["history"]
    messages = [Message(m["role"], m["content"], metadata=m.get("metadata", "")) for m in history]
    tools = next((m["tools"] for m in history if m["role"] == "system" and "tools" in m), None)
    messages.append(Message(case["role"], case["query"]))
    ids = TEMPLATES["chatglm3"].encode_prompt(TOKENIZERS["chatglm3"], messages, tools)
    assert ids == case["output"]["input_ids"][0]


def test_chatglm3_tool_call_has_the_released_ids():
    case = next(c for c in V3["chat"] if c["role"] == "observation")
    call = Message("assistant", "", tool_calls=(ToolCall("get_weather", {"city": "北京"}),))
    messages = [Message("user", "北京天气怎么样"), call, Message("observation", case["query"])]
    for tools in (TOOLS, [{"type": "function", "function": TOOLS[0]}]):
        ids = TEMPLATES["chatglm3"].encode_prompt(TOKENIZERS["chatglm3"], messages, tools)
        assert ids == case["output"]["input_ids"][0]


def test_chatglm_row_is_prompt_gmask_sop_answer_eop_with_sop_learned():
    tokenizer, template = TOKENIZERS["chatglm"], TEMPLATES["chatglm"]
    question, answer = tokenizer.encode_ordinary("你好"), tokenizer.encode_ordinary("世界")
    gmask, sop, eop = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>", "<eop>"])
    conversation = Conversation((Message("user", "你好"), Message("assistant", "世界")))
    input_ids, labels, prompt_length = template.encode_conversation(tokenizer, conversation)
    assert input_ids == [*question, gmask, sop, *answer, eop]
    assert labels == [-100] * (len(question) + 1) + [sop, *answer, eop]
    assert prompt_length == len(question) + 1


def test_chatglm2_learns_earlier_answers_where_they_stand():
    tokenizer, template = TOKENIZERS["chatglm2"], TEMPLATES["chatglm2"]
    messages = [*messages_of([("你好", "你好👋！")], "再见"), Message("assistant", "好的")]
    ids, labels, start = template.encode_conversation(tokenizer, Conversation(tuple(messages)))
    first = [i for i, label in enumerate(labels[:start]) if label != -100]
    opened = template.encode_prompt(tokenizer, messages[:1])
    assert first == list(range(len(opened), len(opened) + len(first)))
    assert tokenizer.decode([labels[i] for i in first[:-1]]) == "你好👋！"
    assert [labels[i] for i in first[:-1]] == [ids[i] for i in first[:-1]]
    assert labels[first[-1]] == tokenizer.eos_token_id  # where the line break follows
    assert ids[first[-1]] == tokenizer.encode_ordinary("\n")[-1]
    assert (
        labels[start:]
        == ids[start:]
        == [*tokenizer.encode_ordinary("好的"), tokenizer.eos_token_id]
    )


@pytest.mark.parametrize(
    ("loss_on", "explicit", "learned"),
    [("all", None, True), ("last", None, False), ("last", True, True), ("all", False, False)],
)
def test_chatglm3_learns_each_answer_and_the_token_that_ends_it(loss_on, explicit, learned):
    tokenizer, template = TOKENIZERS["chatglm3"], TEMPLATES["chatglm3"]
    encode = tokenizer.encode_ordinary
    gmask, sop, user, assistant, end = tokenizer.convert_tokens_to_ids(
        ["[gMASK]", "sop", "<|user|>", "<|assistant|>", "</s>"]
    )
    messages = [*messages_of([("你好", "你好！")], "再见"), Message("assistant", "好的")]
    messages[1] = Message("assistant", "你好！", loss=explicit)
    segments = [
        ([gmask, sop, user, *encode("\n"), *encode("你好"), assistant], False),
        ([*encode("\n"), *encode("你好！"), user], learned),
        ([*encode("\n"), *encode("再见"), assistant], False),
        ([*encode("\n"), *encode("好的"), end], True),
    ]
    ids, labels, start = template.encode_conversation(
        tokenizer, Conversation(tuple(messages)), loss_on
    )
    assert ids == [id for part, _ in segments for id in part]
    assert labels == [id if is_target else -100 for part, is_target in segments for id in part]
    assert start == sum(len(part) for part, _ in segments[:3])


def test_glm4_conversation_with_tools():
    tokenizer, template = TOKENIZERS["glm4"], TEMPLATES["glm4"]
    messages = (
        Message("system", "令"),
        Message("user", "天气"),
        Message("assistant", "查一下", tool_calls=(ToolCall("get_weather", {"city": "北京"}),)),
        Message("observation", "22"),
        Message("assistant", "晴"),
    )
    ids, labels, start = template.encode_conversation(tokenizer, Conversation(messages, TOOLS))
    function = json.dumps(TOOLS[0], indent=4, ensure_ascii=False)
    prompt = (
        "[gMASK]<sop><|system|>\n你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
        "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具\n\n## get_weather\n\n"
        f"{function}\n在调用上述函数时，请使用 Json 格式表示调用的参数。<|system|>\n令<|user|>\n天气<|assistant|>"
    )
    learned = '\n查一下<|assistant|>get_weather\n{"city": "北京"}<|observation|>'
    assert tokenizer.show(ids) == f"{prompt}{learned}\n22<|assistant|>\n晴<|user|>"
    assert tokenizer.show([i for i in labels if i != -100]) == f"{learned}\n晴<|user|>"
    assert tokenizer.show(ids[start:]) == "\n晴<|user|>"
    call_last = template.encode_conversation(tokenizer, Conversation(messages[:3], TOOLS))
    assert tokenizer.show(call_last.input_ids) == f"{prompt}{learned}"


def test_stop_tokens():
    expected = {
        "chatglm": ["<eop>"],
        "chatglm2": ["</s>"],
        "chatglm3": ["</s>", "<|user|>", "<|observation|>"],
        "glm4": ["<|endoftext|>", "<|user|>", "<|observation|>"],
    }
    for name, tokens in expected.items():
        ids = [TOKENIZERS[name].convert_tokens_to_ids(token) for token in tokens]
        assert TEMPLATES[name].stop_token_ids(TOKENIZERS[name]) == ids


@pytest.mark.parametrize("case", V1["process_response"], ids=lambda case: case["response"])
def test_chatglm_answers_are_processed_as_released(case):
    assert TEMPLATES["chatglm"].parse_response(case["response"]) == Message(
        "assistant", case["result"]
    )


@pytest.mark.parametrize("case", V2["process_response"], ids=lambda case: case["response"])
def test_chatglm2_answers_are_processed_as_released(case):
    assert TEMPLATES["chatglm2"].parse_response(case["response"]) == Message(
        "assistant", case["result"]
    )


@pytest.mark.parametrize("case", V3["process_response"], ids=lambda case: case["output"])
def test_chatglm3_answers_are_processed_as_released(case):
    result, history = case["result"]
    message = TEMPLATES["chatglm3"].parse_response(case["output"])
    if isinstance(result, str):
        assert message == Message("assistant", result)
    elif result["name"] == "interpreter":
        assert message.tool_calls == (ToolCall("interpreter", result["content"]),)
    else:  # without tools in its history the released code leaves the arguments unread
        arguments = result.get("parameters", {"city": "北京"})
        assert message.tool_calls == (ToolCall("get_weather", arguments),)
        thoughts = [m["content"] for m in history[:-1] if m["role"] == "assistant"]
        assert message.content == "".join(thoughts)


@pytest.mark.parametrize(
    "code",
    [
        "tool_call(city=__import__('os').system('echo x'))",
        "tool_call(**{'city': 'x'})",
        "tool_call('北京')",
        "other(city='x')",
        "tool_call(city='x'); print(1)",
        "tool_call(city={'x'})",
        "tool_call(city=b'x')",
        "tool_call(city=1e999)",
        "tool_call(city='\\ud83d')",
        "tool_call(city=",
        "tool_call(city=" + "(" * 1000 + ")",
        "",
    ],
)
def test_a_chatglm3_call_that_is_not_of_literals_is_text(code):
    text = f"get_weather\n```python\n{code}\n```"
    assert TEMPLATES["chatglm3"].parse_response(text) == Message("assistant", text)


@pytest.mark.parametrize("name", ["chatglm3", "glm4"])
def test_tool_calls_come_back_as_they_were_rendered(name):
    template = TEMPLATES[name]
    calls = (
        ToolCall("a-b", {"text": "引'号\n```", "list": [1, None, {"k": 1.5}], "yes": True}),
        ToolCall("b", {}),
    )
    text = "\n想一想" + "".join(
        f"<|assistant|>{call.name}\n{template.render_call(call)}" for call in calls
    )
    assert template.parse_response(text) == Message("assistant", "想一想", tool_calls=calls)


@pytest.mark.parametrize(
    "text",
    [
        "get_weather\n[1]",
        "get_weather\n{",
        'get_weather\n{"city": NaN}',
        'get_weather\n{"city": "\\ud83d"}',
        "get weather\n{}",
        "好\n{}",
        "只有\n两行",
    ],
)
def test_a_glm4_answer_that_is_no_call_is_text(text):
    assert TEMPLATES["glm4"].parse_response(text) == Message("assistant", text)


@pytest.mark.parametrize("name", ["chatglm", "chatglm2"])
def test_formats_without_tools_say_so(name):
    template, tokenizer = TEMPLATES[name], TOKENIZERS[name]
    with pytest.raises(UserError, match=f"template {name} must be used without tools"):
        template.encode_prompt(tokenizer, [Message("user", "x")], TOOLS)
    call = Message("assistant", "", tool_calls=(ToolCall("f", {}),))
    refused = pytest.raises(UserError, match=f"template {name} must be given messages without tool")
    with refused:
        template.encode_prompt(tokenizer, [Message("user", "x"), call, Message("user", "y")])
    with refused:  # as the answer that is learned
        template.encode_conversation(tokenizer, Conversation((Message("user", "x"), call)))


@pytest.mark.parametrize("name", ["chatglm", "chatglm2"])
@pytest.mark.parametrize(
    "roles", [[], ["assistant"], ["user", "assistant"], ["user", "user"], ["user", "system"]]
)
def test_rounds_refuse_roles_out_of_turn(name, roles):
    with pytest.raises(UserError, match="in turn"):
        TEMPLATES[name].encode_prompt(TOKENIZERS[name], [Message(role, "x") for role in roles])


def test_of_many_roles_a_few_are_named():
    with pytest.raises(UserError) as error:
        TEMPLATES["chatglm"].encode_prompt(TOKENIZERS["chatglm"], [Message("user", "x")] * 500)
    assert str(error.value).endswith(f"got roles {', '.join(['user'] * 8)}, ...")


CONTROL = [
    "[gMASK]",
    "<sop>",
    "<eop>",
    "sop",
    "eop",
    "</s>",
    "[MASK]",
    "<pad>",
    "<|user|>",
    "<|assistant|>",
]


@pytest.mark.parametrize("text", CONTROL)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_that_spells_a_control_token_stays_text(name, text):
    tokenizer, template = TOKENIZERS[name], TEMPLATES[name]
    known = {tokenizer.convert_tokens_to_ids(token) for token in CONTROL} - {
        None,
        tokenizer.unk_token_id,
    }

    def control_tokens(said):
        conversation = Conversation(
            (*messages_of([(said, said)], said), Message("assistant", said))
        )
        return [
            id
            for id in template.encode_conversation(tokenizer, conversation).input_ids
            if id in known
        ]

    assert control_tokens("a b")
    assert control_tokens(f"a {text}b{text}") == control_tokens("a b")


SAID = [
    "你好",
    " 两个  空格 ",
    "\n换行\n\n",
    "<|user|>",
    "[gMASK]",
    "答：",
    "[Round 1]",
    "A-b_c 12",
    "🚀😶‍🌫️",
    "",
]
TEXTS = st.sampled_from(SAID) | st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@pytest.mark.parametrize("loss_on", ["all", "last"])
@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    history=st.lists(st.tuples(TEXTS, TEXTS), max_size=4), query=TEXTS, answer=TEXTS, system=TEXTS
)
def test_trained_prompt_is_the_served_prompt(name, loss_on, history, query, answer, system):
    tokenizer, template = TOKENIZERS[name], TEMPLATES[name]
    messages = [Message("system", system), *messages_of(history, query)]
    served = template.encode_prompt(tokenizer, messages)
    conversation = Conversation((*messages, Message("assistant", answer)))
    input_ids, labels, prompt_length = template.encode_conversation(
        tokenizer, conversation, loss_on
    )
    assert input_ids[: len(served)] == served
    assert prompt_length == len(served) - template.prompt_targets
    assert labels[prompt_length:] == input_ids[prompt_length:]
    assert input_ids[-1] in template.stop_token_ids(tokenizer)
    assert len(labels) == len(input_ids)
    if loss_on == "last":
        assert set(labels[:prompt_length]) <= {-100}


CALLS = st.builds(
    ToolCall,
    st.sampled_from(["get_weather", "b-c"]),
    st.dictionaries(st.sampled_from(["city", "x"]), TEXTS | st.integers() | st.none(), max_size=2),
)
STEPS = st.lists(st.tuples(TEXTS, CALLS, TEXTS), max_size=2)  # thought, call, what came back
TURNS = st.lists(st.tuples(TEXTS, STEPS, TEXTS), min_size=1, max_size=3)


@pytest.mark.parametrize("name", ["chatglm3", "glm4"])
@given(turns=TURNS, tools=st.sampled_from([None, TOOLS]), loss=st.none() | st.booleans())
def test_trained_prompt_is_the_served_prompt_after_any_tool_calls(name, turns, tools, loss):
    tokenizer, template = TOKENIZERS[name], TEMPLATES[name]
    messages = []
    for question, steps, answer in turns:
        messages.append(Message("user", question))
        for thought, call, observation in steps:
            messages.append(Message("assistant", thought, loss, tool_calls=(call,)))
            messages.append(Message("observation", observation))
        messages.append(Message("assistant", answer))
    for end, message in enumerate(messages):
        if message.role == "assistant":
            served = template.encode_prompt(tokenizer, messages[:end], tools)
            conversation = Conversation(tuple(messages[: end + 1]), tools)
            input_ids, labels, start = template.encode_conversation(tokenizer, conversation)
            assert input_ids[:start] == served
            expected = [-100] * (len(input_ids) - start) if message.loss is False else input_ids
            assert labels[start:] == expected[-len(labels[start:]) :]
            assert input_ids[-1] in template.stop_token_ids(tokenizer)


def test_a_tokenizer_of_another_family_is_named():
    for name, other in [
        ("chatglm", "chatglm2"),
        ("chatglm2", "chatglm"),
        ("chatglm3", "chatglm2"),
        ("glm4", "chatglm3"),
    ]:
        with pytest.raises(
            UserError, match=rf"^template {name} must have a tokenizer with the token "
        ):
            TEMPLATES[name].encode_prompt(TOKENIZERS[other], [Message("user", "x")])

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatglm_ptuning.data.conversation import Conversation, Message
from chatglm_ptuning.data.template import TEMPLATES
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models.tokenization_chatglm import ChatGLMTokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


TOKENIZERS = {
    "chatglm": ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer_v1"),
}


def messages_of(history, query):
    """[[question, answer], ...] and a question as messages."""
    messages = []
    for question, answer in history:
        messages += [Message("user", question), Message("assistant", answer)]
    return [*messages, Message("user", query)]


@pytest.mark.parametrize(
    "case", golden("tokenizer_v1.json")["chat"], ids=lambda case: len(case["history"])
)
def test_chatglm_prompt_has_the_released_ids(case):
    messages = messages_of(case["history"], case["query"])
    ids = TEMPLATES["chatglm"].encode_prompt(TOKENIZERS["chatglm"], messages)
    assert ids == case["generate_kwargs"]["input_ids"][0]


@pytest.mark.parametrize(
    "case", golden("tokenizer_v1.json")["process_response"], ids=lambda c: c["response"]
)
def test_chatglm_answers_are_processed_as_released(case):
    assert TEMPLATES["chatglm"].parse_response(case["response"]) == Message(
        "assistant", case["result"]
    )


def test_chatglm_row_is_prompt_gmask_sop_answer_eop_with_sop_learned():
    tokenizer, template = TOKENIZERS["chatglm"], TEMPLATES["chatglm"]
    question, answer = tokenizer.encode_ordinary("你好"), tokenizer.encode_ordinary("世界")
    gmask, sop, eop = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>", "<eop>"])
    conversation = Conversation((Message("user", "你好"), Message("assistant", "世界")))
    input_ids, labels, prompt_length = template.encode_conversation(tokenizer, conversation)
    assert input_ids == [*question, gmask, sop, *answer, eop]
    assert labels == [-100] * (len(question) + 1) + [sop, *answer, eop]
    assert prompt_length == len(question) + 1
    assert template.stop_token_ids(tokenizer) == [eop]


@pytest.mark.parametrize(
    "text", ["[gMASK]", "<sop>", "<eop>", "</s>", "a[MASK]b", "<pad>", "<unk>", "<|user|>"]
)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_that_spells_a_control_token_stays_text(name, text):
    tokenizer, template = TOKENIZERS[name], TEMPLATES[name]
    plain = template.encode_prompt(tokenizer, messages_of([], "x"))
    control = {id for id in plain if not tokenizer.encode_ordinary("x").count(id)}
    ids = template.encode_prompt(tokenizer, messages_of([(text, text)], text))
    by_name = tokenizer.convert_tokens_to_ids(["<sop>", "<eop>", "[MASK]", "<pad>", "</s>"])
    assert sum(ids.count(id) for id in {*control, *by_name}) == sum(
        template.encode_prompt(tokenizer, messages_of([("x", "x")], "x")).count(id)
        for id in {*control, *by_name}
    )


TEXTS = st.one_of(
    st.sampled_from(
        [
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
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
)


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
    assert labels[-1] == input_ids[-1]
    assert input_ids[-1] in template.stop_token_ids(tokenizer)
    assert len(labels) == len(input_ids)
    if loss_on == "last":
        assert set(labels[:prompt_length]) <= {-100}


@pytest.mark.parametrize(
    "roles", [[], ["assistant"], ["user", "assistant"], ["user", "user"], ["user", "system"]]
)
def test_chatglm_refuses_roles_out_of_turn(roles):
    with pytest.raises(UserError, match="in turn"):
        TEMPLATES["chatglm"].encode_prompt(
            TOKENIZERS["chatglm"], [Message(role, "x") for role in roles]
        )


def test_a_tokenizer_of_another_family_is_named():
    class Foreign:
        name_or_path, unk_token_id = "some/dir", 0
        encode_ordinary = staticmethod(lambda text: [7])
        convert_tokens_to_ids = staticmethod(lambda token: 0)

    for name, template in TEMPLATES.items():
        with pytest.raises(
            UserError, match=rf"template {name} must have a tokenizer with the token .*'some/dir'"
        ):
            template.encode_prompt(Foreign(), [Message("user", "x")])

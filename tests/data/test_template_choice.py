import copy

import pytest

from chatglm_ptuning.data.template import TEMPLATES
from chatglm_ptuning.data.template_choice import choose_template
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.models.tokenization_chatglm2 import ChatGLM2Tokenizer
from tests.data.chat_tokenizers import GOLDEN, TOKENIZERS


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_tells_needs_no_name(name):
    assert choose_template(None, TOKENIZERS[name]) is TEMPLATES[name]
    assert choose_template(name, TOKENIZERS[name]) is TEMPLATES[name]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("other", TOKENIZERS)
def test_a_name_that_the_tokenizer_contradicts_is_refused(name, other):
    if name != other:
        with pytest.raises(UserError, match=f"got '{name}' with .*; set model.template={other}"):
            choose_template(name, TOKENIZERS[other])


def test_a_tokenizer_that_does_not_tell_leaves_the_choice(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(
        (GOLDEN / "tokenizer_v2" / "tokenizer.model").read_bytes()
    )
    tokenizer = ChatGLM2Tokenizer(str(tmp_path / "tokenizer.model"))
    with pytest.raises(
        UserError, match=r"may be any of chatglm2, chatglm3; set model.template \(--template"
    ):
        choose_template(None, tokenizer)
    for name in ("chatglm2", "chatglm3"):
        assert choose_template(name, tokenizer) is TEMPLATES[name]


def test_glm_edge_with_the_tokens_of_glm_4_is_another_format():
    tokenizer = copy.copy(TOKENIZERS["glm4"])
    tokenizer.chat_template = "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{% endfor %}"
    assert choose_template(None, tokenizer) is TEMPLATES["glm4"]
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>\n{% endfor %}"
    for name in (None, *TEMPLATES):
        with pytest.raises(UserError, match=r"model\.template must"):
            choose_template(name, tokenizer)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UserError, match=r"got 'chatglm-3'; did you mean chatglm3\?"):
        choose_template("chatglm-3", TOKENIZERS["chatglm3"])

import torch

from chatglm_ptuning.data.conversation import Conversation, Message
from chatglm_ptuning.data.dataset import DataConfig
from chatglm_ptuning.data.preview import preview
from chatglm_ptuning.data.template import TEMPLATES
from tests.data.chat_tokenizers import TOKENIZERS

ROWS = [
    Conversation((Message("user", "问"), Message("assistant", "答")), source="f:1"),
    Conversation((Message("user", "问" * 30), Message("assistant", "答")), source="f:2"),
    Conversation((Message("user", "问"), Message("assistant", "")), source="f:3"),
    Conversation((Message("user", "问"), Message("assistant", "答")), source="f:4"),
]
CONFIG = DataConfig(max_source_length=8)


def show(conversations, name="chatglm", **settings):
    return preview(conversations, TEMPLATES[name], TOKENIZERS[name], CONFIG, **settings)


def test_every_token_is_shown_with_position_id_and_label():
    tokenizer = TOKENIZERS["chatglm"]
    ids = [*tokenizer.encode_ordinary("问"), 2001, 2004, *tokenizer.encode_ordinary("答"), 2005]
    start = ids.index(2004)
    lines = show(ROWS[:1], colour=False).splitlines()
    assert lines[0] == "f:1: template chatglm"
    assert lines[1] == f"  {len(ids)} tokens, {len(ids) - start} of them learned"
    table = [line.split() for line in lines[3:]]
    assert [int(row[0]) for row in table] == list(range(len(ids)))
    assert [int(row[1]) for row in table] == ids
    assert [row[2] for row in table] == ["-"] * start + [str(id) for id in ids[start:]]
    assert [row[3] for row in table] == tokenizer.convert_ids_to_tokens(ids)


def test_prompt_and_target_differ_in_colour():
    lines = show(ROWS[:1]).splitlines()
    prompt = [line for line in lines if line.startswith("\033[36m")]
    target = [line for line in lines if line.startswith("\033[32;1m")]
    assert "<sop>" in target[0]
    assert "[gMASK]" in prompt[-1]
    assert len(prompt) + len(target) == len(lines) - 3


def test_cuts_and_skipped_rows_are_named_and_rows_are_counted():
    parts = show(ROWS, colour=False).split("\n\n")
    assert len(parts) == 3
    assert "prompt cut (right) to data.max_source_length=8" in parts[1]
    assert parts[2] == "f:3: template chatglm\n  skipped: empty answer"
    assert len(show(ROWS, rows=9).split("\n\n")) == 4


def test_the_models_positions_are_shown():
    def two_axes(input_ids, attention_mask):
        assert attention_mask.tolist() == [[1] * input_ids.shape[1]]
        index = torch.arange(input_ids.shape[1])
        return torch.stack([index, index * 10])[None]

    lines = show(ROWS[:1], colour=False, make_position_ids=two_axes).splitlines()
    assert [line.split()[0] for line in lines[3:6]] == ["0/0", "1/10", "2/20"]

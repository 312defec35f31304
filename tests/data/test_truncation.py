import pytest

from chatglm_ptuning.data.conversation import Message
from chatglm_ptuning.data.template import TEMPLATES
from chatglm_ptuning.data.truncation import fit_prompt
from tests.data.chat_tokenizers import TOKENIZERS

TURNS = [(Message("user", f"问{n}"), Message("assistant", "答" * (n % 7 + 1))) for n in range(40)]
LAST = Message("user", "末")


@pytest.mark.parametrize("limit", [20, 50, 120, 300])
@pytest.mark.parametrize("name", TEMPLATES)
def test_as_few_turns_go_as_possible_and_that_is_found_in_few_steps(name, limit, monkeypatch):
    template, tokenizer = TEMPLATES[name], TOKENIZERS[name]
    system = [] if name in ("chatglm", "chatglm2") else [Message("system", "令")]

    def messages(dropped):
        return [*system, *(message for turn in TURNS[dropped:] for message in turn), LAST]

    def length(dropped):
        return len(template.encode_prompt(tokenizer, messages(dropped))) - template.prompt_targets

    dropped = next(n for n in range(len(TURNS) + 1) if length(n) <= limit)
    lost = length(0) - length(dropped)
    prompt = template.encode_prompt(tokenizer, messages(0))
    encode, calls = type(template).encode_prompt, []
    monkeypatch.setattr(
        type(template), "encode_prompt", lambda *args: calls.append(args) or encode(*args)
    )
    fit = fit_prompt(template, tokenizer, messages(0), None, prompt, limit, "right")
    assert list(fit.messages) == messages(dropped)
    assert (fit.removed, fit.dropped_tokens, fit.fits) == (None, lost, True)
    assert len(calls) <= 7

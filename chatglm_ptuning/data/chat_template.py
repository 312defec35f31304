"""A template object behind `tokenizer.apply_chat_template`, with the arguments that transformers gives that method.

The ids are the template's own: a text that spells a control token stays text.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from chatglm_ptuning.data.conversation import ROLES, Conversation
from chatglm_ptuning.data.messages import messages_from_list
from chatglm_ptuning.data.template import RoleTemplate, Template
from chatglm_ptuning.data.template_choice import choose_template
from chatglm_ptuning.errors import UserError


def apply_chat_template(
    tokenizer: Any,
    template_name: str | None,
    conversation: Sequence[Any],
    tools: Any = None,
    *,
    add_generation_prompt: bool = False,
    tokenize: bool = True,
    padding: bool | str = False,
    max_length: int | None = None,
    return_tensors: str | None = None,
    return_dict: bool = True,
    **others: Any,
) -> Any:
    """Encode one conversation or several.

    Args:
        tokenizer: The model's tokenizer.
        template_name: Value of `model.template`; None where the tokenizer shall tell.
        conversation: Messages as data files have them, the OpenAI layout among them, or a list of such lists.
        tools: Tools on offer in every conversation.
        add_generation_prompt: Open the assistant's answer. ChatGLM-6B and ChatGLM2-6B write the place of the answer
            into each question, so for them it is always open.
        tokenize: Return ids; else a text in which control tokens stand by name.
        padding: As everywhere in transformers.
        max_length: Length in tokens for padding="max_length".
        return_tensors: "pt" or "np".
        return_dict: Return `input_ids` and `attention_mask`; else the ids alone.
        others: What transformers also knows; only what changes nothing is accepted.

    Returns:
        For a conversation that ends with an answer the ids that training sees, its end token included; for any other
        the ids of the prompt.

    Raises:
        UserError: The template cannot hold the messages or is not known, or an argument is not supported.
    """
    others.pop("sanitize_control_tokens", None)  # always done
    for name, value in others.items():
        if value not in (None, False) and value != {}:
            raise UserError(
                f"apply_chat_template must be called without {name}, got {name}={value!r}; the template is the"
                " one of this checkpoint and nothing is cut off"
            )
    template = choose_template(template_name, tokenizer)
    is_batch = bool(conversation) and isinstance(conversation[0], list | tuple)
    rows = [
        encode(tokenizer, template, one, tools, add_generation_prompt)
        for one in (conversation if is_batch else [conversation])
    ]
    if not tokenize:
        texts = [spell(tokenizer, template, ids) for ids in rows]
        return texts if is_batch else texts[0]
    padded = tokenizer.pad(
        {"input_ids": rows}, padding=padding, max_length=max_length, return_tensors=return_tensors
    )
    if not is_batch and return_tensors is None:
        padded = type(padded)({name: value[0] for name, value in padded.items()})
    return padded if return_dict else padded["input_ids"]


def encode(
    tokenizer: Any,
    template: Template,
    conversation: Sequence[Any],
    tools: Any,
    add_generation_prompt: bool,
) -> list[int]:
    """Ids of one conversation; see `apply_chat_template`."""
    messages = messages_from_list("apply_chat_template", "conversation", list(conversation))
    is_answered = bool(messages) and messages[-1].role == "assistant"
    if is_answered and not add_generation_prompt:
        whole = Conversation(tuple(messages), tools)
        return template.encode_conversation(tokenizer, whole).input_ids
    ids = template.encode_prompt(tokenizer, messages, tools)
    opens_by_token = isinstance(template, RoleTemplate)
    return ids[:-1] if opens_by_token and not add_generation_prompt else ids


def spell(tokenizer: Any, template: Template, ids: Sequence[int]) -> str:
    """Ids as text: control tokens by name, even those that decode to nothing."""
    names = [*template.control_tokens, *(f"<|{role}|>" for role in ROLES)]
    control = {tokenizer.convert_tokens_to_ids(name): name for name in names}
    control.pop(tokenizer.unk_token_id, None)
    texts = []
    for is_control, group in groupby(ids, control.__contains__):
        run = list(group)
        texts += [control[index] for index in run] if is_control else [tokenizer.decode(run)]
    return "".join(texts)

"""Which chat format a checkpoint speaks: named by `model.template`, or told by its tokenizer where that is certain."""

import difflib
from typing import Any

from chatglm_ptuning.data.template import TEMPLATES, Template
from chatglm_ptuning.errors import UserError


def choose_template(name: str | None, tokenizer: Any) -> Template:
    """The chat format of a run.

    ChatGLM2-6B and ChatGLM3-6B have the same vocabulary file; which of the two it is, the tokenizer's `role_tokens`
    says: True or False where the checkpoint tells, else None.

    Args:
        name: Value of `model.template`; None where the tokenizer shall tell.
        tokenizer: The model's tokenizer.

    Raises:
        UserError: No such name, a name that the tokenizer contradicts, or a tokenizer that does not tell.
    """
    fitting = fitting_templates(tokenizer)
    names = ", ".join(template.name for template in fitting)
    if name is None:
        if len(fitting) == 1:
            return fitting[0]
        raise UserError(
            f"model.template must be given where the checkpoint does not tell it, got {tokenizer.name_or_path!r}"
            f" which may be any of {names or ', '.join(TEMPLATES)}; set model.template"
            " (--template in chat, serve and data)"
        )
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"model.template must be one of {', '.join(TEMPLATES)}, got {name!r}{hint}")
    if TEMPLATES[name] not in fitting:
        hint = f"; set model.template={names}" if len(fitting) == 1 else ""
        raise UserError(
            f"model.template must fit the tokenizer, got {name!r} with {tokenizer.name_or_path!r}{hint}"
        )
    return TEMPLATES[name]


def fitting_templates(tokenizer: Any) -> list[Template]:
    """The chat formats whose control tokens a tokenizer has."""
    return [template for template in TEMPLATES.values() if fits(template, tokenizer)]


def fits(template: Template, tokenizer: Any) -> bool:
    """Whether a tokenizer has the control tokens of a format and does not say that it is another's."""

    def has(token: str) -> bool:
        index = tokenizer.convert_tokens_to_ids(token)
        return index is not None and index != tokenizer.unk_token_id

    if not hasattr(tokenizer, "role_tokens") and has("<|user|>"):
        own = getattr(tokenizer, "chat_template", None)
        if isinstance(own, str) and "[gMASK]" not in own:
            return False  # GLM-Edge: the tokens of GLM-4 in a format of its own
    speaks_roles = getattr(tokenizer, "role_tokens", has("<|user|>"))
    needs_roles = "<|user|>" in template.control_tokens
    return all(map(has, template.control_tokens)) and speaks_roles in (None, needs_roles)

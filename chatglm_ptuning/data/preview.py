"""What the model will get of a few rows, token by token."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from chatglm_ptuning.data.config import DataConfig
from chatglm_ptuning.data.conversation import Conversation
from chatglm_ptuning.data.encoding import encode_example
from chatglm_ptuning.data.report import DataReport, plural
from chatglm_ptuning.data.template import IGNORED, Example, Template

_PROMPT, _TARGET, _PLAIN = "\033[36m", "\033[32;1m", "\033[0m"


def preview(
    conversations: Iterable[Conversation],
    template: Template,
    tokenizer: Any,
    config: DataConfig,
    rows: int = 3,
    colour: bool = True,
    make_position_ids: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> str:
    """Show rows as `encode_dataset` encodes them: position, id and text of each token, and which ones are learned.

    Args:
        conversations: The rows.
        template: The chat format.
        tokenizer: The model's tokenizer.
        config: The `data` section.
        rows: Show so many.
        colour: Prompt in cyan and target in green.
        make_position_ids: The model's positions of `input_ids` and `attention_mask`, both `[1, seq_len]`; gives
            `[1, seq_len]` or `[1, 2, seq_len]`. None counts from 0.
    """
    parts = []
    for conversation, _ in zip(conversations, range(rows), strict=False):
        report = DataReport(rows=1)
        example = encode_example(conversation, template, tokenizer, config, report)
        lines = [f"{conversation.source}: template {template.name}"]
        lines += [f"  skipped: {rule}" for rule in report.skipped]
        lines += [
            f"  {rule}: {plural(tally.tokens, 'token')}" for rule, tally in report.changed.items()
        ]
        if example is not None:
            learned = len(example.labels) - example.labels.count(IGNORED)
            lines.append(f"  {len(example.input_ids)} tokens, {learned} of them learned")
            lines += token_lines(example, tokenizer, colour, make_position_ids)
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def token_lines(
    example: Example,
    tokenizer: Any,
    colour: bool,
    make_position_ids: Callable[[Tensor, Tensor], Tensor] | None,
) -> list[str]:
    """One line a token: position (or both positions), id, the token, and its label where it is learned.

    A label stands beside the token that it belongs to; the model predicts it at the token before.
    """
    ids = torch.tensor([example.input_ids])
    if make_position_ids is not None:
        positions = make_position_ids(ids, torch.ones_like(ids))
    else:
        positions = torch.arange(ids.shape[1])[None]
    lines = ["  position       id     label  token"]
    columns = positions.reshape(-1, ids.shape[1]).T.tolist()
    for place, id, label in zip(columns, example.input_ids, example.labels, strict=True):
        position = "/".join(map(str, place))
        token = repr(tokenizer.convert_ids_to_tokens(id))[1:-1]
        line = f"  {position:>8} {id:>8} {label if label != IGNORED else '-':>9}  {token}"
        if colour:
            line = f"{_TARGET if label != IGNORED else _PROMPT}{line}{_PLAIN}"
        lines.append(line)
    return lines

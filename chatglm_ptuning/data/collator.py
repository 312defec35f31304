"""Examples to a batch."""

from collections.abc import Mapping, Sequence

import torch

from chatglm_ptuning.data.template import IGNORED


class Collator:
    """Pads the examples of a batch on the right to the longest of them.

    Args:
        pad_token_id: Id in `input_ids` at pads; any id does, since the mask is 0 there.
        pad_to_multiple_of: Round the length up to a multiple of this many tokens; None leaves it.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """Make a batch; the examples stay as they are.

        Args:
            examples: Each with "input_ids" and "labels" of one length; a packed one has an "attention_mask" too.

        Returns:
            `input_ids`, `attention_mask` (0 at pads, 1 at real tokens; 1, 2, 3, ... at those of the first, second,
            third example of a packed row) and `labels` (-100 at pads), each `[batch, seq_len]`, long.
        """
        length = max(len(example["input_ids"]) for example in examples)
        if self.pad_to_multiple_of is not None:
            length += -length % self.pad_to_multiple_of
        shape = (len(examples), length)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED, dtype=torch.long)
        for row, example in enumerate(examples):
            end = len(example["input_ids"])
            input_ids[row, :end] = torch.tensor(example["input_ids"], dtype=torch.long)
            attention_mask[row, :end] = torch.tensor(example.get("attention_mask", 1))
            labels[row, :end] = torch.tensor(example["labels"], dtype=torch.long)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

import copy

import torch

from chatglm_ptuning.data.collator import Collator

EXAMPLES = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]


def test_batch_is_padded_on_the_right_to_its_longest():
    before = copy.deepcopy(EXAMPLES)
    batch = Collator(pad_token_id=3)(EXAMPLES)
    expected = {
        "input_ids": [[5, 6, 7], [8, 3, 3]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert all(tensor.dtype == torch.long for tensor in batch.values())
    assert before == EXAMPLES


def test_length_is_rounded_up_when_asked():
    batch = Collator(pad_token_id=3, pad_to_multiple_of=8)(EXAMPLES)
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, 8)}
    assert batch["labels"][:, 3:].unique().tolist() == [-100]
    assert Collator(0, pad_to_multiple_of=3)(EXAMPLES)["input_ids"].shape == (2, 3)

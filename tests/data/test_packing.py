import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatglm_ptuning.data.collator import Collator
from chatglm_ptuning.data.dataset import TokenDataset
from chatglm_ptuning.data.packing import PackedDataset, pack


@given(lengths=st.lists(st.integers(1, 40), max_size=60), length=st.integers(8, 64))
def test_every_example_has_one_place_and_no_row_is_too_long(lengths, length):
    rows = pack(lengths, length)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    for row in rows:
        assert sum(lengths[index] for index in row) <= length or len(row) == 1
    totals = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(totals) < 2 or totals[0] + totals[1] > length  # no two rows would fit into one


def test_examples_go_where_they_fill_up_most():
    assert pack([5, 4, 3, 6, 2], 10) == [[0, 2, 4], [1, 3]]
    assert pack([20, 3, 3], 10) == [[0], [1, 2]]


def make(lengths):
    dataset = TokenDataset()
    for number, length in enumerate(lengths, 1):
        dataset.append([number] * length, [-100] * (length - 1) + [number])
    return dataset


def test_a_packed_row_numbers_its_examples():
    packed = PackedDataset(make([3, 9, 2]), 6)
    assert len(packed) == 2
    assert packed[0] == {
        "input_ids": [1, 1, 1, 3, 3],
        "labels": [-100, -100, 1, -100, 3],
        "attention_mask": [1, 1, 1, 2, 2],
    }
    assert packed[1]["attention_mask"] == [1] * 9
    with pytest.raises(IndexError):
        packed[2]


def test_collator_keeps_the_numbers_and_pads_with_0():
    batch = Collator(pad_token_id=7)([PackedDataset(make([3, 2]), 6)[0], make([1])[0]])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 2, 2], [1, 0, 0, 0, 0]]
    assert batch["input_ids"].tolist() == [[1, 1, 1, 2, 2], [1, 7, 7, 7, 7]]
    assert batch["labels"].tolist() == [[-100, -100, 1, -100, 2], [1, -100, -100, -100, -100]]

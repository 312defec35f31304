import random

from chatglm_ptuning.training.sampler import LengthGroupedSampler

LENGTHS = [random.Random(i).randrange(1, 100) for i in range(50)]


def test_every_row_once_and_alike_rows_together() -> None:
    order = list(LengthGroupedSampler(LENGTHS, group_size=16, seed=1))
    assert sorted(order) == list(range(50))
    lengths = [LENGTHS[i] for i in order]
    assert lengths[0] == max(LENGTHS)
    breaks = [i for i in range(1, 50) if lengths[i] > lengths[i - 1]]
    assert len(breaks) == 3  # four groups, each in falling order


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first, again = (LengthGroupedSampler(LENGTHS, 16, 1) for _ in range(2))
    assert list(first) == list(again) == list(first)
    again.set_epoch(1)
    assert list(first) != list(again)
    first.set_epoch(1)
    assert list(first) == list(again)
    assert list(first) != list(LengthGroupedSampler(LENGTHS, 16, 2))

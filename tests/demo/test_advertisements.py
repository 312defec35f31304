from itertools import combinations

import pytest

from chatglm_ptuning.demo.advertisements import SPLITS, make_advertisements

ROWS = make_advertisements()


def pairs(row: dict[str, str]) -> list[list[str]]:
    return [pair.split("#") for pair in row["content"].split("*")]


def test_the_same_rows_every_time_and_others_for_another_seed() -> None:
    assert make_advertisements() == ROWS
    assert make_advertisements(seed=1)["train"][0] != ROWS["train"][0]


def test_as_many_rows_as_promised() -> None:
    assert {split: len(rows) for split, rows in ROWS.items()} == SPLITS
    assert SPLITS["train"] >= 2000
    assert SPLITS["validation"] == SPLITS["test"] == 200


def test_no_attribute_set_comes_twice_in_whatever_order() -> None:
    sets = {
        split: [frozenset(map(tuple, pairs(row))) for row in rows] for split, rows in ROWS.items()
    }
    for found in sets.values():
        assert len(set(found)) == len(found)
    for one, other in combinations(sets.values(), 2):
        assert not set(one) & set(other)


@pytest.mark.parametrize("split", SPLITS)
def test_the_copy_names_every_value_in_the_order_of_the_list(split: str) -> None:
    for row in ROWS[split]:
        (first, kind), *attributes = pairs(row)
        assert first == "类型"
        assert kind in row["summary"]
        place = 0
        for _, value in attributes:
            place = row["summary"].find(value, place)
            assert place >= 0, (value, row)


def test_the_copy_varies() -> None:
    openings = {row["summary"].split("。")[0] for row in ROWS["train"]}
    assert len(openings) > 50
    assert len({row["summary"] for row in ROWS["train"]}) == SPLITS["train"]

import re
from random import Random

from chatglm_ptuning.demo.world import CLAUSES, KINDS, VALUES, make_clause, make_product


def test_every_attribute_of_every_kind_can_be_told() -> None:
    assert VALUES.keys() == CLAUSES.keys()
    for kind in KINDS:
        for key, values in kind.values.items():
            assert set(values) <= VALUES[key].keys(), (kind.name, key)
            assert len(set(values)) == len(values)


def test_no_praise_names_another_value() -> None:
    names = [value for values in VALUES.values() for value in values]
    named = [
        (praise, name)
        for values in VALUES.values()
        for praises in values.values()
        for praise in praises
        for name in names
        if name in praise
    ]
    assert named == []


def test_a_clause_holds_its_value_and_no_placeholder() -> None:
    rng = Random(0)
    for key, values in VALUES.items():
        for value in values:
            for _ in range(8):
                clause = make_clause(rng, key, value)
                assert value in clause
                assert re.fullmatch("[\u4e00-\u9fff，]+", clause), clause


def test_a_product_has_values_of_its_kind_in_the_order_of_the_kind() -> None:
    rng = Random(0)
    sizes = set()
    for _ in range(500):
        product = make_product(rng, 3, 5)
        values = product.kind.values
        assert all(value in values[key] for key, value in product.attributes.items())
        assert list(product.attributes) == [key for key in values if key in product.attributes]
        sizes.add(len(product.attributes))
    assert sizes == {3, 4, 5}

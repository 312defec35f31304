"""The task of the demo: a list of attributes in, an advertisement out, in the form of the AdvertiseGen data set.

`类型#上衣*材质#纯棉*颜色#白色` is answered by a few sentences of copy that name all the attributes, in their order.
The form is this task's own: `pretraining` never writes a `#` and a `*` into one text, and never praises a whole list.
"""

from itertools import islice
from random import Random

from chatglm_ptuning.demo.world import Kind, Product, choose, make_clause, make_product

SPLITS = {"train": 2000, "validation": 200, "test": 200}

OPENINGS = {
    True: (
        "这{m}{n}一上身就让人心动",
        "想要添一{m}{n}，不妨看看它",
        "衣橱里怎能少了这{m}{n}",
        "穿上这{m}{n}，出门都有好心情",
    ),
    False: (
        "这{m}{n}让家更有温度",
        "想为家里添一{m}{n}，不妨看看它",
        "好日子从这{m}{n}开始",
        "有了这{m}{n}，家里大不一样",
    ),
}
CLOSINGS = {
    True: ("轻松穿出好气质", "日常搭配毫不费力", "怎么穿都好看", "值得你拥有"),
    False: ("自用送人都很合适", "让生活多一份讲究", "每天看着都欢喜", "值得带回家"),
}


def write_prompt(product: Product) -> str:
    """The attribute list: 类型#上衣*材质#纯棉."""
    return "*".join(
        f"{k}#{v}" for k, v in {"类型": product.kind.name, **product.attributes}.items()
    )


def write_copy(rng: Random, product: Product) -> str:
    """The advertisement: an opening, a clause for every attribute, a closing; two clauses a sentence."""
    kind: Kind = product.kind
    opening = choose(rng, OPENINGS[kind.is_clothing]).format(m=kind.measure, n=kind.name)
    clauses = [make_clause(rng, key, value) for key, value in product.attributes.items()]
    clauses.append(choose(rng, CLOSINGS[kind.is_clothing]))
    pairs = ["，".join(clauses[i : i + 2]) for i in range(0, len(clauses), 2)]
    return "。".join((opening, *pairs)) + "。"


def make_advertisements(seed: int = 2023) -> dict[str, list[dict[str, str]]]:
    """The rows of every split, as `content` and `summary`; no attribute list comes twice in all of them."""
    rng = Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < sum(SPLITS.values()):
        product = make_product(rng, fewest=3, most=5)
        rows.setdefault(write_prompt(product), write_copy(rng, product))
    pairs = iter(rows.items())
    return {
        split: [{"content": content, "summary": copy} for content, copy in islice(pairs, count)]
        for split, count in SPLITS.items()
    }

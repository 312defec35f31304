"""What the demo's base model reads before any tuning: conversations and stories from the little world of `world`.

Questions about given facts (the answer is copied from the context), comparisons, lists, small talk, stories. The
advertisement task is left out on purpose, so that tuning has something to teach: facts come in many notations, but
never in the `#` and `*` of the task, and no text praises a whole list of attributes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from chatglm_ptuning.demo.world import (
    CLAUSES,
    KINDS,
    VALUES,
    Product,
    choose,
    make_clause,
    make_product,
)


@dataclass(frozen=True)
class Example:
    """One thing to read.

    Attributes:
        turns: What user and model say in turn; the last is the model's and is learned. The first is empty where the
            model tells a story unasked.
    """

    turns: tuple[str, ...]


# How facts are written down: what stands between attribute and value, and between two attributes.
NOTATIONS = (
    ("：", "；"),
    ("：", "，"),
    ("是", "，"),
    ("=", "、"),
    ("-", "*"),
    ("：", "*"),
    ("#", "；"),
    ("#", "、"),
    ("-", "/"),
)

SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("你好", "您好", "你好啊", "嗨", "你好！", "在吗？"),
        ("你好，很高兴见到你！想聊聊衣服，还是家居用品？", "你好！有什么可以帮你的吗？"),
    ),
    (
        ("你是谁？", "介绍一下你自己。", "你叫什么名字？", "你是什么？"),
        ("我是一个小小的聊天模型，懂一点衣服和家居用品。",),
    ),
    (
        ("你会做什么？", "你能做什么？", "你有什么本领？", "你能帮我什么？"),
        ("我可以回答商品的问题，比较两件东西，也可以陪你聊天。",),
    ),
    (
        ("谢谢", "谢谢你！", "多谢", "太感谢了"),
        ("不客气，随时可以找我。", "不用谢，能帮上忙就好。"),
    ),
    (("再见", "拜拜", "我走了", "下次再聊"), ("再见，祝你今天愉快！", "再见，期待下次和你聊天。")),
    (("早上好", "早安", "早"), ("早上好！新的一天，穿得漂亮一点吧。",)),
    (("晚上好", "晚安", "我要睡了"), ("晚安，盖好毛毯，做个好梦。",)),
    (("今天天气怎么样？", "外面下雨了吗？"), ("我看不到窗外，不过出门记得看看天空。",)),
    (("你多大了？", "你几岁？"), ("我刚刚学会说话，还很小呢。",)),
    (("你喜欢什么颜色？", "你最喜欢哪种颜色？"), ("我喜欢蓝色，像晴天一样舒心。",)),
    (("你开心吗？", "你好吗？", "最近怎么样？"), ("我很好，谢谢关心！你呢？",)),
    (("我很累", "今天好累", "我累了"), ("辛苦了，找一把舒服的椅子坐一会儿吧。",)),
    (("我很开心", "今天真高兴"), ("真好！好心情会让人更好看。",)),
    (("我不开心", "我有点难过"), ("别难过，喝一杯热水，慢慢说给我听。",)),
    (("我冷", "好冷啊", "天冷了"), ("多穿一件毛衣，别着凉了。",)),
    (("我热", "好热啊", "天热了"), ("换一件短袖，多喝水。",)),
    (("我饿了", "好饿"), ("快去餐厅吃点东西吧，别饿着。",)),
    (("讲个笑话", "说个笑话吧"), ("台灯对水杯说：你别总是装，我都看透了。",)),
    (("你会写诗吗？", "写一首诗"), ("窗前一盏灯，桌上一只杯，夜色静静落，等你慢慢归。",)),
    (("你真棒", "你真聪明", "你好厉害"), ("谢谢夸奖，我会继续努力！",)),
    (("你说错了", "不对", "你错了"), ("对不起，请再告诉我一次，我会认真看。",)),
    (("我该买什么？", "推荐点东西吧", "有什么推荐？"), ("先说说是自己用还是送人，喜欢什么颜色？",)),
    (("怎么洗真丝？", "真丝怎么洗？"), ("真丝要用冷水轻轻洗，不要用力拧。",)),
    (("怎么洗羊毛？", "毛衣怎么洗？"), ("毛衣要用温水手洗，平铺晾干。",)),
    (("陶瓷会碎吗？", "玻璃会碎吗？"), ("会的，要轻拿轻放。",)),
    (("你是人吗？", "你是机器人吗？"), ("我不是人，我是一个聊天模型。",)),
    (("你会唱歌吗？", "唱首歌吧"), ("我不会唱歌，不过可以给你讲故事。",)),
    (("我想送朋友礼物", "送妈妈什么好？"), ("可以送一条毛毯或者一只花瓶，实用又贴心。",)),
)

PEOPLE = ("小林", "阿梅", "老周", "小雨", "王老师", "妈妈", "爸爸", "奶奶", "邻居", "同事")
TIMES = ("早上", "中午", "傍晚", "周末", "昨天", "放假的时候", "下班以后", "一个雨天")
PLACES = ("商场", "街角的小店", "市集", "网上", "朋友家", "旧货店")
BEGINNINGS = (
    "{t}，{p}在{w}看中了{one}",
    "{p}{t}在{w}买了{one}",
    "店里新到了{one}",
    "{p}收到的礼物是{one}",
    "{p}的家里有{one}",
    "今天想说说{one}",
)
ENDINGS = (
    "{p}很喜欢",
    "大家看了都说好",
    "{p}高兴地笑了",
    "价钱也不贵",
    "{p}想再买一{m}",
    "真是一次愉快的购物",
    "朋友们都来问是哪里买的",
)
DAYS = (  # {a} is worn, {b} is used; between them they hold the everyday words of advertisements
    "{t}，{p}穿上{a}，坐在{b}旁边看书。",
    "{p}把{b}放好，又把{a}叠起来。",
    "{t}，{p}带着{b}去朋友家，身上穿着{a}。",
    "{w}里有{a}，也有{b}，{p}看了很久。",
    "{p}说：{a}配{b}，真是好看。",
    "{p}问：{a}和{b}，哪个更便宜？",
    "{t}，{p}打开衣橱，怎么也找不到{a}。",
    "{p}本来只想看看，{a}却让人心动。",
    "{p}说：不妨带上{b}，路上用得着。",
    "{p}想：{b}自用不错，送人也合适。",
    "给家里添{b}，{p}觉得多一份温度。",
    "{p}每天看着{b}，心里很欢喜。",
    "{p}过日子很讲究，{a}总是干干净净。",
    "从今天开始，{p}要认真生活，先买了{b}。",
    "{a}是{p}日常上班穿的，值得多买一件。",
    "{p}怎能忘了{b}，又回去把它带回家。",
    "谁不想拥有{a}呢，{p}高兴得像个孩子。",
    "{a}一上身，{p}就让大家认不出来了。",
    "好日子里少了{b}可不行，{p}想要一个新的。",
    "{p}说：{a}也能穿出新意，心情大不一样。",
)
CLOTHES = tuple(kind for kind in KINDS if kind.is_clothing)
HOUSEHOLD = tuple(kind for kind in KINDS if not kind.is_clothing)


def write_facts(rng: Random, product: Product, notation: tuple[str, str]) -> str:
    """The attributes in a notation, mostly with the kind in front."""
    between, after = notation
    facts = list(product.attributes.items())
    if rng.random() < 0.7:
        facts.insert(0, ("类型", product.kind.name))
    return after.join(f"{key}{between}{value}" for key, value in facts)


def make_listed_product(rng: Random, fewest: int, most: int) -> Product:
    """A product whose facts are listed in any order."""
    product = make_product(rng, fewest, most)
    facts = list(product.attributes.items())
    rng.shuffle(facts)
    return Product(product.kind, dict(facts))


def ask(rng: Random, product: Product, question: str) -> str:
    """A question and the facts it is about, in either order."""
    facts = write_facts(rng, product, rng.choice(NOTATIONS))
    return f"{question}{facts}" if rng.random() < 0.3 else f"{facts}。{question}"


def ask_value(rng: Random, product: Product) -> tuple[str, str]:
    """Which value has one attribute?"""
    key, value = rng.choice(list(product.attributes.items()))
    return rng.choice(
        (
            (f"{product.this}的{key}是什么？", f"{product.this}的{key}是{value}。"),
            (f"{key}是什么？", f"{key}是{value}。"),
            (f"它的{key}呢？", f"是{value}。"),
            (f"请问{key}是哪一种？", f"{value}。"),
        )
    )


def ask_key(rng: Random, product: Product) -> tuple[str, str]:
    """Which attribute has this value?"""
    key, value = rng.choice(list(product.attributes.items()))
    return f"{value}说的是哪一项？", f"{value}说的是{key}。"


def ask_whether(rng: Random, product: Product) -> tuple[str, str]:
    """Is it so? Half of the time it is not."""
    key, value = rng.choice(list(product.attributes.items()))
    other = rng.choice(product.kind.values[key]) if rng.random() < 0.5 else value
    answer = f"是的，{key}是{value}。" if other == value else f"不是，{key}是{value}。"
    return f"{product.this}的{key}是{other}吗？", answer


def ask_missing(rng: Random, product: Product) -> tuple[str, str]:
    """An attribute that is not given: say so."""
    key = rng.choice([key for key in VALUES if key not in product.attributes])
    return f"{product.this}的{key}是什么？", f"这里没有提到{key}。"


def ask_opinion(rng: Random, product: Product) -> tuple[str, str]:
    """What is good about one attribute or two of them?"""
    keys = rng.sample(list(product.attributes), rng.choice((1, 1, 2)))
    clauses = [make_clause(rng, key, product.attributes[key]) for key in keys]
    question = rng.choice(("说说{k}。", "{k}怎么样？", "{k}好在哪里？"))
    return question.format(k="和".join(keys)), "，".join(clauses) + "。"


def ask_everything(rng: Random, product: Product) -> tuple[str, str]:
    """Read the facts out, in plain words."""
    told = "，".join(f"{key}是{value}" for key, value in product.attributes.items())
    question = rng.choice(("把这些信息念一遍。", "它是什么样的？", "请用一句话说明。"))
    return question, f"这是{product.one}，{told}。"


def ask_listing(rng: Random, product: Product) -> tuple[str, str]:
    """Which attributes, or which values, are there?"""
    keys, values = "、".join(product.attributes), "、".join(product.attributes.values())
    return rng.choice((("一共有哪几项？", f"有{keys}。"), ("用了哪些词？", f"有{values}。")))


QUESTIONS: tuple[Callable[[Random, Product], tuple[str, str]], ...] = (
    ask_value,
    ask_key,
    ask_whether,
    ask_missing,
    ask_opinion,
    ask_opinion,
    ask_opinion,
    ask_everything,
    ask_listing,
)


def answer_question(rng: Random) -> Example:
    """A question about given facts."""
    product = make_listed_product(rng, 2, 6)
    question, answer = rng.choice(QUESTIONS)(rng, product)
    return Example((ask(rng, product, question), answer))


def answer_twice(rng: Random) -> Example:
    """A second question about facts that were given with the first."""
    product = make_listed_product(rng, 2, 5)
    first, second = rng.choice(QUESTIONS), rng.choice(QUESTIONS)
    question, answer = first(rng, product)
    return Example((ask(rng, product, question), answer, *second(rng, product)))


def take_note(rng: Random) -> Example:
    """Facts without a question: say what was understood and ask what is wanted."""
    product = make_listed_product(rng, 2, 6)
    answer = rng.choice(
        (
            f"好的，这是{product.one}。您想了解它的哪一点？",
            f"收到，{product.this}的信息我记下了。请问想知道什么？",
        )
    )
    return Example((write_facts(rng, product, rng.choice(NOTATIONS)), answer))


def compare(rng: Random) -> Example:
    """Two things of one kind, told apart by one attribute."""
    first = make_product(rng, 2, 4)
    values = first.kind.values
    other = {key: rng.choice(values[key]) for key in first.attributes}
    second = Product(first.kind, other)
    m, (key, value) = first.kind.measure, rng.choice(list(first.attributes.items()))
    notation = rng.choice(NOTATIONS)
    listed = [write_facts(rng, product, notation) for product in (first, second)]
    facts = f"第一{m}：{listed[0]}。第二{m}：{listed[1]}。"
    if value == other[key]:
        return Example((f"{facts}{key}一样吗？", f"一样，都是{value}。"))
    if rng.random() < 0.5:
        return Example(
            (f"{facts}{key}一样吗？", f"不一样，第一{m}是{value}，第二{m}是{other[key]}。")
        )
    place, wanted = rng.choice((("一", value), ("二", other[key])))
    return Example((f"{facts}哪一{m}是{wanted}？", f"第{place}{m}是{wanted}。"))


def tell_knowledge(rng: Random) -> Example:
    """Questions about the world that need no facts in the context."""
    kind = rng.choice(KINDS)
    key = rng.choice(list(kind.values))
    value = rng.choice(kind.values[key])
    group = "衣服" if kind.is_clothing else "家居用品"
    asked = rng.choice(("衣服", "家居用品"))
    verdict = "是的" if asked == group else "不是"
    praise = "，".join(VALUES[key][value])
    clause = make_clause(rng, key, value)
    return Example(
        rng.choice(
            (
                (
                    f"{kind.name}有哪些{key}？",
                    f"{kind.name}的{key}有{'、'.join(kind.values[key])}。",
                ),
                (f"{value}有什么好处？", f"{value}{praise}。"),
                (f"{value}的{kind.name}好吗？", f"很好，{clause}。"),
                (f"{value}是什么？", f"{value}是一种{key}。"),
                (f"{kind.name}是{asked}吗？", f"{verdict}，{kind.name}是{group}。"),
                (
                    f"{kind.name}怎么数？",
                    f"一{kind.measure}{kind.name}，两{kind.measure}{kind.name}。",
                ),
            )
        )
    )


def chat(rng: Random) -> Example:
    """Small talk, now and then after another exchange."""
    questions, answers = rng.choice(SMALL_TALK)
    last = (rng.choice(questions), choose(rng, answers))
    if rng.random() < 0.7:
        return Example(last)
    before = rng.choice((answer_question, chat, tell_knowledge))(rng).turns
    return Example((*before[:2], *last))


def tell_story(rng: Random) -> Example:
    """Somebody comes by a thing and finds good words for it; told unasked, or on from a beginning."""
    product = make_product(rng, 2, 5)
    names = {"t": rng.choice(TIMES), "p": rng.choice(PEOPLE), "w": rng.choice(PLACES)}
    beginning = rng.choice(BEGINNINGS).format(one=product.one, **names)
    keys = list(product.attributes)
    if rng.random() < 0.4:
        rng.shuffle(keys)
    clauses = [make_clause(rng, key, product.attributes[key]) for key in keys]
    clauses.append(rng.choice(ENDINGS).format(m=product.kind.measure, **names))
    pairs = ["，".join(clauses[i : i + 2]) for i in range(0, len(clauses), 2)]
    rest = "。".join(pairs) + "。"
    if rng.random() < 0.3:
        return Example((f"接着写：{beginning}。", rest))
    return Example(("", f"{beginning}。{rest}"))


def tell_day(rng: Random) -> Example:
    """A few sentences of daily life."""
    text = ""
    for _ in range(rng.randint(1, 3)):
        worn, used = make_product(rng, 1, 1, CLOTHES), make_product(rng, 1, 1, HOUSEHOLD)
        a, b = (
            f"一{x.kind.measure}{rng.choice(x.kind.values['颜色'])}的{x.kind.name}"
            for x in (worn, used)
        )
        scene = {"t": rng.choice(TIMES), "p": rng.choice(PEOPLE), "w": rng.choice(PLACES)}
        text += rng.choice(DAYS).format(a=a, b=b, **scene)
    return Example(("", text))


def tell_differences(rng: Random) -> Example:
    """What several values of one attribute are like, one after the other."""
    key = rng.choice(list(CLAUSES))
    values = rng.sample(list(VALUES[key]), min(3, len(VALUES[key])))
    told = "；".join(f"{value}{rng.choice(VALUES[key][value])}" for value in values)
    if rng.random() < 0.5:
        return Example((f"{'、'.join(values)}有什么不同？", f"{told}。"))
    return Example(("", f"说到{key}，{told}。"))


WRITERS: tuple[tuple[Callable[[Random], Example], int], ...] = (
    (answer_question, 32),
    (tell_story, 28),
    (compare, 8),
    (answer_twice, 6),
    (tell_knowledge, 6),
    (chat, 6),
    (tell_day, 8),
    (tell_differences, 3),
    (take_note, 3),
)


def make_examples(seed: int) -> Iterator[Example]:
    """An endless stream of things to read; the same for the same seed."""
    rng = Random(seed)
    writers, weights = zip(*WRITERS, strict=True)
    while True:
        yield rng.choices(writers, weights)[0](rng)

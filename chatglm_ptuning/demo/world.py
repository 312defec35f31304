"""The little world of the demo: clothes and household goods, what they are like and what can be said of it.

Everything that the demo model ever reads is made of these tables. They hold facts (which value an attribute can have,
on which goods) and clauses that speak of one attribute. How facts and clauses become a text is decided elsewhere:
`pretraining` makes conversations and stories, `advertisements` makes the task that the model is tuned on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

# attribute -> value -> what is good about it. No praise contains the value of another attribute.
VALUES: dict[str, dict[str, tuple[str, ...]]] = {
    "颜色": {
        "白色": ("清爽干净", "百搭耐看"),
        "黑色": ("沉稳大气", "经典耐看"),
        "红色": ("热情亮眼", "衬得气色很好"),
        "蓝色": ("宁静清透", "像晴天一样舒心"),
        "绿色": ("充满生机", "自然又养眼"),
        "黄色": ("明快活泼", "带来阳光般的好心情"),
        "粉色": ("温柔可人", "满是少女心"),
        "灰色": ("低调耐看", "不张扬也不沉闷"),
        "米色": ("温暖柔和", "素雅大方"),
        "棕色": ("沉静踏实", "像秋天的森林"),
        "紫色": ("神秘浪漫", "很有贵气"),
        "橙色": ("明亮醒目", "让人心情愉快"),
    },
    "材质": {
        "纯棉": ("亲肤透气", "柔软舒适"),
        "亚麻": ("凉爽吸汗", "肌理自然"),
        "真丝": ("光泽细腻", "顺滑贴身"),
        "羊毛": ("蓬松保暖", "厚实有弹性"),
        "羊绒": ("轻盈软糯", "暖意十足"),
        "牛仔": ("结实耐磨", "越穿越有味道"),
        "雪纺": ("轻薄飘逸", "垂感很好"),
        "针织": ("弹力十足", "贴合身形"),
        "陶瓷": ("釉面温润", "手感细腻"),
        "玻璃": ("晶莹剔透", "容易清洗"),
        "实木": ("纹理清晰", "稳固耐用"),
        "竹制": ("天然环保", "轻巧结实"),
        "藤编": ("透气轻便", "手工感十足"),
        "金属": ("线条硬朗", "质感出众"),
        "绒布": ("触感丝滑", "光泽柔和"),
    },
    "风格": {
        "简约": ("没有多余的装饰", "干净利落"),
        "复古": ("自带岁月的韵味", "越看越有故事"),
        "文艺": ("透着淡淡的书卷气", "安静而有格调"),
        "清新": ("像初夏的微风", "让人眼前一亮"),
        "甜美": ("可爱又不失大方", "让笑容更加明亮"),
        "休闲": ("随性自在", "轻松没有负担"),
        "优雅": ("举手投足都有气质", "温婉动人"),
        "运动": ("充满活力", "动起来毫无束缚"),
        "北欧": ("明亮通透", "实用与美观兼顾"),
        "日式": ("素净安宁", "贴近自然"),
        "田园": ("带来山野的气息", "温馨又亲切"),
        "轻奢": ("精致有质感", "提升家的品位"),
    },
    "图案": {
        "条纹": ("线条分明", "规律而有节奏"),
        "格子": ("规整又不呆板", "学院气息十足"),
        "碎花": ("仿佛走进春天的花园", "烂漫又灵动"),
        "波点": ("俏皮可爱", "跳跃而不杂乱"),
        "刺绣": ("针脚细密", "精致有匠心"),
        "卡通": ("童趣满满", "让人会心一笑"),
        "几何": ("富有现代感", "简洁有力"),
        "花鸟": ("栩栩如生", "很有东方意境"),
    },
    "版型": {
        "宽松": ("不挑身材", "活动自如"),
        "修身": ("勾勒出好身材", "显瘦又精神"),
        "直筒": ("线条流畅", "走路带风"),
        "高腰": ("拉长双腿", "小个子也能轻松驾驭"),
        "短款": ("显得个子更高", "利落又俏皮"),
        "长款": ("遮肉又有气场", "走动间自带风度"),
    },
    "领型": {
        "圆领": ("修饰脸型", "舒适不勒脖"),
        "翻领": ("挺括有型", "干练大方"),
        "立领": ("衬托颈部线条", "精神十足"),
        "方领": ("露出漂亮的锁骨", "别致又大方"),
        "高领": ("贴心护颈", "挡风又保暖"),
    },
    "袖型": {
        "长袖": ("遮风又防晒", "四季都能穿"),
        "短袖": ("凉快轻便", "抬手毫不费力"),
        "泡泡袖": ("蓬松有型", "藏住手臂的肉肉"),
        "灯笼袖": ("随风轻轻摆动", "浪漫又别致"),
        "喇叭袖": ("线条柔美", "衬得手腕纤细"),
    },
    "细节": {
        "口袋": ("放小物件很方便", "实用又有层次"),
        "拉链": ("穿脱顺滑", "带来一点酷劲"),
        "纽扣": ("圆润光滑", "小处也见用心"),
        "腰带": ("收出纤细的腰身", "打破单调"),
        "蝴蝶结": ("俏丽动人", "增添一份灵气"),
        "流苏": ("摇曳生姿", "走动时格外好看"),
        "蕾丝": ("若隐若现", "多了几分精致"),
    },
    "季节": {
        "春季": ("出门踏青正合适", "迎着花香出门"),
        "夏季": ("一点也不闷热", "清凉一整天"),
        "秋季": ("早晚温差也不怕", "和落叶一样有诗意"),
        "冬季": ("寒风里也暖洋洋", "轻松抵御寒冷"),
    },
    "功能": {
        "调光": ("明暗随心", "照顾每一种心情"),
        "护眼": ("光线均匀不刺眼", "夜里读书不累"),
        "保温": ("半天过去还是热的", "随时喝到暖暖的一口"),
        "防漏": ("放进包里也放心", "倒过来也不洒"),
        "机洗": ("打理起来很省心", "洗后依旧平整"),
        "抗静电": ("干燥的日子也不怕", "贴身使用更安心"),
        "折叠": ("收纳不占地方", "搬家也很轻松"),
        "防滑": ("放得稳稳当当", "老人孩子都能放心用"),
        "调节": ("高低随意变化", "适合全家人使用"),
    },
    "场景": {
        "卧室": ("陪伴每一个安静的夜晚", "营造放松的气氛"),
        "客厅": ("成为待客时的焦点", "让家里更有生气"),
        "书房": ("让人静下心来", "给工作添一点乐趣"),
        "餐厅": ("让一家人吃得更香", "为餐桌添彩"),
        "阳台": ("午后晒太阳正好", "角落也变得可爱"),
        "办公室": ("忙碌中添一份惬意", "桌面也更整洁"),
    },
}

# What is said of one attribute: {v} its value, {b} what is good about it. The first form is the commonest.
CLAUSES: dict[str, tuple[str, ...]] = {
    "颜色": ("{v}的外观{b}", "以{v}为主色，{b}", "一抹{v}，{b}", "{v}看上去{b}"),
    "材质": ("选用{v}材质，{b}", "{v}的质地{b}", "精选{v}用料，{b}", "{v}摸起来很舒服，{b}"),
    "风格": ("{v}的风格{b}", "整体走{v}路线，{b}", "{v}的设计{b}", "透出{v}的味道，{b}"),
    "图案": ("{v}图案{b}", "点缀着{v}图案，{b}", "饰有{v}花纹，{b}", "{v}元素{b}"),
    "版型": ("{v}的版型{b}", "采用{v}剪裁，{b}", "{v}的轮廓{b}", "做成{v}的样子，{b}"),
    "领型": ("{v}设计{b}", "搭配{v}，{b}", "领口是{v}，{b}", "时髦的{v}{b}"),
    "袖型": ("{v}设计{b}", "配上{v}，{b}", "袖子是{v}，{b}", "好看的{v}{b}"),
    "细节": ("巧妙的{v}{b}", "加上{v}装饰，{b}", "细看还有{v}，{b}", "{v}是点睛之笔，{b}"),
    "季节": ("{v}穿着{b}", "特别适合{v}，{b}", "为{v}而准备，{b}", "到了{v}，{b}"),
    "功能": ("具备{v}功能，{b}", "贴心的{v}设计，{b}", "{v}效果出色，{b}", "支持{v}，{b}"),
    "场景": ("放在{v}，{b}", "很适合{v}，{b}", "摆进{v}，{b}", "为{v}而设计，{b}"),
}


@dataclass(frozen=True)
class Kind:
    """One kind of goods.

    Attributes:
        name: Its name.
        measure: Its measure word.
        values: Attribute -> the values it can have on these goods, in the order in which they are told.
    """

    name: str
    measure: str
    values: dict[str, tuple[str, ...]]

    @property
    def is_clothing(self) -> bool:
        """Worn, not put somewhere."""
        return "版型" in self.values


def clothing(name: str, measure: str, materials: str, cuts: str, *others: str) -> Kind:
    """A garment: its own materials, cuts and further attributes; every colour and most styles and patterns."""
    values = {"材质": tuple(materials.split()), "颜色": tuple(VALUES["颜色"])}
    values["风格"] = ("简约", "复古", "文艺", "清新", "甜美", "休闲", "优雅", "运动")
    values["图案"] = ("条纹", "格子", "碎花", "波点", "刺绣", "卡通", "几何")
    values["版型"] = tuple(cuts.split())
    return Kind(name, measure, values | {key: tuple(VALUES[key]) for key in (*others, "季节")})


def household(name: str, measure: str, materials: str, functions: str, places: str) -> Kind:
    """Something for the home: its own materials, functions and places."""
    values = {"材质": tuple(materials.split()), "颜色": tuple(VALUES["颜色"])}
    values["风格"] = ("简约", "复古", "文艺", "清新", "北欧", "日式", "田园", "轻奢")
    values["图案"] = ("条纹", "格子", "碎花", "波点", "卡通", "几何", "花鸟")
    values |= {"功能": tuple(functions.split()), "场景": tuple(places.split())}
    return Kind(name, measure, values)


KINDS: tuple[Kind, ...] = (
    clothing("上衣", "件", "纯棉 亚麻 真丝 雪纺 针织", "宽松 修身 短款", "领型", "袖型", "细节"),
    clothing(
        "衬衫", "件", "纯棉 亚麻 真丝 雪纺 牛仔", "宽松 修身 直筒 短款", "领型", "袖型", "细节"
    ),
    clothing("外套", "件", "羊毛 羊绒 牛仔 纯棉", "宽松 修身 直筒 短款 长款", "领型", "细节"),
    clothing("毛衣", "件", "羊毛 羊绒 针织", "宽松 修身 短款 长款", "领型", "细节"),
    clothing(
        "连衣裙", "条", "纯棉 亚麻 真丝 雪纺 针织", "宽松 修身 高腰 长款", "领型", "袖型", "细节"
    ),
    clothing("半身裙", "条", "纯棉 亚麻 牛仔 雪纺 针织", "高腰 直筒 修身 长款", "细节"),
    clothing("长裤", "条", "纯棉 亚麻 牛仔 羊毛", "宽松 修身 直筒 高腰", "细节"),
    clothing("短裤", "条", "纯棉 亚麻 牛仔", "宽松 直筒 高腰", "细节"),
    household("台灯", "盏", "实木 金属 玻璃 陶瓷", "调光 护眼 折叠", "卧室 客厅 书房 办公室"),
    household("水杯", "只", "陶瓷 玻璃 金属", "保温 防漏 防滑", "客厅 书房 餐厅 办公室"),
    household("毛毯", "条", "羊毛 羊绒 绒布 纯棉", "机洗 抗静电", "卧室 客厅 办公室"),
    household("抱枕", "个", "亚麻 纯棉 绒布", "机洗 抗静电", "卧室 客厅 阳台"),
    household("花瓶", "只", "陶瓷 玻璃 金属 竹制", "防滑 防漏", "客厅 书房 餐厅 阳台"),
    household("椅子", "把", "实木 藤编 金属 竹制", "折叠 调节 防滑", "客厅 书房 餐厅 阳台"),
    household("书架", "个", "实木 竹制 金属", "折叠 调节 防滑", "卧室 客厅 书房 办公室"),
    household("餐盘", "只", "陶瓷 玻璃 竹制", "防滑 机洗", "餐厅 阳台 客厅"),
)


@dataclass(frozen=True)
class Product:
    """One thing of this world: its kind and its attributes, each with one value."""

    kind: Kind
    attributes: dict[str, str]

    @property
    def this(self) -> str:
        """The thing pointed at: 这件上衣."""
        return f"这{self.kind.measure}{self.kind.name}"

    @property
    def one(self) -> str:
        """The thing told of for the first time: 一件上衣."""
        return f"一{self.kind.measure}{self.kind.name}"


def choose(rng: Random, options: Sequence[str]) -> str:
    """One of the options, each a little likelier than the next, so that texts vary around a common form."""
    return rng.choices(options, [0.6**i for i in range(len(options))])[0]


def make_product(rng: Random, fewest: int, most: int, kinds: Sequence[Kind] = KINDS) -> Product:
    """A random product with so many attributes, told in the world's order."""
    kind = rng.choice(kinds)
    keys = rng.sample(list(kind.values), rng.randint(fewest, most))
    return Product(kind, {k: rng.choice(v) for k, v in kind.values.items() if k in keys})


def make_clause(rng: Random, key: str, value: str) -> str:
    """One clause that praises one attribute: 选用纯棉材质，亲肤透气."""
    return choose(rng, CLAUSES[key]).format(v=value, b=choose(rng, VALUES[key][value]))

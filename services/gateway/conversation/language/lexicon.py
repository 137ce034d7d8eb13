"""The English and Chinese phrases that customers of any shop use. Knows no shop's own words."""

from collections.abc import Mapping, Sequence
from enum import Enum, auto


class Keyword(Enum):
    """How a phrase modifies the tokens next to it."""

    CHEAPER = auto()
    MORE_EXPENSIVE = auto()
    AT_MOST = auto()
    AT_LEAST = auto()
    OR_LESS = auto()
    """At most the number before it."""
    OR_MORE = auto()
    """At least the number before it."""
    BETWEEN = auto()
    TO = auto()
    AROUND = auto()
    CURRENCY = auto()
    PRICE = auto()
    NOT = auto()
    WANT = auto()
    IN = auto()
    AND = auto()
    BREAK = auto()
    """Ends a clause."""
    LIKE = auto()
    THAN = auto()
    THIS = auto()
    IT = auto()
    """Refers to an item after a keyword of liking, negation or comparison; otherwise filler."""
    SAME = auto()
    OTHER = auto()
    FIRST = auto()
    LAST = auto()
    POSITION_PREFIX = auto()
    """The number after it is an item's position."""
    POSITION_SUFFIX = auto()
    """The number before it is an item's position."""
    FORGET = auto()
    ANY = auto()
    """Drops the constraints on the attributes that follow, but not on values."""
    INDIFFERENT = auto()
    """The attribute or value next to it does not matter."""
    RESET = auto()
    FILLER = auto()


PHRASES: Mapping[Keyword, str] = {
    Keyword.CHEAPER: "cheaper|less expensive|more affordable|too expensive|too dear|too pricey|"
    "not so expensive|not too expensive|not expensive|inexpensive|cheap|lower price|lower priced|"
    "costs less|cost less|便宜|便宜点|便宜一点|便宜一些|便宜些|更便宜|再便宜|太贵|太贵了|不贵|不太贵|"
    "别太贵|不要太贵|价格低一点|低价",
    Keyword.MORE_EXPENSIVE: "more expensive|pricier|dearer|too cheap|not so cheap|not cheap|higher price|"
    "higher priced|costs more|贵一点|贵一些|贵点|更贵|再贵|贵的|太便宜|太便宜了|高档一点|价格高一点",
    Keyword.AT_MOST: "under|below|less than|lower than|cheaper than|up to|at most|no more than|not more than|"
    "max|maximum|within|budget|budget of|not over|not above|不超过|低于|少于|小于|最多|不高于|预算|便宜过",
    Keyword.AT_LEAST: "over|above|more than|higher than|more expensive than|at least|no less than|"
    "not less than|min|minimum|not under|not below|高于|超过|大于|至少|最少|不低于|多于",
    Keyword.OR_LESS: "or less|or under|or below|and under|and below|or cheaper|以下|以内|之内|之下|内",
    Keyword.OR_MORE: "or more|or over|or above|and up|and over|and above|以上|之上|起",
    Keyword.BETWEEN: "between|from|介于",
    Keyword.TO: "to|-|–|—|~|到|至",
    Keyword.AROUND: "around|about|approximately|roughly|左右|大约|大概|上下",
    Keyword.CURRENCY: "€|$|£|¥|eur|euro|usd|dollar|buck|gbp|pound|rmb|cny|yuan|chf|kr|sek|元|块|块钱|元钱|"
    "人民币|美元|欧元",
    Keyword.PRICE: "price|the price|cost|价格|价钱|价位",
    Keyword.NOT: "not|no|neither|arent|isnt|is not|are not|nothing|without|except|except for|but not|"
    "but no|and not|and no|anything but|everything but|all but|other than|instead of|rather than|i dont want|"
    "dont want|do not want|dont show|do not show|i dont like|dont like|do not like|i hate|hate|dislike|"
    "unlike|different from|different to|avoid|exclude|never|nor|no more|不要|不想要|别|不是|除了|没有|不|"
    "不喜欢|不像|不同于|讨厌|排除|去掉|别给我",
    Keyword.WANT: "only|just|want|i want|i would like|id like|need|i need|rather|show me|give me|find me|"
    "only show|instead|要|只要|想要|我要|我想要|给我|换成|改成|来",
    Keyword.IN: "in|in a|in the|with|for|用",
    Keyword.AND: "and|or|、|和|或|或者|与|跟|以及|&|/",
    Keyword.BREAK: "but|however|though|yet|but rather|,|;|.|!|?|但|但是|可是|不过|而是|。",
    Keyword.LIKE: "like|i like|love|i love|similar to|something like|more like|looks like|looking like|像|"
    "类似|类似于|喜欢|我喜欢|好像|跟着",
    Keyword.THAN: "than|比|比起",
    Keyword.THIS: "this|this one|that one|这个|这件|这款|这条|这双|这种|这|那个|那件|那款",
    Keyword.IT: "it|that|它",
    Keyword.SAME: "same|the same|相同|相同的|同样|同样的|一样|一样的|同|同一个",
    Keyword.OTHER: "another|other|different|a different|其他|其它|其他的|别的|另一个|换个|换一个|不同|不同的",
    Keyword.LAST: "last|the last|last one|the last one|最后一个|最后一件|最后那个",
    Keyword.POSITION_PREFIX: "number|item|#|第",
    Keyword.POSITION_SUFFIX: "st|nd|rd|th",
    Keyword.FORGET: "forget|forget about|ignore|drop|never mind|dont care about|不管|忽略|忘了|忘掉|"
    "不考虑|取消",
    Keyword.ANY: "any|whatever|every|任何|随便什么|什么",
    Keyword.INDIFFERENT: "doesnt matter|does not matter|dont matter|do not matter|is not important|"
    "isnt important|无所谓|不限|都行|都可以|随便|不重要|没关系",
    Keyword.RESET: "start again|start over|reset|begin again|start from scratch|from scratch|"
    "forget everything|forget it all|forget all|clear|clear all|new search|重新开始|从头开始|重来|重置|"
    "清空|重新来",
    Keyword.FILLER: "a|an|the|as|i|im|me|my|mine|we|you|your|is|are|was|be|am|do|does|can|could|would|will|"
    "please|one|once|some|any more|something|anything|thing|product|of|on|at|by|so|very|much|a bit|"
    "a bit more|bit|a little|little|really|too|also|more|less|ones|them|they|these|those|there|hi|hello|"
    "thank|thank you|nope|sure|bad|good|nice|great|fine|yes|ok|okay|:|should|must|may|might|what|which|"
    "who|how|its|as well|well|then|now|id|ive|have|has|had|get|see|look|looking|looking for|"
    "search|find|show|give|maybe|perhaps|的|了|吗|呢|吧|啊|呀|我|你|您|他|她|请|看|看看|有|有没有|一些|"
    "一点|一下|些|点|件|条|双|个|款|只|穿|穿的|想|给|是|在|能|可以|还|还有|也|都|很|再|就|那|一个|一件|"
    "一条|一款|一双|东西|商品|产品|谢谢|你好|您好|帮我|找|推荐",
}
"""The phrases of each keyword. The longest match wins."""

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
"""Words for the positions of items, from 1."""

NUMERALS = {"零": 0, "一": 1, "二": 2, "两": 2, "三": 3, "四": 4, "五": 5, "六": 6, "七": 7, "八": 8, "九": 9}
UNITS = {"十": 10, "百": 100, "千": 1000, "万": 10000}
"""Chinese numerals, written without spaces."""

CONCEPTS: Sequence[Sequence[str]] = (
    ("colour", "color", "shade", "颜色", "色彩"),
    ("brand", "make", "maker", "manufacturer", "label", "品牌", "牌子", "厂家"),
    ("category", "kind", "type", "sort", "department", "类别", "种类", "类型", "分类"),
    ("material", "fabric", "材质", "材料", "面料"),
    ("size", "尺寸", "尺码", "大小"),
    ("style", "风格", "款式"),
    ("pattern", "print", "图案", "花纹"),
    ("season", "季节"),
    ("gender", "sex", "性别"),
)
"""Synonyms of attribute names: if an attribute's name contains one, a customer may use any of them."""

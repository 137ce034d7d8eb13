"""The reading of messages: phrases in English and Chinese, and what holds of any message at all."""

import asyncio
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services import filters, wire
from services.catalog import Attribute, Item, item_number
from services.gateway.cues import PHRASES
from services.gateway.dialogue import (
    MAX_CONDITIONS,
    MAX_DISLIKED,
    MAX_WORDS,
    Dialogue,
    Forget,
    Liking,
    Price,
    Reset,
    Values,
    Words,
    content_of,
    dialogue_from,
    filters_of,
)
from services.gateway.interpreter import Heard, Phrases, Reading, Shown
from services.gateway.readers import check
from services.gateway.replies import phrase, reply
from services.gateway.sentences import LANGUAGES
from services.gateway.vocabulary import Vocabularies, Vocabulary, vocabulary_of, words_of
from services.item_table import Change, ItemTable

COLOURS = ("Red", "blue", "红色", "粉红色", "green")
BRANDS = ("Nike", "New Look", "Under Armour", "耐克", "Orange")
KINDS = ("Dress", "T-shirt", "shoe", "连衣裙", "Coat")
NOW = datetime(2026, 3, 1, tzinfo=UTC)


def made(n: int) -> Item:
    texts = {"colour": COLOURS[n % 5], "brand_name": BRANDS[n % 5], "product_type": KINDS[n // 2 % 5]}
    attributes = [Attribute(name, (text,)) for name, text in texts.items()]
    sizes = Attribute("size", ("42", "M", "XL"))
    hidden = Attribute("_campaign", ("winter",))
    return Item(f"i{n}", f"thing {n}", price=5.0 * (n + 1), attributes=(*attributes, sizes, hidden))


ITEMS = [made(n) for n in range(20)]
TABLE = ItemTable.of(ITEMS, {}, {}, [NOW] * len(ITEMS))
WORDS = vocabulary_of(TABLE, {})
SHOWN = [Shown(i.id, {a.name: a.texts for a in i.attributes}, i.price) for i in ITEMS[:6]]
FOCUS = SHOWN[3]  # 粉红色, 耐克, T-shirt, for 20


def read(
    message: str,
    vocabulary: Vocabulary = WORDS,
    shown: Sequence[Shown] = SHOWN,
    focus: Shown | None = None,
) -> Reading:
    return Phrases().read(Heard(message, "en", vocabulary, shown, focus))


def folded(phrase: str) -> tuple[str, ...]:
    return tuple(word.key for word in words_of(phrase))


def colour(*texts: str, wanted: bool = True) -> Values:
    return Values("colour", texts, wanted)


def brand(*texts: str, wanted: bool = True) -> Values:
    return Values("brand_name", texts, wanted)


def kind(*texts: str, wanted: bool = True) -> Values:
    return Values("product_type", texts, wanted)


CHEAPER, DEARER = Price(high=15.0, alone=True), Price(low=20.0, alone=True)  # of 5, 10, .. 30: 17.5


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("cheaper", [CHEAPER]),
        ("something cheaper please", [CHEAPER]),
        ("that's too expensive", [CHEAPER]),
        ("shoes that are not too expensive", [CHEAPER, kind("shoe")]),
        ("more expensive", [DEARER]),
        ("not cheaper", [DEARER]),
        ("nothing cheaper please", [DEARER]),
        ("不要便宜的", [DEARER]),
        ("not more expensive", [CHEAPER]),
        ("不要更贵的", [CHEAPER]),
        ("not too expensive", [CHEAPER]),
        ("neither red nor blue", [colour("Red", "blue", wanted=False)]),
        ("neither Nike nor New Look", [brand("Nike", "New Look", wanted=False)]),
        ("neither the first nor the second", [Liking("i0", liked=False), Liking("i1", liked=False)]),
        ("isn't too cheap", [DEARER]),
        ("cheaper than the second one", [Price(high=5.0, alone=True)]),
        ("like item 2", [Liking("i1")]),
        ("more expensive than #2", [Price(low=15.0, alone=True)]),
        ("under 30", [Price(high=30.0)]),
        ("Under $29.90!", [Price(high=29.9)]),
        ("less than 1,299.50", [Price(high=1299.5)]),
        ("29,90 euros or less", [Price(high=29.9)]),
        ("no more than 25", [Price(high=25.0)]),
        ("at least 20 and at most 60", [Price(low=20.0), Price(high=60.0)]),
        ("between 10 and 20", [Price(10.0, 20.0, alone=True)]),
        ("20-10 eur", [Price(10.0, 20.0, alone=True)]),
        ("around 30", [Price(24.0, 36.0, alone=True)]),
        ("forget the price", [Forget("price")]),
        ("price doesn't matter", [Forget("price")]),
        ("forget the colour and the brand", [Forget("colour"), Forget("brand_name")]),
        ("any colour but red", [Forget("colour"), colour("Red", wanted=False)]),
        ("under 50 and over 10", [Price(high=50.0), Price(low=10.0)]),
        ("forget red", [Forget("colour")]),
        ("any brand", [Forget("brand_name")]),
        ("in red", [colour("Red")]),
        ("RED dresses", [colour("Red"), kind("Dress")]),
        ("red or blue, not green", [colour("Red", "blue"), colour("green", wanted=False)]),
        ("not red but blue", [colour("Red", wanted=False), colour("blue")]),
        ("anything but dresses", [kind("Dress", wanted=False)]),
        ("no Nike", [brand("Nike", wanted=False)]),
        ("no Nike and in red", [brand("Nike", wanted=False), colour("Red")]),
        ("not New Look or Under Armour", [brand("New Look", "Under Armour", wanted=False)]),
        ("t-shirts", [kind("T-shirt")]),
        ("size 42", [Values("size", ("42",))]),
        ("in size m", [Values("size", ("M",))]),
        ("xl", [Values("size", ("XL",))]),
        ("like the second one but for winter", [Liking("i1"), Words(("winter",))]),
        ("the last one in blue", [Liking("i5"), colour("blue")]),
        ("I don't like the 2nd", [Liking("i1", liked=False)]),
        ("nothing like number 3", [Liking("i2", liked=False)]),
        ("the same colour as the first one", [colour("Red")]),
        ("I don't want the colour of the first one", [colour("Red", wanted=False)]),
        ("for my baby's first birthday", [Words(("babys", "first", "birthday"))]),
        ("start again", [Reset()]),
        ("start over with red", [Reset(), colour("Red")]),
        ("not woollen", [Words(("woollen",), wanted=False)]),
        ("a warm jacket for 50 euros or less", [Price(high=50.0), Words(("warm", "jacket"))]),
        ("便宜一点", [CHEAPER]),
        ("太贵了", [CHEAPER]),
        ("贵一点的", [DEARER]),
        ("30元以下", [Price(high=30.0)]),
        ("一百二十块以内", [Price(high=120.0)]),
        ("预算二百元", [Price(high=200.0)]),
        ("不要超过30", [Price(high=30.0)]),
        ("不超过50元外套", [Price(high=50.0), Words(("外套",))]),
        ("100到200元", [Price(100.0, 200.0, alone=True)]),
        ("比第三个便宜", [Price(high=10.0, alone=True)]),
        ("价格无所谓", [Forget("price")]),
        ("不限颜色", [Forget("colour")]),
        ("要红色的", [colour("红色")]),
        ("有没有粉红色的连衣裙", [colour("粉红色"), kind("连衣裙")]),
        ("不要红色", [colour("红色", wanted=False)]),
        ("除了连衣裙都可以", [kind("连衣裙", wanted=False)]),
        ("不是红色，是粉红色", [colour("红色", wanted=False), colour("粉红色")]),
        ("像第二个，但是冬天穿的", [Liking("i1"), Words(("冬天",))]),
        ("不要第一个", [Liking("i0", liked=False)]),
        ("喜欢第3个", [Liking("i2")]),
        ("跟第二个同样的颜色", [colour("blue")]),
        ("重新开始", [Reset()]),
        ("高跟鞋", [Words(("高跟鞋",))]),
        ("有机棉内衣", [Words(("有机棉内衣",))]),
    ],
)  # fmt: skip
def test_a_phrase_means(message: str, changes: list[Any]) -> None:
    reading = read(message)
    assert sorted(map(repr, reading.changes)) == sorted(map(repr, changes))
    assert reading.not_understood == ()


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("not this brand", [brand("耐克", wanted=False)]),
        ("不要这个牌子", [brand("耐克", wanted=False)]),
        ("换个牌子", [brand("耐克", wanted=False)]),
        ("和这个一样的颜色", [colour("粉红色")]),
        ("a different colour", [colour("粉红色", wanted=False)]),
        ("cheaper than this", [Price(high=15.0, alone=True)]),
        ("like this but in red", [Liking("i3"), colour("Red")]),
        ("not this one", [Liking("i3", liked=False)]),
        ("I don't like it", [Liking("i3", liked=False)]),
        ("anything like that in green", [Liking("i3"), colour("green")]),
        ("shoes that aren't Nike", [kind("shoe"), brand("Nike", wanted=False)]),
        ("do you have it in green?", [colour("green")]),
    ],
)
def test_this_is_what_the_person_looks_at(message: str, changes: list[Any]) -> None:
    assert read(message, focus=FOCUS) == Reading(tuple(changes))
    assert read(message, shown=[FOCUS]) == Reading(tuple(changes))
    assert read(message).not_understood or "this" not in message


@pytest.mark.parametrize(
    ("message", "strange"),
    [
        ("like the seventh one", ("seventh",)),
        ("the 40th", ("40",)),
        ("第九个", ("九",)),
        ("not this one", ("this one",)),
        ("not this brand", ("this", "brand")),
        ("😀", ("😀",)),
        ("30", ("30",)),
        ("…!?", ()),
        ("", ()),
    ],
)
def test_what_is_not_understood_is_told(message: str, strange: tuple[str, ...]) -> None:
    assert read(message) == Reading((), strange)
    assert read("cheaper", shown=()) == Reading((), ("cheaper",))


def test_no_phrase_means_two_things() -> None:
    meant = {(key, cue) for cue, some in PHRASES.items() for key in map(folded, some.split("|"))}
    assert len({key for key, _ in meant}) == len(meant)
    assert () not in {key for key, _ in meant}


def test_a_word_of_two_attributes_is_what_most_items_have_unless_one_is_named() -> None:
    items = [
        Item(f"o{n}", "x", attributes=(Attribute("colour" if n else "brand", ("orange",)),)) for n in range(3)
    ]
    words = vocabulary_of(ItemTable.of(items, {}, {}, [NOW] * 3), {})
    assert read("orange", vocabulary=words).changes == (Values("colour", ("orange",)),)
    assert read("brand orange", vocabulary=words).changes == (Values("brand", ("orange",)),)


def test_the_vocabulary_follows_the_table() -> None:
    table = ItemTable.of(ITEMS[:2], {}, {}, [NOW] * 2)

    async def body() -> None:
        vocabularies = Vocabularies(table)
        first = await vocabularies.now()
        assert first is await vocabularies.now()
        assert read("green", vocabulary=first).changes == (Words(("green",)),)
        table.apply([Change(item_number("i4"), 1, ITEMS[4], NOW)])
        assert read("green", vocabulary=await vocabularies.now()).changes == (colour("green"),)
        table.apply([Change(item_number("i4"), 2, None)])
        assert read("green", vocabulary=await vocabularies.now()).changes == (Words(("green",)),)

    asyncio.run(body())
    assert ("winter",) not in WORDS.values  # for filters alone
    assert WORDS.values["dress",][0].items == sum(i.attributes[2].texts == ("Dress",) for i in ITEMS)


def test_an_attribute_that_came_late_is_known_of_the_items_that_have_it() -> None:
    table = ItemTable(capacity=4)
    for n in range(10):
        table.apply([Change(n, n, Item(f"i{n}", "x"), NOW)])
    table.apply([Change(2, 10, Item("i2", "x", attributes=(Attribute("shape", ("round", "flat")),)), NOW)])
    assert [table.texts_of("shape", row) for row in (2, 9)] == [("round", "flat"), ()]


def test_spellings_of_a_value_are_one() -> None:
    items = [
        Item(f"s{n}", "x", attributes=(Attribute("colour", (t,)),))
        for n, t in enumerate(["Red", "RED", "Red"])
    ]
    words = vocabulary_of(ItemTable.of(items, {}, {}, [NOW] * 3), {})
    assert read("reds", vocabulary=words).changes == (colour("Red", "RED"),)


ANYTHING = st.one_of(
    st.text(max_size=200),
    st.lists(
        st.sampled_from(
            [p for some in PHRASES.values() for p in some.split("|")]
            + [
                *COLOURS,
                *BRANDS,
                *KINDS,
                "second",
                "第",
                "二",
                "十",
                "百",
                "30",
                "1,5",
                "9" * 60,
                "42",
                "colour",
                "size",
            ]
        ),
        max_size=30,
    ).map(" ".join),
    st.text("不要红色第二三十百万个元块以下的比便宜这牌子和到像0123456789.,- ", max_size=60),
)


@settings(deadline=None)
@given(ANYTHING, st.booleans(), st.booleans())
@example("9" * 2000, False, False)
@example("万" * 2000, False, False)
@example("\u202e\u0000\u200d", False, False)
@example("٣٣ under ٣", True, True)
def test_any_message_is_read_and_says_what_can_be(message: str, focused: bool, shown: bool) -> None:
    heard = Heard(message, "en", WORDS, SHOWN if shown else (), FOCUS if focused else None)
    reading = Phrases().read(heard)
    check(reading, heard)
    assert reading == Phrases().read(heard)
    dialogue, _ = Dialogue().after(reading.changes).bounded()
    for condition in filters_of(dialogue.conditions):
        assert wire.filter_from(wire.filter_to(condition)) == condition
        filters.evaluate(condition, TABLE)
    assert dialogue_from(content_of(dialogue)) == dialogue
    for language in LANGUAGES:
        told = [phrase(change, language, {}) for change in reading.changes]
        assert reply(language, told, reading.not_understood, [], [], 3, said=True)


@pytest.mark.parametrize("message", ["x" * 2000, "不" * 2000, "red " * 500, "第二个" * 600, "30 " * 600])
def test_a_long_message_says_no_more_than_is_allowed(message: str) -> None:
    heard = Heard(message, "en", WORDS, SHOWN)
    check(Phrases().read(heard), heard)


def test_a_later_statement_replaces_what_contradicts_it() -> None:
    def said(*changes: Any) -> tuple[Any, ...]:
        return Dialogue().after(changes).conditions

    assert said(colour("Red"), colour("blue")) == (colour("blue"),)
    assert said(colour("Red", "blue"), colour("Red", wanted=False)) == (
        colour("blue"),
        colour("Red", wanted=False),
    )
    assert said(colour("Red", wanted=False), colour("Red")) == (colour("Red"),)
    assert said(colour("Red"), brand("Nike")) == (colour("Red"), brand("Nike"))
    assert said(Price(high=30), Price(low=10)) == (Price(10, 30),)
    assert said(Price(high=30), Price(low=40)) == (Price(low=40),)
    assert said(Price(low=40), Price(high=30)) == (Price(high=30),)
    assert said(Price(10, 30), Price(low=20, alone=True)) == (Price(low=20),)
    assert said(Price(high=30), colour("Red"), Forget("price")) == (colour("Red"),)
    both = Dialogue().after([Liking("a"), Liking("b"), Liking("a", liked=False), Words(("x", "y"))])
    assert (both.liked, both.disliked, both.words) == (("b",), ("a",), ("x", "y"))
    assert both.after([Words(("x",), wanted=False)]).words == ("y",)
    assert both.after([Reset()]) == Dialogue(disliked=("a",))


def test_a_dialogue_keeps_the_latest_and_tells_what_it_lets_go() -> None:
    many = [Values(f"a{n}", ("x",)) for n in range(MAX_CONDITIONS + 2)]
    dislikes = [Liking(f"d{n}", liked=False) for n in range(MAX_DISLIKED + 1)]
    words = Words(tuple(f"w{n}" for n in range(MAX_WORDS + 1)))
    kept, gone = Dialogue().after([*many, *dislikes, words]).bounded()
    assert gone == (*many[:2], dislikes[0])
    assert kept.conditions == tuple(many[2:])
    assert (len(kept.disliked), kept.words[0]) == (MAX_DISLIKED, "w1")
    assert kept.bounded() == (kept, ())
    wide = [Values(f"a{n}", ("x" * 256,) * 10) for n in range(4)]
    kept, gone = Dialogue().after(wide).bounded()
    assert (len(kept.conditions), gone) == (1, tuple(wide[:3]))


def test_prices_beside_a_price_are_those_of_the_shop() -> None:
    words = Vocabulary(prices=[0.5, 10.0, 29.9, 30.0])
    assert (words.below(30.0), words.below(25.0), words.above(10.0)) == (29.9, 10.0, 29.9)
    assert words.below(0.5) < 0.5
    assert words.above(30.0) > 30.0
    assert words.below(0.0) == 0.0


@pytest.mark.parametrize(
    "reading",
    [
        Reading((Values("colour", ("plaid",)),)),
        Reading((Values("colour", ()),)),
        Reading((Values("flavour", ("Red",)),)),
        Reading((Price(),)),
        Reading((Price(high=-1.0),)),
        Reading((Price(high=math.inf),)),
        Reading((Price(low=math.nan),)),
        Reading((Price(9.0, 1.0),)),
        Reading((Liking("i19"),)),
        Reading((Words(()),)),
        Reading((Words(("a\nb",)),)),
        Reading((Words(("a" * 201,)),)),
        Reading((Forget("flavour"),)),
        Reading((Reset(),) * 65),
        Reading((), ("",)),
        Reading(("cheaper",)),  # type: ignore[arg-type]
        None,
    ],
)
def test_nonsense_of_an_interpreter_is_refused(reading: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        check(reading, Heard("x", "en", WORDS, SHOWN))

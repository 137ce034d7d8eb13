"""The interpreter reads English and Chinese phrases and survives any message."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.catalog import filters
from services.catalog.item_table import Change, ItemTable
from services.catalog.items import Attribute, Item, item_hash
from services.core.executors import request_pool
from services.gateway.conversation.language.dialogue_state import (
    AttributeConstraint,
    DialogueState,
    Forget,
    ItemPreference,
    PriceConstraint,
    Reset,
    SearchWords,
    filters_of,
    state_from_json,
    state_to_json,
)
from services.gateway.conversation.language.interpreter import (
    Interpretation,
    InterpreterInput,
    PhraseInterpreter,
    ShownItem,
)
from services.gateway.conversation.language.interpreter_runner import check
from services.gateway.conversation.language.lexicon import PHRASES
from services.gateway.conversation.language.reply_text import phrase, reply
from services.gateway.conversation.language.vocabulary import (
    Vocabulary,
    VocabularyCache,
    vocabulary_of,
    words_of,
)
from services.gateway.recommend.explanation_text import LANGUAGES
from services.rpc import proto_conversions
from tests.support.phrases import (
    BRANDS,
    COLOURS,
    FOCUS,
    ITEMS,
    KINDS,
    NOW,
    SHOWN,
    TABLE,
    WORDS,
    brand,
    colour,
    kind,
)


def read(
    message: str,
    vocabulary: Vocabulary = WORDS,
    shown: Sequence[ShownItem] = SHOWN,
    focus: ShownItem | None = None,
) -> Interpretation:
    return PhraseInterpreter().read(InterpreterInput(message, "en", vocabulary, shown, focus))


def keys_of(phrase: str) -> tuple[str, ...]:
    return tuple(word.key for word in words_of(phrase))


CHEAPER, DEARER = (
    PriceConstraint(high=15.0, replaces=True),
    PriceConstraint(low=20.0, replaces=True),
)  # of 5, 10, .. 30: 17.5


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
        ("neither red nor blue", [colour("Red", "blue", positive=False)]),
        ("neither Nike nor New Look", [brand("Nike", "New Look", positive=False)]),
        (
            "neither the first nor the second",
            [ItemPreference("i0", positive=False), ItemPreference("i1", positive=False)],
        ),
        ("isn't too cheap", [DEARER]),
        ("cheaper than the second one", [PriceConstraint(high=5.0, replaces=True)]),
        ("like item 2", [ItemPreference("i1")]),
        ("more expensive than #2", [PriceConstraint(low=15.0, replaces=True)]),
        ("under 30", [PriceConstraint(high=30.0)]),
        ("Under $29.90!", [PriceConstraint(high=29.9)]),
        ("less than 1,299.50", [PriceConstraint(high=1299.5)]),
        ("29,90 euros or less", [PriceConstraint(high=29.9)]),
        ("no more than 25", [PriceConstraint(high=25.0)]),
        ("at least 20 and at most 60", [PriceConstraint(low=20.0), PriceConstraint(high=60.0)]),
        ("between 10 and 20", [PriceConstraint(10.0, 20.0, replaces=True)]),
        ("20-10 eur", [PriceConstraint(10.0, 20.0, replaces=True)]),
        ("around 30", [PriceConstraint(24.0, 36.0, replaces=True)]),
        ("forget the price", [Forget("price")]),
        ("price doesn't matter", [Forget("price")]),
        ("forget the colour and the brand", [Forget("colour"), Forget("brand_name")]),
        ("any colour but red", [Forget("colour"), colour("Red", positive=False)]),
        ("under 50 and over 10", [PriceConstraint(high=50.0), PriceConstraint(low=10.0)]),
        ("forget red", [Forget("colour")]),
        ("any brand", [Forget("brand_name")]),
        ("in red", [colour("Red")]),
        ("RED dresses", [colour("Red"), kind("Dress")]),
        ("red or blue, not green", [colour("Red", "blue"), colour("green", positive=False)]),
        ("not red but blue", [colour("Red", positive=False), colour("blue")]),
        ("anything but dresses", [kind("Dress", positive=False)]),
        ("no Nike", [brand("Nike", positive=False)]),
        ("no Nike and in red", [brand("Nike", positive=False), colour("Red")]),
        ("not New Look or Under Armour", [brand("New Look", "Under Armour", positive=False)]),
        ("t-shirts", [kind("T-shirt")]),
        ("size 42", [AttributeConstraint("size", ("42",))]),
        ("in size m", [AttributeConstraint("size", ("M",))]),
        ("xl", [AttributeConstraint("size", ("XL",))]),
        ("like the second one but for winter", [ItemPreference("i1"), SearchWords(("winter",))]),
        ("the last one in blue", [ItemPreference("i5"), colour("blue")]),
        ("I don't like the 2nd", [ItemPreference("i1", positive=False)]),
        ("nothing like number 3", [ItemPreference("i2", positive=False)]),
        ("the same colour as the first one", [colour("Red")]),
        ("I don't want the colour of the first one", [colour("Red", positive=False)]),
        ("for my baby's first birthday", [SearchWords(("babys", "first", "birthday"))]),
        ("start again", [Reset()]),
        ("start over with red", [Reset(), colour("Red")]),
        ("not woollen", [SearchWords(("woollen",), positive=False)]),
        ("a warm jacket for 50 euros or less", [PriceConstraint(high=50.0), SearchWords(("warm", "jacket"))]),
        ("便宜一点", [CHEAPER]),
        ("太贵了", [CHEAPER]),
        ("贵一点的", [DEARER]),
        ("30元以下", [PriceConstraint(high=30.0)]),
        ("一百二十块以内", [PriceConstraint(high=120.0)]),
        ("预算二百元", [PriceConstraint(high=200.0)]),
        ("不要超过30", [PriceConstraint(high=30.0)]),
        ("不超过50元外套", [PriceConstraint(high=50.0), SearchWords(("外套",))]),
        ("100到200元", [PriceConstraint(100.0, 200.0, replaces=True)]),
        ("比第三个便宜", [PriceConstraint(high=10.0, replaces=True)]),
        ("价格无所谓", [Forget("price")]),
        ("不限颜色", [Forget("colour")]),
        ("要红色的", [colour("红色")]),
        ("有没有粉红色的连衣裙", [colour("粉红色"), kind("连衣裙")]),
        ("不要红色", [colour("红色", positive=False)]),
        ("除了连衣裙都可以", [kind("连衣裙", positive=False)]),
        ("不是红色，是粉红色", [colour("红色", positive=False), colour("粉红色")]),
        ("像第二个，但是冬天穿的", [ItemPreference("i1"), SearchWords(("冬天",))]),
        ("不要第一个", [ItemPreference("i0", positive=False)]),
        ("喜欢第3个", [ItemPreference("i2")]),
        ("跟第二个同样的颜色", [colour("blue")]),
        ("重新开始", [Reset()]),
        ("高跟鞋", [SearchWords(("高跟鞋",))]),
        ("有机棉内衣", [SearchWords(("有机棉内衣",))]),
    ],
)  # fmt: skip
def test_a_phrase_has_its_meaning(message: str, changes: list[Any]) -> None:
    reading = read(message)
    assert sorted(map(repr, reading.changes)) == sorted(map(repr, changes))
    assert reading.unrecognized == ()


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("not this brand", [brand("耐克", positive=False)]),
        ("不要这个牌子", [brand("耐克", positive=False)]),
        ("换个牌子", [brand("耐克", positive=False)]),
        ("和这个一样的颜色", [colour("粉红色")]),
        ("a different colour", [colour("粉红色", positive=False)]),
        ("cheaper than this", [PriceConstraint(high=15.0, replaces=True)]),
        ("like this but in red", [ItemPreference("i3"), colour("Red")]),
        ("not this one", [ItemPreference("i3", positive=False)]),
        ("I don't like it", [ItemPreference("i3", positive=False)]),
        ("anything like that in green", [ItemPreference("i3"), colour("green")]),
        ("shoes that aren't Nike", [kind("shoe"), brand("Nike", positive=False)]),
        ("do you have it in green?", [colour("green")]),
    ],
)
def test_this_refers_to_the_focus_item(message: str, changes: list[Any]) -> None:
    assert read(message, focus=FOCUS) == Interpretation(tuple(changes))
    assert read(message, shown=[FOCUS]) == Interpretation(tuple(changes))
    assert read(message).unrecognized or "this" not in message


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
def test_unrecognized_words_are_reported(message: str, strange: tuple[str, ...]) -> None:
    assert read(message) == Interpretation((), strange)
    assert read("cheaper", shown=()) == Interpretation((), ("cheaper",))


def test_no_phrase_has_two_meanings() -> None:
    meant = {(key, cue) for cue, some in PHRASES.items() for key in map(keys_of, some.split("|"))}
    assert len({key for key, _ in meant}) == len(meant)
    assert () not in {key for key, _ in meant}


def test_an_ambiguous_value_belongs_to_the_more_frequent_attribute() -> None:
    items = [
        Item(f"o{n}", "x", attributes=(Attribute("colour" if n else "brand", ("orange",)),)) for n in range(3)
    ]
    words = vocabulary_of(ItemTable.of(items, {}, {}, [NOW] * 3), {})
    assert read("orange", vocabulary=words).changes == (AttributeConstraint("colour", ("orange",)),)
    assert read("brand orange", vocabulary=words).changes == (AttributeConstraint("brand", ("orange",)),)


async def test_the_vocabulary_follows_the_table() -> None:
    table = ItemTable.of(ITEMS[:2], {}, {}, [NOW] * 2)
    vocabularies = VocabularyCache(table, request_pool("test"))
    first = await vocabularies.current()
    assert first is await vocabularies.current()
    assert read("green", vocabulary=first).changes == (SearchWords(("green",)),)
    table.apply([Change(item_hash("i4"), 1, ITEMS[4], NOW)])
    assert read("green", vocabulary=await vocabularies.current()).changes == (colour("green"),)
    table.apply([Change(item_hash("i4"), 2, None)])
    assert read("green", vocabulary=await vocabularies.current()).changes == (SearchWords(("green",)),)
    assert ("winter",) not in WORDS.values  # for filters alone
    assert WORDS.values["dress",][0].item_count == sum(i.attributes[2].texts == ("Dress",) for i in ITEMS)


def test_an_attribute_added_later_is_stored_for_its_items() -> None:
    table = ItemTable(capacity=4)
    for n in range(10):
        table.apply([Change(n, n, Item(f"i{n}", "x"), NOW)])
    table.apply([Change(2, 10, Item("i2", "x", attributes=(Attribute("shape", ("round", "flat")),)), NOW)])
    assert [table.texts_of("shape", row) for row in (2, 9)] == [("round", "flat"), ()]


def test_spellings_of_a_value_are_merged() -> None:
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
def test_any_message_is_interpreted(message: str, has_focus: bool, has_page: bool) -> None:
    turn = InterpreterInput(message, "en", WORDS, SHOWN if has_page else (), FOCUS if has_focus else None)
    reading = PhraseInterpreter().read(turn)
    check(reading, turn)
    assert reading == PhraseInterpreter().read(turn)
    dialogue, _ = DialogueState().apply(reading.changes).truncate()
    for condition in filters_of(dialogue.constraints):
        assert proto_conversions.filter_from(proto_conversions.filter_to(condition)) == condition
        filters.evaluate(condition, TABLE)
    assert state_from_json(state_to_json(dialogue)) == dialogue
    for language in LANGUAGES:
        phrases = [phrase(change, language, {}) for change in reading.changes]
        assert reply(language, phrases, reading.unrecognized, [], [], 3, has_message=True)


@pytest.mark.parametrize("message", ["x" * 2000, "不" * 2000, "red " * 500, "第二个" * 600, "30 " * 600])
def test_a_long_message_stays_within_the_limit_of_constraints(message: str) -> None:
    turn = InterpreterInput(message, "en", WORDS, SHOWN)
    check(PhraseInterpreter().read(turn), turn)

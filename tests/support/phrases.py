"""Items to talk about, and constraints on them."""

from datetime import UTC, datetime

from services.catalog.item_table import ItemTable
from services.catalog.items import Attribute, Item
from services.gateway.conversation.language.dialogue_state import AttributeConstraint
from services.gateway.conversation.language.interpreter import ShownItem
from services.gateway.conversation.language.vocabulary import vocabulary_of

COLOURS = ("Red", "blue", "红色", "粉红色", "green")
BRANDS = ("Nike", "New Look", "Under Armour", "耐克", "Orange")
KINDS = ("Dress", "T-shirt", "shoe", "连衣裙", "Coat")
NOW = datetime(2026, 3, 1, tzinfo=UTC)


def make_item(n: int) -> Item:
    texts = {"colour": COLOURS[n % 5], "brand_name": BRANDS[n % 5], "product_type": KINDS[n // 2 % 5]}
    attributes = [Attribute(name, (text,)) for name, text in texts.items()]
    sizes = Attribute("size", ("42", "M", "XL"))
    hidden = Attribute("_campaign", ("winter",))
    return Item(f"i{n}", f"thing {n}", price=5.0 * (n + 1), attributes=(*attributes, sizes, hidden))


ITEMS = [make_item(n) for n in range(20)]
TABLE = ItemTable.of(ITEMS, {}, {}, [NOW] * len(ITEMS))
WORDS = vocabulary_of(TABLE, {})
SHOWN = [ShownItem(i.id, {a.name: a.texts for a in i.attributes}, i.price) for i in ITEMS[:6]]
FOCUS = SHOWN[3]  # 粉红色, 耐克, T-shirt, for 20


def colour(*texts: str, positive: bool = True) -> AttributeConstraint:
    return AttributeConstraint("colour", texts, positive)


def brand(*texts: str, positive: bool = True) -> AttributeConstraint:
    return AttributeConstraint("brand_name", texts, positive)


def kind(*texts: str, positive: bool = True) -> AttributeConstraint:
    return AttributeConstraint("product_type", texts, positive)

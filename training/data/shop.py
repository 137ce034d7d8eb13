"""The data of a shop. Imports no reader: a change of a reader reruns no stage."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.catalog.items import Item
from training.data.config import ShopConfig
from training.data.events import Events

if TYPE_CHECKING:
    from training.data.images import ShopImages
    from training.data.readers.reader import Table
    from training.data.table_report import TableReport


@dataclass(frozen=True)
class ShopData:
    """The settings, items, events and images of a shop.

    Items have no image bytes and keep the order of their file. `reports` and `tables` have the keys "items"
    and "events"; a shop without events has no report on them.
    """

    settings: ShopConfig
    items: list[Item]
    events: Events
    images: "ShopImages"
    reports: "dict[str, TableReport]"
    tables: "Mapping[str, Table]" = field(default_factory=dict, repr=False)

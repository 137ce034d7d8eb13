"""The distinct attribute names of the catalog, each with its number of live items.

The transaction that writes an item updates the counts: writers see each other's names, a failed write counts
nothing, and a name without live items frees its place.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from services.catalog.items import Item
from services.core.errors import InvalidArgument
from services.embedding.store.schema import table as items
from services.storage import store

table = sa.Table(
    "item_attribute_names",
    store.metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("item_count", sa.BigInteger, nullable=False),
)
_ADD = sa.text(
    "INSERT INTO item_attribute_names (name, item_count) VALUES (:name, :item_count) "
    "ON CONFLICT (name) DO UPDATE SET item_count = item_attribute_names.item_count + excluded.item_count"
)
_MAX_EXAMPLES = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttributeNames:
    """Counts names; writes of single items may bring the catalog to at most `limit` distinct names."""

    limit: int

    def open(self, engine: sa.Engine) -> None:
        """Count the names if the state has no counts yet; warn if there are more than the limit."""
        with engine.execution_options(vitrine_writes=True).begin() as connection:
            if not count(connection):
                has_attributes = sa.and_(~items.c.deleted, items.c.attributes != "[]")
                recount(connection, connection.scalars(sa.select(items.c.attributes).where(has_attributes)))
            names = count(connection)
        if names > self.limit:
            _log.warning(
                "the items have %d different attribute names, more than the %d that are allowed: all are "
                "served, and writes that bring further names are refused; see --max-attribute-names",
                names,
                self.limit,
            )

    def replace(self, connection: sa.Connection, old: sa.Row[Any] | None, new: Item | None) -> None:
        """Count the names of an item that replaces the live row `old`; None means no item.

        Call it after the transaction has taken its sequence number, which locks out other writers.

        Raises:
            InvalidArgument: the item has a new name and the catalog has `limit` names.
        """
        before = set() if old is None else names_of_row(old.attributes)
        names = [] if new is None else [a.name for a in new.attributes]
        added = [name for name in names if name not in before]
        change = Counter(added)
        change.subtract(before.difference(names))
        if not change:
            return
        existing = _existing(connection, added)
        add(connection, change)
        new_names = [name for name in added if name not in existing]
        if new_names and count(connection) > self.limit:
            raise self._refusal(names.index(new_names[0]), new_names)

    def _refusal(self, index: int, new: list[str]) -> InvalidArgument:
        examples = ", ".join(repr(name) for name in new[:_MAX_EXAMPLES])
        more = f" and {len(new) - _MAX_EXAMPLES} more" if len(new) > _MAX_EXAMPLES else ""
        return InvalidArgument.of(
            f"attributes[{index}]",
            f"the name is new to the catalog ({examples}{more}), and its items may have at most {self.limit} "
            "different attribute names; use a name that other items have, delete items with names that are "
            "not needed, or set --max-attribute-names higher",
        )


def names_of_row(attributes: str) -> set[str]:
    """The names in the column `attributes` of an item's row."""
    return {name for name, _, _ in json.loads(attributes)}


def add(connection: sa.Connection, change: Mapping[str, int]) -> None:
    """Add to the counts of names; a name without items is deleted."""
    # A fixed order avoids deadlocks between transactions.
    rows = [{"name": name, "item_count": count} for name, count in sorted(change.items()) if count]
    if rows:
        connection.execute(_ADD, rows)
    if any(count < 0 for count in change.values()):
        connection.execute(table.delete().where(table.c.item_count <= 0))


def count(connection: sa.Connection) -> int:
    """How many distinct names live items have."""
    return int(connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0)


def recount(connection: sa.Connection, attributes: Iterable[str]) -> None:
    """Recount from the column `attributes` of all live items' rows."""
    change: Counter[str] = Counter()
    for column in attributes:
        change.update(names_of_row(column))
    connection.execute(table.delete())
    add(connection, change)


def _existing(connection: sa.Connection, names: list[str]) -> set[str]:
    return set(connection.scalars(sa.select(table.c.name).where(table.c.name.in_(names))))

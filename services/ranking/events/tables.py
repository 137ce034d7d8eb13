"""The tables of events, identities, counters and the impression log."""

from collections.abc import Callable, Mapping

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from services.storage import store

events = sa.Table(
    "events",
    store.metadata,
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("event_id", sa.Text, nullable=False, unique=True),
    sa.Column("content_hash", sa.LargeBinary, nullable=False),
    sa.Column("user_key", sa.BigInteger, nullable=False),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("session_id", sa.Text, nullable=False),
    sa.Column("attribution_token", sa.Text, nullable=False),
    sa.Column("channel", sa.Text, nullable=False),
    sa.Column("occurred", sa.BigInteger, nullable=False),
    sa.Column("recorded", sa.BigInteger, nullable=False),
)
sa.Index("events_by_user", events.c.user_key, events.c.occurred)
sa.Index("events_by_time", events.c.occurred)
event_items = sa.Table(
    "event_items",
    store.metadata,
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("row", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("number", sa.BigInteger, nullable=False),
    sa.Column("item_id", sa.Text, nullable=False),
    sa.Column("quantity", sa.Integer, nullable=False),
    sa.Column("price", sa.Double),
    sa.Column("position", sa.Integer),
)
identities = sa.Table(
    "identities",
    store.metadata,
    sa.Column("kind", sa.String(8), primary_key=True),
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("user_key", sa.BigInteger, nullable=False, index=True),
)
counters = sa.Table(
    "item_counters",
    store.metadata,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("type", sa.Text, primary_key=True),
    sa.Column("events", sa.BigInteger, nullable=False),
)
served = sa.Table(
    "served",
    store.metadata,
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("user_id", sa.Text, nullable=False, index=True),
    sa.Column("visitor_id", sa.Text, nullable=False, index=True),
    sa.Column("page_key", sa.Text, nullable=False, unique=True),
    sa.Column("at", sa.BigInteger, nullable=False, index=True),
    sa.Column("content", sa.LargeBinary, nullable=False),
)
explored = sa.Table(
    "explored",
    store.metadata,
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("scenario", sa.Text, nullable=False),
    sa.Column("at", sa.BigInteger, nullable=False, index=True),
)
retention_clock = sa.Table(
    "retention_clock",
    store.metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("time", sa.BigInteger, nullable=False),
    sa.Column("waited", sa.BigInteger, nullable=False),
)
_Insert = Callable[[sa.Table], sqlite.Insert | postgresql.Insert]
_INSERTS: dict[str, _Insert] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


def count(connection: sa.Connection, changes: Mapping[tuple[int, str], int]) -> None:
    """Add to the count of each (item hash, event type), or subtract; a row that reaches 0 is deleted."""
    if not changes:
        return
    insert = _INSERTS[connection.dialect.name](counters)
    upsert = insert.on_conflict_do_update(
        index_elements=[counters.c.number, counters.c.type],
        set_={"events": counters.c.events + insert.excluded.events},
    )
    rows = [{"number": n, "type": t, "events": by} for (n, t), by in sorted(changes.items())]
    connection.execute(upsert, rows)
    fewer = [{"of_number": n, "of_type": t} for (n, t), by in changes.items() if by < 0]
    if fewer:
        key = (counters.c.number == sa.bindparam("of_number")) & (counters.c.type == sa.bindparam("of_type"))
        connection.execute(counters.delete().where(key, counters.c.events <= 0), fewer)

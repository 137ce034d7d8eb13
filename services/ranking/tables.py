"""The tables of behaviour."""

import sqlalchemy as sa

from services import store

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


def count(connection: sa.Connection, number: object, event_type: str, by: int = 1) -> None:
    """Let `number`, an item, have `by` more events of a type, which may be fewer."""
    mine = (counters.c.number == number) & (counters.c.type == event_type)
    if not connection.execute(counters.update().where(mine).values(events=counters.c.events + by)).rowcount:
        connection.execute(counters.insert().values(number=number, type=event_type, events=by))

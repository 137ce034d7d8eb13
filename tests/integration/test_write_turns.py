"""Concurrent writers of one item take turns, and no written field is lost."""

import asyncio
from collections import Counter
from contextlib import suppress
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from vitrine.catalog.v1 import item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as pb

from services.embedding.store.write_turns import WriteTurns
from tests.support.catalogs import ServedCatalog, catalog, catalog_server, encoders, item, upsert

__all__ = ["catalog", "catalog_server", "encoders"]  # fixtures
_WRITERS, _ROUNDS = 16, 5
_FAILED = item_pb2.ITEM_OUTCOME_CODE_FAILED

writers = st.lists(
    st.tuples(st.sets(st.sampled_from("abcde")), st.integers(0, 3), st.booleans()), min_size=1, max_size=12
)


@given(writers=writers)
@settings(deadline=None)
async def test_one_writer_of_an_id_has_its_turn_at_a_time(
    writers: list[tuple[set[str], int, bool]],
) -> None:
    """Each writer has ids, works for some rounds of the loop, and may be cancelled while it waits."""
    turns, busy, finishers = WriteTurns(), Counter[str](), list[int]()

    async def write(which: int, ids: set[str], rounds: int) -> None:
        async with turns.of(ids):
            busy.update(ids)
            try:
                assert all(busy[one] == 1 for one in ids)
                for _ in range(rounds):
                    await asyncio.sleep(0)
            finally:
                busy.subtract(ids)
            finishers.append(which)

    tasks = [asyncio.ensure_future(write(at, ids, n)) for at, (ids, n, _) in enumerate(writers)]
    await asyncio.sleep(0)
    impatient = [task for task, (_, _, leaves) in zip(tasks, writers, strict=True) if leaves]
    for task in impatient:  # while they wait, or in their turn
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)
    assert set(finishers) >= {at for at, (_, _, leaves) in enumerate(writers) if not leaves}
    await asyncio.sleep(0)
    assert not any(turns.busy(one) for one in "abcde")


async def test_none_of_many_writers_of_one_item_fails(catalog: ServedCatalog) -> None:
    await upsert(catalog.stub, item("hot", "a mug"))
    codes = Counter[int]()

    async def write(which: int) -> None:
        for n in range(_ROUNDS):
            [outcome] = await upsert(catalog.stub, item("hot", price=which * 100 + n), mask=("price",))
            codes[outcome.code] += 1

    await asyncio.gather(*(write(which) for which in range(_WRITERS)))
    assert codes[_FAILED] == 0
    assert codes.total() == _WRITERS * _ROUNDS
    [record] = (await catalog.stub.GetItems(pb.GetItemsRequest(item_ids=["hot"]))).items
    assert record.item.price in {which * 100 + _ROUNDS - 1 for which in range(_WRITERS)}


async def test_concurrent_changes_of_different_fields_are_all_kept(catalog: ServedCatalog) -> None:
    values: dict[str, Any] = {
        "title": "blue mug",
        "description": "holds tea",
        "price": 7.5,
        "family_id": "mugs",
    }
    await upsert(catalog.stub, item("hot", "a mug"))

    async def write(name: str) -> None:
        for _ in range(_ROUNDS):
            [outcome] = await upsert(catalog.stub, item("hot", **{name: values[name]}), mask=(name,))
            assert outcome.code != _FAILED

    await asyncio.gather(*(write(name) for name in values for _ in range(3)))
    [record] = (await catalog.stub.GetItems(pb.GetItemsRequest(item_ids=["hot"]))).items
    assert {name: getattr(record.item, name) for name in values} == values


async def test_chunks_that_share_items_never_deadlock(catalog: ServedCatalog) -> None:
    names = [f"i{n}" for n in range(30)]

    async def write(which: int) -> None:
        order = names if which % 2 else list(reversed(names))
        for n in range(_ROUNDS):
            outcomes = await upsert(catalog.stub, *(item(name, f"{which} {n}") for name in order))
            assert _FAILED not in [outcome.code for outcome in outcomes]

    async def delete() -> None:
        for _ in range(_ROUNDS):
            await catalog.stub.DeleteItems(pb.DeleteItemsRequest(item_ids=names[:10]))

    await asyncio.wait_for(asyncio.gather(*(write(which) for which in range(8)), delete()), 120)
    records = (await catalog.stub.GetItems(pb.GetItemsRequest(item_ids=names[10:]))).items
    last = {f"{which} {_ROUNDS - 1}" for which in range(8)}
    assert len(records) == 20
    assert {record.item.title for record in records} <= last

"""The service limits the number of attribute names."""

import logging
import random
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import sqlalchemy as sa
from vitrine.catalog.v1 import item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as pb
from vitrine.embedding.v1 import embedding_service_pb2_grpc as pb_grpc

from services.catalog.items import Attribute, Item
from services.core.errors import InvalidArgument, VitrineError
from services.embedding.store.item_store import ItemStore
from services.rpc.server import CHANNEL_OPTIONS
from tests.conftest import Clock
from tests.support.processes import free_port, running_process
from tests.support.shops import make_bundle

LIMIT = 5


def with_names(item_id: str, *names: str) -> Item:
    return Item(item_id, "t", attributes=tuple(Attribute(name, ("x",)) for name in names))


def test_a_new_name_beyond_the_limit_is_refused_before_it_is_written(engine: sa.Engine, clock: Clock) -> None:
    items = ItemStore(engine, clock, LIMIT)
    items.write(with_names("a", "n0", "n1", "n2", "n3", "n4")).result()
    before = items.sequence
    with pytest.raises(InvalidArgument, match=r"attributes\[1\].*'n5'.*at most 5 .*--max-attribute-names"):
        items.write(with_names("b", "n0", "n5")).result()
    assert (items.get(["b"]), items.sequence) == ({}, before)
    items.write(with_names("b", "n0", "n1")).result()  # names that are there are free
    items.write(with_names("a", "n0", "n1", "n2", "n3", "n5")).result()  # n4 made room
    with pytest.raises(InvalidArgument, match="'n4'"):
        items.write(with_names("c", "n4")).result()
    items.delete("a").result()
    items.write(with_names("c", "n4", "n6", "n7")).result()
    with pytest.raises(InvalidArgument, match="'n8'"):
        items.write(with_names("c", "n4", "n6", "n7", "n8")).result()
    items.close()


def test_concurrent_writers_add_names_up_to_the_limit(engine: sa.Engine, clock: Clock) -> None:
    """Two stores over one database, as two processes have them, write, change and delete together."""
    stores = [ItemStore(engine, clock, LIMIT) for _ in range(2)]
    rng = random.Random(0)
    expected: dict[str, frozenset[str]] = {}
    for _ in range(30):
        futures = []
        for store in stores:
            for item_id in rng.sample([f"{stores.index(store)}-{n}" for n in range(4)], 3):
                if item_id in expected and rng.random() < 0.4:
                    futures.append((item_id, frozenset[str](), store.delete(item_id)))
                else:
                    names = frozenset(rng.sample([f"n{n}" for n in range(9)], rng.randrange(0, 4)))
                    futures.append((item_id, names, store.write(with_names(item_id, *sorted(names)))))
        for item_id, names, future in futures:
            try:
                outcome = future.result()
            except InvalidArgument:
                continue
            if outcome.outcome.name == "DELETED":
                del expected[item_id]
            else:
                expected[item_id] = names
        with engine.connect() as connection:
            counts = sa.text("SELECT name, item_count FROM item_attribute_names")
            item_counts = {row.name: row.item_count for row in connection.execute(counts)}
        all_names = [name for names in expected.values() for name in names]
        assert item_counts == {name: all_names.count(name) for name in all_names}
        assert len(item_counts) <= LIMIT
    for store in stores:
        store.close()


def test_a_state_above_the_limit_is_served_with_one_warning(
    engine: sa.Engine, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    items = ItemStore(engine, clock)
    items.write(with_names("a", *(f"n{n}" for n in range(9)))).result()
    items.close()
    with engine.begin() as connection:  # as a state of a version that did not count names
        connection.execute(sa.text("DROP TABLE item_attribute_names"))
    with caplog.at_level(logging.WARNING):
        items = ItemStore(engine, clock, LIMIT)
    [warning] = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "9 different attribute names" in warning
    assert "--max-attribute-names" in warning
    items.write(with_names("a", *(f"n{n}" for n in range(8)))).result()  # fewer of the names it had
    with pytest.raises(VitrineError, match="'m'"):
        items.write(with_names("b", "m")).result()
    items.close()


def flood(items: int, names: int) -> list[item_pb2.Item]:
    """Items of which each has `names` names of its own, with 32 numbers each."""
    numbers = [float(n) for n in range(32)]
    return [
        item_pb2.Item(
            id=f"flood-{n}",
            title="x",
            attributes=[item_pb2.Attribute(name=f"name-{n}-{k}", numbers=numbers) for k in range(names)],
        )
        for n in range(items)
    ]


def resident(process: "subprocess.Popen[bytes]") -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


async def upsert(port: int, items: list[item_pb2.Item]) -> list[item_pb2.ItemOutcome]:
    async def chunks() -> AsyncIterator[pb.UpsertItemsRequest]:
        for start in range(0, len(items), 50):
            yield pb.UpsertItemsRequest(items=items[start : start + 50])

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        stub = pb_grpc.EmbeddingServiceStub(channel)
        return [outcome async for response in stub.UpsertItems(chunks()) for outcome in response.outcomes]


async def test_a_flood_of_names_is_refused_and_the_server_restarts(tmp_path: Path) -> None:
    """50 and 200 items x 64 new names x 32 numbers took 4.8 GiB, and the next start ended in MemoryError."""
    bundle, port = make_bundle(tmp_path), free_port()
    async with running_process(bundle, tmp_path / "state", port) as process:
        await upsert(port, [item_pb2.Item(id="first", title="kitchen thing")])
        quiet = resident(process)
        for count in (50, 200):
            outcomes = await upsert(port, flood(count, 64))
            refusals = [outcome for outcome in outcomes if outcome.HasField("error")]
            assert len(outcomes) - len(refusals) == 15  # 15 x 64 and the shop's own two are within 1000
            assert {outcome.error.code for outcome in refusals} == {grpc.StatusCode.INVALID_ARGUMENT.value[0]}
            assert "attributes[" in refusals[0].error.message
            assert "--max-attribute-names" in refusals[0].error.message
        [outcome] = await upsert(port, [item_pb2.Item(id="later", title="kitchen thing")])
        assert not outcome.HasField("error")
        assert resident(process) - quiet < 100 << 20
        process.terminate()
        process.wait()
    async with running_process(bundle, tmp_path / "state", port):
        [outcome] = await upsert(port, [item_pb2.Item(id="latest", title="kitchen thing")])
        assert not outcome.HasField("error")

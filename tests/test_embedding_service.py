"""The embedding service over real gRPC: what is acknowledged is searchable, bad input is named."""

import asyncio
import io
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from PIL import Image
from vitrine.catalog.v1 import filter_pb2, item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as pb
from vitrine.embedding.v1 import embedding_service_pb2_grpc as pb_grpc

from services import store
from services.embedding.catalogue import Catalogue
from services.embedding.encoders import ImageEncoder, TextEncoder
from services.embedding.items import ItemStore
from services.embedding.servicer import EmbeddingServicer
from services.follower import Follower
from services.item_table import ItemTable
from services.server import CHANNEL_OPTIONS, Server, Service
from tests.conftest import Clock, skip_without
from tests.models import make_image_encoder, make_text_encoder

NAME = "vitrine.embedding.v1.EmbeddingService"
Body = Callable[[Any, Catalogue, int], Awaitable[None]]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextEncoder, ImageEncoder]:
    root = tmp_path_factory.mktemp("encoders")
    return TextEncoder(make_text_encoder(root / "text")), ImageEncoder(make_image_encoder(root / "image"))


Run = Callable[[Body], None]


@pytest.fixture
def run(tmp_path: Path, clock: Clock, encoders: tuple[TextEncoder, ImageEncoder]) -> Run:
    """Runs a body against a served catalogue; a second run starts again from the same state."""

    def run(body: Body) -> None:
        async def main() -> None:
            engine = store.open_engine(f"sqlite:///{tmp_path / 'items.sqlite'}")
            catalogue = Catalogue(ItemStore(engine, clock), *encoders)
            add = pb_grpc.add_EmbeddingServiceServicer_to_server
            server = Server([Service(NAME, EmbeddingServicer(catalogue, "v1"), add)], "127.0.0.1:0")
            await server.start()
            await server.set_ready(NAME)
            target = f"127.0.0.1:{server.port}"
            try:
                async with grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS) as channel:
                    await body(pb_grpc.EmbeddingServiceStub(channel), catalogue, server.port)
            finally:
                await server.stop(1)
                catalogue.close()
                engine.dispose()

        asyncio.run(main())

    return run


def picture(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(out, "PNG")
    return out.getvalue()


def item(item_id: str, title: str = "", **fields: Any) -> item_pb2.Item:
    return item_pb2.Item(id=item_id, title=title, **fields)


async def upsert(stub: Any, *items: item_pb2.Item, mask: tuple[str, ...] = ()) -> list[item_pb2.ItemOutcome]:
    async def chunks() -> AsyncIterator[pb.UpsertItemsRequest]:
        request = pb.UpsertItemsRequest(items=items)
        request.update_mask.paths.extend(mask)
        yield request

    return [outcome async for response in stub.UpsertItems(chunks()) for outcome in response.outcomes]


async def found(stub: Any, **fields: Any) -> list[str]:
    request = pb.SearchRequest(limit=10, view=item_pb2.VIEW_READABLE, **fields)
    response = await stub.Search(request)
    return [hit.item_id for result in response.results for hit in result.hits]


async def violations(call: Awaitable[Any]) -> tuple[grpc.StatusCode, list[str]]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)
    bad = error_details_pb2.BadRequest()
    fields = [v.field for d in status.details if d.Unpack(bad) for v in bad.field_violations]
    return caught.value.code(), fields


def test_what_is_acknowledged_is_found_by_text_photograph_and_item(run: Run) -> None:
    async def body(stub: Any, catalogue: Catalogue, port: int) -> None:
        photograph = item_pb2.Image(data=picture("red"))
        outcomes = await upsert(
            stub, item("a", "red scarf"), item("b", "blue mug"), item("c", image=photograph)
        )
        assert [o.code for o in outcomes] == [item_pb2.ITEM_OUTCOME_CODE_CREATED] * 3
        assert outcomes[2].text_state == item_pb2.MODALITY_STATE_ABSENT
        assert outcomes[2].image_state == item_pb2.MODALITY_STATE_READY
        assert (await found(stub, text="red scarf", spaces=[item_pb2.SPACE_TEXT]))[0] == "a"
        assert await found(stub, image=picture("red")) == ["c"]
        group = pb.InterestGroup(item_ids=["b"])
        assert (await found(stub, groups=[group], spaces=[item_pb2.SPACE_TEXT]))[0] == "b"
        vector = (await stub.EmbedTexts(pb.EmbedTextsRequest(texts=["blue mug"]))).vectors
        assert (await found(stub, vectors=vector, spaces=[item_pb2.SPACE_TEXT]))[0] == "b"

    run(body)


def test_a_bad_item_never_stops_the_rest_and_is_named(run: Run) -> None:
    async def body(stub: Any, catalogue: Catalogue, port: int) -> None:
        broken = item_pb2.Image(data=b"no picture")
        outcomes = await upsert(
            stub,
            item("good", "a"),
            item(""),
            item("bare"),
            item("torn", image=broken),
            item("last", "b"),
            item("fetched", image=item_pb2.Image(uri="http://example.org/a.png")),
            item("dear", "x", price=-1),
        )
        failed = item_pb2.ITEM_OUTCOME_CODE_FAILED
        assert [o.code == failed for o in outcomes] == [False, True, True, True, False, True, True]
        assert [o.error.code for o in outcomes] == [0, 3, 3, 3, 0, 3, 3]
        assert "items[3].image.data" in outcomes[3].error.message
        assert "items[6].price" in outcomes[6].error.message
        assert sorted(await found(stub, text="a", spaces=[item_pb2.SPACE_TEXT])) == ["good", "last"]

    run(body)


def test_an_id_twice_in_a_chunk_keeps_the_order_and_a_mask_encodes_nothing(run: Run) -> None:
    async def body(stub: Any, catalogue: Catalogue, port: int) -> None:
        codes = [o.code for o in await upsert(stub, item("a", "one"), item("a", "two"), item("a", "two"))]
        created, updated = item_pb2.ITEM_OUTCOME_CODE_CREATED, item_pb2.ITEM_OUTCOME_CODE_UPDATED
        assert codes == [created, updated, item_pb2.ITEM_OUTCOME_CODE_UNCHANGED]
        encode = catalogue.text.encode

        def refuse(texts: Any) -> Any:
            assert not texts, "a price change must not encode"
            return encode(texts)

        catalogue.text.encode = refuse  # type: ignore[method-assign]
        try:
            outcomes = await upsert(stub, item("a", price=3), item("nobody", price=3), mask=("price",))
        finally:
            catalogue.text.encode = encode  # type: ignore[method-assign]
        assert [o.code for o in outcomes] == [updated, item_pb2.ITEM_OUTCOME_CODE_FAILED]
        assert outcomes[1].error.code == 5
        got = await stub.GetItems(pb.GetItemsRequest(item_ids=["a", "nobody"]))
        assert (got.items[0].item.title, got.items[0].item.price) == ("two", 3)
        assert list(got.missing_item_ids) == ["nobody"]

    run(body)


def test_filters_deletions_and_restarts_keep_the_answer_exact(run: Run) -> None:
    names = [f"item-{n}" for n in range(30)]

    async def write(stub: Any, catalogue: Catalogue, port: int) -> None:
        parity = [item_pb2.Attribute(name="parity", texts=[w]) for w in ("even", "odd")]
        items = [item(n, f"title {k}", attributes=[parity[k % 2]]) for k, n in enumerate(names)]
        await upsert(stub, *items)
        deleted = await stub.DeleteItems(pb.DeleteItemsRequest(item_ids=["item-3", "nobody"]))
        assert [o.error.code for o in deleted.outcomes] == [0, 5]
        await check(stub, catalogue, port)

    answers = []

    async def check(stub: Any, catalogue: Catalogue, port: int) -> None:
        odd = filter_pb2.Filter(equals=filter_pb2.Equals(attribute="parity", text="odd"))
        response = await stub.Search(
            pb.SearchRequest(text="title 3", limit=30, filter=odd, view=item_pb2.VIEW_READABLE)
        )
        hits = [(h.item_id, h.score) for h in response.results[0].hits]
        answers.append(hits)
        assert sorted(i for i, _ in hits) == sorted(n for k, n in enumerate(names) if k % 2 and k != 3)

    run(write)
    run(check)
    assert answers[0] == answers[1]


def test_a_page_follows_a_page_through_the_whole_catalogue(run: Run) -> None:
    async def body(stub: Any, catalogue: Catalogue, port: int) -> None:
        await upsert(stub, *(item(f"i{n}", "x") for n in range(25)))
        seen, token = [], ""
        while True:
            page = await stub.GetItems(pb.GetItemsRequest(page_size=10, page_token=token))
            seen += [record.number for record in page.items]
            if not (token := page.next_page_token):
                break
        assert seen == sorted(set(seen))
        assert len(seen) == 25
        assert await violations(stub.GetItems(pb.GetItemsRequest(page_token="?"))) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            ["page_token"],
        )

    run(body)


@pytest.mark.parametrize(
    ("request_fields", "field"),
    [
        ({}, "groups"),
        ({"text": "a", "limit": 0}, "limit"),
        ({"text": "a", "limit": 9999}, "limit"),
        ({"image": b"x"}, "image"),
        ({"text": "a", "filter": filter_pb2.Filter()}, "filter"),
        ({"vectors": pb.Vectors(dimension=3, values=[1, 2, 3])}, "vectors.dimension"),
        ({"vectors": pb.Vectors(dimension=2, values=[1, 2, 3])}, "vectors.values"),
        ({"vectors": pb.Vectors(dimension=1, values=[float("nan")])}, "vectors.values"),
        ({"groups": [pb.InterestGroup(item_ids=["a"], weights=[1, 2])]}, "groups[0].weights"),
        ({"text": "x" * ((2 << 20) + 1)}, "text"),
    ],
)
def test_a_wrong_search_names_its_field(run: Run, request_fields: dict[str, Any], field: str) -> None:
    async def body(stub: Any, catalogue: Catalogue, port: int) -> None:
        call = stub.Search(pb.SearchRequest(**({"limit": 3} | request_fields)))
        assert await violations(call) == (grpc.StatusCode.INVALID_ARGUMENT, [field])

    run(body)


def test_a_change_to_come_is_waited_for_no_longer_than_the_deadline(run: Run) -> None:
    async def body(stub: Any, catalogue: Catalogue, port: int) -> None:
        search = stub.Search(pb.SearchRequest(text="late", limit=1, min_sequence=1), timeout=20)
        waiting = asyncio.ensure_future(search)
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await upsert(stub, item("late", "late"))
        assert len((await waiting).results[0].item_numbers) == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Search(pb.SearchRequest(text="never", limit=1, min_sequence=99), timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    run(body)


def test_a_follower_has_the_same_table_and_vectors(run: Run) -> None:
    async def body(stub: Any, catalogue: Catalogue, port: int) -> None:
        await upsert(stub, item("a", "red", price=2.5), item("b", image=item_pb2.Image(data=picture("blue"))))
        follower = Follower(stub.WatchItems, ItemTable())
        task = asyncio.ensure_future(follower.run())
        await asyncio.wait_for(follower.ready.wait(), 20)
        outcome = (await upsert(stub, item("c", "green")))[0]
        await follower.wait_for(outcome.sequence)
        deleted = await stub.DeleteItems(pb.DeleteItemsRequest(item_ids=["a"]))
        await follower.wait_for(deleted.outcomes[0].sequence)
        task.cancel()
        mine, theirs = follower.table, catalogue.table
        assert mine.ids(range(mine.length)) == theirs.ids(range(theirs.length))
        now = catalogue.items._clock()
        np.testing.assert_array_equal(mine.available(now), theirs.available(now))
        for space in ("text", "image"):
            for one, other in zip(mine.vectors(space) or (), theirs.vectors(space) or (), strict=True):
                np.testing.assert_array_equal(one[1:], other[1:])

    run(body)


def test_rows_that_cannot_be_embedded_have_errors_in_their_place(run: Run) -> None:
    async def body(stub: Any, catalogue: Catalogue, port: int) -> None:
        images = await stub.EmbedImages(pb.EmbedImagesRequest(images=[picture("red"), b"", picture("blue")]))
        assert [e.row for e in images.errors] == [1]
        lengths = np.linalg.norm(np.reshape(images.vectors.values, (3, -1)), axis=1)
        np.testing.assert_allclose(lengths, [1, 0, 1], atol=1e-5)
        texts = await stub.EmbedTexts(pb.EmbedTextsRequest(texts=["赤い", "", "long " * 200]))
        assert list(texts.truncated_rows) == [2]
        assert await violations(stub.EmbedTexts(pb.EmbedTextsRequest())) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            ["texts"],
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.EmbedTexts(pb.EmbedTextsRequest(texts=["a"], bundle="v0"))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION

    run(body)


def test_grpcurl_lists_describes_and_calls(run: Run) -> None:
    grpcurl = shutil.which("grpcurl") or shutil.which("grpcurl", path=str(Path.home() / "go/bin"))
    if grpcurl is None:
        skip_without("grpcurl", "grpcurl is not installed")
        return

    async def body(stub: Any, catalogue: Catalogue, port: int) -> None:
        await upsert(stub, item("a", "red scarf"))

        def call(*arguments: str) -> str:
            command = [grpcurl, "-plaintext", *arguments]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        async def ask(*arguments: str) -> str:
            return await asyncio.to_thread(call, *arguments)

        server = f"127.0.0.1:{port}"
        assert NAME in await ask(server, "list")
        assert "rpc Search" in await ask(server, "describe", NAME)
        health = await ask("-d", json.dumps({"service": NAME}), server, "grpc.health.v1.Health/Check")
        assert json.loads(health) == {"status": "SERVING"}
        query = {"text": "red", "limit": 1, "view": "VIEW_READABLE", "spaces": ["SPACE_TEXT"]}
        answer = json.loads(await ask("-d", json.dumps(query), server, f"{NAME}/Search"))
        assert answer["results"][0]["hits"][0]["item_id"] == "a", answer

    run(body)

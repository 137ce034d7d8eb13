"""The embedding service makes acknowledged writes searchable and names invalid inputs."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vitrine.catalog.v1 import filter_pb2, item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as pb

from services.catalog.item_table import ItemTable
from services.catalog.items import Item
from services.embedding.index import segmented_index
from services.embedding.index.segmented_index import SegmentedIndex
from services.embedding.servicer import vectors_message
from services.embedding.store.bundle_import import VectorBlock
from services.rpc.change_feed_follower import ChangeFeedFollower
from tests.conftest import skip_without
from tests.support.catalogs import (
    NAME,
    CatalogServer,
    ServedCatalog,
    catalog,
    catalog_server,
    encoders,
    item,
    png_bytes,
    search_ids,
    upsert,
    violations,
)
from tests.support.image_bombs import encode_image, progressive_jpeg, webp_header

__all__ = ["catalog", "catalog_server", "encoders"]  # fixtures


async def test_an_acknowledged_item_is_found_by_text_image_and_item(catalog: ServedCatalog) -> None:
    photograph = item_pb2.Image(data=png_bytes("red"))
    outcomes = await upsert(
        catalog.stub, item("a", "red scarf"), item("b", "blue mug"), item("c", image=photograph)
    )
    assert [o.code for o in outcomes] == [item_pb2.ITEM_OUTCOME_CODE_CREATED] * 3
    assert outcomes[2].text_state == item_pb2.MODALITY_STATE_ABSENT
    assert outcomes[2].image_state == item_pb2.MODALITY_STATE_READY
    assert (await search_ids(catalog.stub, text="red scarf", spaces=[item_pb2.SPACE_TEXT]))[0] == "a"
    assert await search_ids(catalog.stub, image=png_bytes("red")) == ["c"]
    group = pb.QueryGroup(item_ids=["b"])
    assert (await search_ids(catalog.stub, groups=[group], spaces=[item_pb2.SPACE_TEXT]))[0] == "b"
    vector = (await catalog.stub.EmbedTexts(pb.EmbedTextsRequest(texts=["blue mug"]))).vectors
    assert (await search_ids(catalog.stub, vectors=vector, spaces=[item_pb2.SPACE_TEXT]))[0] == "b"


async def test_an_invalid_item_is_named_and_the_others_are_written(catalog: ServedCatalog) -> None:
    broken = item_pb2.Image(data=b"no picture")
    outcomes = await upsert(
        catalog.stub,
        item("good", "a"),
        item(""),
        item("bare"),
        item("torn", image=broken),
        item("last", "b"),
        item("elsewhere", image=item_pb2.Image(uri="ftp://example.org/a.png")),
        item("dear", "x", price=-1),
    )
    failed = item_pb2.ITEM_OUTCOME_CODE_FAILED
    assert [o.code == failed for o in outcomes] == [False, True, True, True, False, True, True]
    assert [o.error.code for o in outcomes] == [0, 3, 3, 3, 0, 3, 3]
    assert "items[3].image.data" in outcomes[3].error.message
    assert "items[6].price" in outcomes[6].error.message
    assert sorted(await search_ids(catalog.stub, text="a", spaces=[item_pb2.SPACE_TEXT])) == ["good", "last"]


async def test_an_id_twice_in_a_chunk_keeps_the_order_and_a_mask_encodes_nothing(
    catalog: ServedCatalog,
) -> None:
    codes = [o.code for o in await upsert(catalog.stub, item("a", "one"), item("a", "two"), item("a", "two"))]
    created, updated = item_pb2.ITEM_OUTCOME_CODE_CREATED, item_pb2.ITEM_OUTCOME_CODE_UPDATED
    assert codes == [created, updated, item_pb2.ITEM_OUTCOME_CODE_UNCHANGED]
    before = catalog.writer.encoders.finished
    assert before["text"] == 2
    outcomes = await upsert(catalog.stub, item("a", price=3), item("nobody", price=3), mask=("price",))
    assert catalog.writer.encoders.finished == before
    assert [o.code for o in outcomes] == [updated, item_pb2.ITEM_OUTCOME_CODE_FAILED]
    assert outcomes[1].error.code == 5
    response = await catalog.stub.GetItems(pb.GetItemsRequest(item_ids=["a", "nobody"]))
    assert (response.items[0].item.title, response.items[0].item.price) == ("two", 3)
    assert list(response.missing_item_ids) == ["nobody"]


async def test_identical_contents_are_encoded_once(catalog: ServedCatalog) -> None:
    red, blue = item_pb2.Image(data=png_bytes("red")), item_pb2.Image(data=png_bytes("blue"))
    await upsert(catalog.stub, *(item(f"i{n}", "same words", image=red) for n in range(5)))
    await upsert(
        catalog.stub, item("later", "same words", image=red), item("other", "same words", image=blue)
    )
    assert catalog.writer.encoders.finished == {"text": 1, "image": 2, "caption": 0}
    await catalog.stub.EmbedTexts(pb.EmbedTextsRequest(texts=["a", "b", "a", "a"]))
    assert catalog.writer.encoders.finished["text"] == 3
    await catalog.stub.DeleteItems(pb.DeleteItemsRequest(item_ids=[f"i{n}" for n in range(5)]))
    assert sorted(await search_ids(catalog.stub, image=png_bytes("red"))) == ["later", "other"]


async def test_chunks_are_answered_in_order_and_the_last_write_wins(catalog: ServedCatalog) -> None:
    async def chunks() -> AsyncIterator[pb.UpsertItemsRequest]:
        for n in range(12):
            many = [item(f"only-{n}-{k}", f"words {n} {k}") for k in range(20 if n % 3 == 0 else 1)]
            yield pb.UpsertItemsRequest(items=[item("shared", f"version {n}"), *many])

    answers = [response async for response in catalog.stub.UpsertItems(chunks())]
    assert [answer.outcomes[1].item_id for answer in answers] == [f"only-{n}-0" for n in range(12)]
    assert (await catalog.stub.GetItems(pb.GetItemsRequest(item_ids=["shared"]))).items[
        0
    ].item.title == "version 11"
    sequences = [answer.outcomes[0].sequence for answer in answers]
    assert sequences == sorted(set(sequences))

    call: Any = catalog.stub.UpsertItems()  # each answer is waited for before the next chunk is sent
    for n in range(3):
        await call.write(pb.UpsertItemsRequest(items=[item(f"turn-{n}", "a")]))
        assert (await call.read()).outcomes[0].item_id == f"turn-{n}"
    await call.write(pb.UpsertItemsRequest())
    assert await violations(call.read()) == (grpc.StatusCode.INVALID_ARGUMENT, ["items"])
    assert len(await upsert(catalog.stub, item("after", "a"))) == 1


async def test_a_cancelled_stream_leaves_no_task_behind(catalog: ServedCatalog) -> None:
    call = catalog.stub.UpsertItems()
    for n in range(3):
        await call.write(pb.UpsertItemsRequest(items=[item(f"{n}-{k}", f"w {k}") for k in range(1000)]))
    call.cancel()
    outcome = (await upsert(catalog.stub, item("next", "words")))[0]
    assert outcome.code == item_pb2.ITEM_OUTCOME_CODE_CREATED
    while any(catalog.writer.encoders.waiting.values()):
        await asyncio.sleep(0.01)
    assert [t for t in asyncio.all_tasks() if "_start_chunk" in repr(t.get_coro())] == []


async def test_an_image_without_its_file_does_not_block_a_change(catalog: ServedCatalog) -> None:
    bundle_item = Item(id="b", title="brought", image_hash=b"h" * 32)
    present, text = np.ones(1, bool), np.eye(1, 32, dtype=np.float32)
    blocks = [VectorBlock("text", catalog.writer.encoders.digests["text"], text, present)]
    blocks.append(VectorBlock("image", "an encoder of before", text, present))
    catalog.writer.view.items.load("v0", [bundle_item], blocks, [datetime.now(UTC)])
    [outcome] = await upsert(catalog.stub, item("b", price=3), mask=("price",))
    assert outcome.code == item_pb2.ITEM_OUTCOME_CODE_UPDATED, outcome
    assert outcome.image_state == item_pb2.MODALITY_STATE_PENDING


async def test_search_is_exact_under_filters_deletions_and_restarts(catalog_server: CatalogServer) -> None:
    names = [f"item-{n}" for n in range(30)]

    async def search(catalog: ServedCatalog) -> dict[str, float]:
        odd = filter_pb2.Filter(equals=filter_pb2.Equals(attribute="parity", text="odd"))
        response = await catalog.stub.Search(
            pb.SearchRequest(text="title 3", limit=30, filter=odd, view=item_pb2.VIEW_READABLE)
        )
        scores = {hit.item_id: hit.score for hit in response.results[0].hits}
        assert len(scores) == len(response.results[0].hits)
        assert sorted(scores) == sorted(n for k, n in enumerate(names) if k % 2 and k != 3)
        return scores

    async with catalog_server.serve() as catalog:
        parity = [item_pb2.Attribute(name="parity", texts=[w]) for w in ("even", "odd")]
        items = [item(n, f"title {k}", attributes=[parity[k % 2]]) for k, n in enumerate(names)]
        await upsert(catalog.stub, *items)
        deletion = await catalog.stub.DeleteItems(pb.DeleteItemsRequest(item_ids=["item-3", "nobody"]))
        assert [o.error.code for o in deletion.outcomes] == [0, 5]
        before = await search(catalog)
    async with catalog_server.serve() as catalog:
        after = await search(catalog)
    assert list(after) == list(before)
    assert after == pytest.approx(before, abs=1e-5)


async def test_a_graph_is_built_in_the_background_and_reused_at_the_next_start(
    catalog_server: CatalogServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmented_index, "_FRESH_ROWS", 8)
    words = [f"{a}{b}-{b}{a}" for a in "abcdefgh" for b in "stuvwxyz"]

    async def title(stub: Any, text: str) -> list[str]:
        request = pb.SearchRequest(text=text, limit=8, view=item_pb2.VIEW_READABLE)
        request.spaces.append(item_pb2.SPACE_TEXT)
        return [hit.item_id for hit in (await stub.Search(request)).results[0].hits]

    async with catalog_server.serve() as catalog:
        task = asyncio.ensure_future(catalog.writer.view.maintain())
        for start in range(0, len(words), 16):
            outcomes = await upsert(catalog.stub, *(item(word, word) for word in words[start : start + 16]))
            assert {o.code for o in outcomes} == {item_pb2.ITEM_OUTCOME_CODE_CREATED}
        while not (task.done() or list((tmp_path / "index").glob("text/segment.json"))):
            await asyncio.sleep(0.05)
        await upsert(catalog.stub, item(words[0], "something else"))
        await catalog.stub.DeleteItems(pb.DeleteItemsRequest(item_ids=[words[1]]))
        task.cancel()
    async with catalog_server.serve() as catalog:
        index = catalog.writer.view.spaces["text"]
        assert isinstance(index, SegmentedIndex)
        first_part, *_ = index._snapshot.parts
        assert first_part.segment.large
        assert len(index) == len(words) - 1
        assert catalog.writer.encoders.finished["text"] == 0
        for word in words[2:]:
            assert (await title(catalog.stub, word))[0] == word
        assert (await title(catalog.stub, "something else"))[0] == words[0]
        assert words[1] not in await title(catalog.stub, words[1])


async def test_pages_cover_the_whole_catalog(catalog: ServedCatalog) -> None:
    await upsert(catalog.stub, *(item(f"i{n}", "x") for n in range(25)))
    hashes, token = [], ""
    while True:
        page = await catalog.stub.GetItems(pb.GetItemsRequest(page_size=10, page_token=token))
        hashes += [record.item_hash for record in page.items]
        if not (token := page.next_page_token):
            break
    assert hashes == sorted(set(hashes))
    assert len(hashes) == 25
    assert await violations(catalog.stub.GetItems(pb.GetItemsRequest(page_token="?"))) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        ["page_token"],
    )


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
        ({"groups": [pb.QueryGroup(item_ids=["a"], weights=[1, 2])]}, "groups[0].weights"),
        ({"text": "x" * ((2 << 20) + 1)}, "text"),
    ],
)
async def test_an_invalid_search_names_its_field(
    catalog: ServedCatalog, request_fields: dict[str, Any], field: str
) -> None:
    call = catalog.stub.Search(pb.SearchRequest(**({"limit": 3} | request_fields)))
    assert await violations(call) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


async def test_a_search_waits_for_a_future_change_until_its_deadline(catalog: ServedCatalog) -> None:
    search = catalog.stub.Search(pb.SearchRequest(text="late", limit=1, min_sequence=1), timeout=20)
    waiting = asyncio.ensure_future(search)
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await upsert(catalog.stub, item("late", "late"))
    assert len((await waiting).results[0].item_hashes) == 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await catalog.stub.Search(pb.SearchRequest(text="never", limit=1, min_sequence=99), timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_follower_has_the_same_table_and_vectors(catalog: ServedCatalog) -> None:
    await upsert(
        catalog.stub, item("a", "red", price=2.5), item("b", image=item_pb2.Image(data=png_bytes("blue")))
    )
    ready = asyncio.Event()
    watch: Any = catalog.stub.WatchItems
    follower = ChangeFeedFollower(watch, ItemTable(), "v1", ready)
    task = asyncio.ensure_future(follower.run())
    await asyncio.wait_for(ready.wait(), 20)
    outcome = (await upsert(catalog.stub, item("c", "green")))[0]
    await follower.wait_for(outcome.sequence)
    deletion = await catalog.stub.DeleteItems(pb.DeleteItemsRequest(item_ids=["a"]))
    await follower.wait_for(deletion.outcomes[0].sequence)
    task.cancel()
    table, writer_table = follower.table, catalog.writer.view.table
    assert table.ids(range(table.length)) == writer_table.ids(range(writer_table.length))
    now = catalog.writer.view.items._clock()
    np.testing.assert_array_equal(table.available(now), writer_table.available(now))
    for space in ("text", "image"):
        for one, other in zip(table.vectors(space) or (), writer_table.vectors(space) or (), strict=True):
            np.testing.assert_array_equal(one[1:], other[1:])


@given(rows=st.integers(0, 400), width=st.integers(1, 400))
@settings(deadline=None)
def test_vectors_message_equals_a_message_built_from_floats(rows: int, width: int) -> None:
    vectors = np.random.default_rng(rows).standard_normal((rows, width), np.float32)
    plain = pb.Vectors(dimension=width, values=vectors.ravel().tolist())
    assert vectors_message(vectors) == plain
    assert vectors_message(vectors).SerializeToString() == plain.SerializeToString()


async def test_rows_that_cannot_be_embedded_have_errors_in_their_place(catalog: ServedCatalog) -> None:
    images = await catalog.stub.EmbedImages(
        pb.EmbedImagesRequest(images=[png_bytes("red"), b"", png_bytes("blue")])
    )
    assert [e.row for e in images.errors] == [1]
    lengths = np.linalg.norm(np.reshape(images.vectors.values, (3, -1)), axis=1)
    np.testing.assert_allclose(lengths, [1, 0, 1], atol=1e-5)
    texts = await catalog.stub.EmbedTexts(pb.EmbedTextsRequest(texts=["赤い", "", "long " * 200]))
    assert list(texts.truncated_rows) == [2]
    assert await violations(catalog.stub.EmbedTexts(pb.EmbedTextsRequest())) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        ["texts"],
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await catalog.stub.EmbedTexts(pb.EmbedTextsRequest(texts=["a"], bundle="v0"))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize("form", ["AVIF", "HEIF", "WEBP", "GIF", "PNG", "JPEG"])
async def test_images_of_every_format_can_be_written_and_searched(catalog: ServedCatalog, form: str) -> None:
    pictures = [encode_image(Image.new("RGB", (80, 60), color), form) for color in ("red", "blue")]
    outcomes = await upsert(
        catalog.stub, *(item(f"i{n}", image=item_pb2.Image(data=data)) for n, data in enumerate(pictures))
    )
    assert [o.image_state for o in outcomes] == [item_pb2.MODALITY_STATE_READY] * 2
    assert (await search_ids(catalog.stub, image=pictures[1]))[0] == "i1"


async def test_image_searches_do_not_wait_for_slow_files(catalog: ServedCatalog) -> None:
    slow = progressive_jpeg(10_000, 9900, 100)
    await upsert(catalog.stub, item("a", image=item_pb2.Image(data=png_bytes("red"))))
    bulk = asyncio.ensure_future(catalog.stub.EmbedImages(pb.EmbedImagesRequest(images=[slow] * 40)))
    while not catalog.writer.encoders._loader.pids:
        await asyncio.sleep(0.01)
    searches = [catalog.stub.Search(pb.SearchRequest(image=slow, limit=1)) for _ in range(4)]
    tasks = [asyncio.ensure_future(call) for call in searches]
    assert await search_ids(catalog.stub, image=png_bytes("red")) == ["a"]
    assert await search_ids(catalog.stub, image=encode_image(Image.new("RGB", (90, 90), "red"), "PNG")) == [
        "a"
    ]
    assert not any(task.done() for task in [bulk, *tasks])
    assert catalog.writer.encoders.decoded == {"thread": 3}
    for task in [bulk, *tasks]:
        task.cancel()


async def test_an_image_over_a_limit_is_an_error_in_its_row_that_names_the_limit(
    catalog: ServedCatalog,
) -> None:
    files = [progressive_jpeg(80, 80, 1000), webp_header(9900, 9900), b"<html>", png_bytes("red")]
    response = await catalog.stub.EmbedImages(pb.EmbedImagesRequest(images=files))
    messages = {error.row: error.error.message for error in response.errors}
    assert list(messages) == [0, 1, 2]
    for row, words in enumerate(("100 scans", "25 megapixels", "JPEG, PNG, GIF, WebP, AVIF or HEIC")):
        assert f"images[{row}]" in messages[row]
        assert words in messages[row]


async def test_grpcurl_lists_describes_and_calls(catalog: ServedCatalog) -> None:
    grpcurl = shutil.which("grpcurl") or shutil.which("grpcurl", path=str(Path.home() / "go/bin"))
    if grpcurl is None:
        skip_without("grpcurl", "grpcurl is not installed")
        return
    await upsert(catalog.stub, item("a", "red scarf"))

    def call(*arguments: str) -> str:
        command = [grpcurl, "-plaintext", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    async def ask(*arguments: str) -> str:
        return await asyncio.to_thread(call, *arguments)

    server = f"127.0.0.1:{catalog.port}"
    assert NAME in await ask(server, "list")
    assert "rpc Search" in await ask(server, "describe", NAME)
    health = await ask("-d", json.dumps({"service": NAME}), server, "grpc.health.v1.Health/Check")
    assert json.loads(health) == {"status": "SERVING"}
    query = {"text": "red", "limit": 1, "view": "VIEW_READABLE", "spaces": ["SPACE_TEXT"]}
    answer = json.loads(await ask("-d", json.dumps(query), server, f"{NAME}/Search"))
    assert answer["results"][0]["hits"][0]["item_id"] == "a", answer

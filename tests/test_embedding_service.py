"""The embedding service over real gRPC: what is acknowledged is searchable, bad input is named."""

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
from vitrine.catalog.v1 import filter_pb2, item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as pb

from services.catalog import Item
from services.embedding import segmented
from services.embedding.catalogue import Catalogue
from services.embedding.item_writes import Block
from services.embedding.segmented import SegmentedIndex
from services.embedding.servicer import _block
from services.follower import Follower
from services.item_table import ItemTable
from tests.catalogues import NAME, Run, encoders, found, item, picture, run, upsert, violations
from tests.conftest import skip_without

__all__ = ["encoders", "run"]  # fixtures


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
            item("elsewhere", image=item_pb2.Image(uri="ftp://example.org/a.png")),
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
        before = catalogue.encoding.finished
        assert before["text"] == 2
        outcomes = await upsert(stub, item("a", price=3), item("nobody", price=3), mask=("price",))
        assert catalogue.encoding.finished == before
        assert [o.code for o in outcomes] == [updated, item_pb2.ITEM_OUTCOME_CODE_FAILED]
        assert outcomes[1].error.code == 5
        got = await stub.GetItems(pb.GetItemsRequest(item_ids=["a", "nobody"]))
        assert (got.items[0].item.title, got.items[0].item.price) == ("two", 3)
        assert list(got.missing_item_ids) == ["nobody"]

    run(body)


def test_what_is_the_same_is_encoded_once(run: Run) -> None:
    async def body(stub: Any, catalogue: Catalogue, port: int) -> None:
        red, blue = item_pb2.Image(data=picture("red")), item_pb2.Image(data=picture("blue"))
        await upsert(stub, *(item(f"i{n}", "same words", image=red) for n in range(5)))
        await upsert(stub, item("later", "same words", image=red), item("other", "same words", image=blue))
        assert catalogue.encoding.finished == {"text": 1, "image": 2, "caption": 0}
        await stub.EmbedTexts(pb.EmbedTextsRequest(texts=["a", "b", "a", "a"]))
        assert catalogue.encoding.finished["text"] == 3
        await stub.DeleteItems(pb.DeleteItemsRequest(item_ids=[f"i{n}" for n in range(5)]))
        assert sorted(await found(stub, image=picture("red"))) == ["later", "other"]

    run(body)


def test_chunks_of_a_stream_are_answered_in_turn_and_the_last_write_wins(run: Run) -> None:
    async def body(stub: Any, catalogue: Catalogue, port: int) -> None:
        async def chunks() -> AsyncIterator[pb.UpsertItemsRequest]:
            for n in range(12):
                many = [item(f"only-{n}-{k}", f"words {n} {k}") for k in range(20 if n % 3 == 0 else 1)]
                yield pb.UpsertItemsRequest(items=[item("shared", f"version {n}"), *many])

        answers = [response async for response in stub.UpsertItems(chunks())]
        assert [answer.outcomes[1].item_id for answer in answers] == [f"only-{n}-0" for n in range(12)]
        assert (await stub.GetItems(pb.GetItemsRequest(item_ids=["shared"]))).items[
            0
        ].item.title == "version 11"
        shared = [answer.outcomes[0].sequence for answer in answers]
        assert shared == sorted(set(shared))

        call = stub.UpsertItems()  # each answer is waited for before the next chunk is sent
        for n in range(3):
            await call.write(pb.UpsertItemsRequest(items=[item(f"turn-{n}", "a")]))
            assert (await call.read()).outcomes[0].item_id == f"turn-{n}"
        await call.write(pb.UpsertItemsRequest())
        assert await violations(call.read()) == (grpc.StatusCode.INVALID_ARGUMENT, ["items"])
        assert len(await upsert(stub, item("after", "a"))) == 1

    run(body)


def test_a_stream_that_its_caller_leaves_leaves_nothing_behind(run: Run) -> None:
    async def body(stub: Any, catalogue: Catalogue, port: int) -> None:
        call = stub.UpsertItems()
        for n in range(3):
            await call.write(pb.UpsertItemsRequest(items=[item(f"{n}-{k}", f"w {k}") for k in range(1000)]))
        call.cancel()
        outcome = (await upsert(stub, item("next", "words")))[0]
        assert outcome.code == item_pb2.ITEM_OUTCOME_CODE_CREATED
        while any(catalogue.encoding.waiting.values()):
            await asyncio.sleep(0.01)
        assert [t for t in asyncio.all_tasks() if "_begin" in repr(t.get_coro())] == []

    run(body)


def test_a_photograph_that_came_without_its_file_does_not_stand_in_a_change_s_way(run: Run) -> None:
    async def body(stub: Any, catalogue: Catalogue, port: int) -> None:
        brought = Item(id="b", title="brought", image_hash=b"h" * 32)
        present, text = np.ones(1, bool), np.eye(1, 32, dtype=np.float32)
        blocks = [Block("text", catalogue.encoding.digests["text"], text, present)]
        blocks.append(Block("image", "an encoder of before", text, present))
        catalogue.view.items.load("v0", [brought], blocks, [datetime.now(UTC)])
        [outcome] = await upsert(stub, item("b", price=3), mask=("price",))
        assert outcome.code == item_pb2.ITEM_OUTCOME_CODE_UPDATED, outcome
        assert outcome.image_state == item_pb2.MODALITY_STATE_PENDING

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

    answers: list[list[tuple[str, float]]] = []

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
    before, after = (dict(answer) for answer in answers)
    assert list(after) == list(before)
    assert after == pytest.approx(before, abs=1e-5)


def test_a_graph_is_built_beside_the_calls_and_kept_for_the_next_start(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmented, "_FRESH_ROWS", 8)
    words = [f"{a}{b}-{b}{a}" for a in "abcdefgh" for b in "stuvwxyz"]

    async def title(stub: Any, text: str) -> list[str]:
        request = pb.SearchRequest(text=text, limit=8, view=item_pb2.VIEW_READABLE)
        request.spaces.append(item_pb2.SPACE_TEXT)
        return [hit.item_id for hit in (await stub.Search(request)).results[0].hits]

    async def first(stub: Any, catalogue: Catalogue, port: int) -> None:
        task = asyncio.ensure_future(catalogue.view.maintain())
        for start in range(0, len(words), 16):
            outcomes = await upsert(stub, *(item(word, word) for word in words[start : start + 16]))
            assert {o.code for o in outcomes} == {item_pb2.ITEM_OUTCOME_CODE_CREATED}
        while not (task.done() or list((tmp_path / "index").glob("text/segment.json"))):
            await asyncio.sleep(0.05)
        await upsert(stub, item(words[0], "something else"))
        await stub.DeleteItems(pb.DeleteItemsRequest(item_ids=[words[1]]))
        task.cancel()

    async def second(stub: Any, catalogue: Catalogue, port: int) -> None:
        index = catalogue.view.spaces["text"]
        assert isinstance(index, SegmentedIndex)
        kept, *_ = index._snapshot.parts
        assert kept.segment.large
        assert len(index) == len(words) - 1
        assert catalogue.encoding.finished["text"] == 0
        for word in words[2:]:
            assert (await title(stub, word))[0] == word
        assert (await title(stub, "something else"))[0] == words[0]
        assert words[1] not in await title(stub, words[1])

    run(first)
    run(second)


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
        ready = asyncio.Event()
        follower = Follower(stub.WatchItems, ItemTable(), "v1", ready)
        task = asyncio.ensure_future(follower.run())
        await asyncio.wait_for(ready.wait(), 20)
        outcome = (await upsert(stub, item("c", "green")))[0]
        await follower.wait_for(outcome.sequence)
        deleted = await stub.DeleteItems(pb.DeleteItemsRequest(item_ids=["a"]))
        await follower.wait_for(deleted.outcomes[0].sequence)
        task.cancel()
        mine, theirs = follower.table, catalogue.view.table
        assert mine.ids(range(mine.length)) == theirs.ids(range(theirs.length))
        now = catalogue.view.items._clock()
        np.testing.assert_array_equal(mine.available(now), theirs.available(now))
        for space in ("text", "image"):
            for one, other in zip(mine.vectors(space) or (), theirs.vectors(space) or (), strict=True):
                np.testing.assert_array_equal(one[1:], other[1:])

    run(body)


@given(rows=st.integers(0, 400), width=st.integers(1, 400))
@settings(deadline=None)
def test_a_block_is_the_message_of_its_floats(rows: int, width: int) -> None:
    vectors = np.random.default_rng(rows).standard_normal((rows, width), np.float32)
    plain = pb.Vectors(dimension=width, values=vectors.ravel().tolist())
    assert _block(vectors) == plain
    assert _block(vectors).SerializeToString() == plain.SerializeToString()


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

"""What a peer of the load test receives, and how its results are reported."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from vitrine.catalog.v1 import event_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from bench.serving import drawn_events, report
from bench.serving.arrivals import Latencies
from bench.serving.cornac_server import FittedModel, interaction_lines, page_items, page_path
from bench.serving.drawn_catalog import UNTIL, DrawnItems
from bench.serving.driver import FLOOR, ONE_CALLER, Phase
from bench.serving.peer import PeerResult, requests_of_users
from bench.serving.procfs import Memory
from bench.serving.report import ShopResult, ratios

_ROW = "shop, 10 items, one: {} of a page for requests with a user, over cornac's (peer)"


def phase(name: str, cpu_ms: float, p50: float, errors: int = 0, empty: int = 0) -> Phase:
    return Phase(name, Latencies(30, 1, 1, errors, empty, 0.0, p50, p50, p50, p50, 0.0, 0.1), cpu_ms)


def result(peer: PeerResult | str | None) -> ShopResult:
    phases = [phase(FLOOR, 0.5, 0.25), phase(ONE_CALLER, 8, 4)]
    return ShopResult("shop", "one", 10, 1, 1.0, 1.0, 1.0, {}, phases, 10.0, peer=peer)


def measured() -> PeerResult:
    model = FittedModel("model.pkl", "1.2", users=5, items=9, interactions=40, seconds=1.0)
    phases = [phase(ONE_CALLER, 3, 2, errors=1), phase("5.0/s", 4, 3, empty=2)]
    own = phase("one caller, users", 9, 5)
    return PeerResult("cornac", own, phases, model, Memory(100, 110, 90), 7, 0.3)


def test_every_event_of_a_shop_becomes_a_line_with_its_user_and_item() -> None:
    items = DrawnItems(300)
    hashes = drawn_events.hashes_of(items.ids)
    events = drawn_events.draw_events(items.cluster, items.weights, items.ids, hashes, UNTIL)
    lines, left_out = interaction_lines(events, items.ids)
    assert left_out == 0
    assert len(lines) == len(events) == drawn_events.event_count(300)
    pairs = [json.loads(line) for line in lines]
    assert [user for user, _ in pairs] == [events.user_ids[code] for code in events.user]
    assert [item for _, item in pairs] == [events.item_ids[code] for code in events.item]


def test_events_of_items_that_are_not_in_the_catalog_are_left_out_and_counted() -> None:
    items = DrawnItems(300)
    hashes = drawn_events.hashes_of(items.ids)
    events = drawn_events.draw_events(items.cluster, items.weights, items.ids, hashes, UNTIL)
    catalog = items.ids[:100]
    lines, left_out = interaction_lines(events, catalog)
    assert left_out == int(np.sum(events.item >= 100)) > 0
    assert len(lines) + left_out == len(events)
    assert {json.loads(line)[1] for line in lines} <= set(catalog)


def test_only_requests_that_name_a_user_are_sent_to_a_peer_the_last_first() -> None:
    session = [event_pb2.SessionItem(item_id="i")]
    messages = [
        pb.RecommendRequest(user_id="a", session=session),
        pb.RecommendRequest(session=session),
        pb.RecommendRequest(user_id="b"),
        pb.RecommendRequest(),
    ]
    requests, users = requests_of_users([message.SerializeToString() for message in messages])
    assert users == ["b", "a"]
    assert [pb.RecommendRequest.FromString(request) for request in requests] == [messages[2], messages[0]]


def test_a_page_is_asked_for_by_an_escaped_user_and_counted_by_its_items() -> None:
    assert page_path("u 1&k=2", 20) == "/recommend?uid=u+1%26k%3D2&k=20&remove_seen=true"
    assert page_items(json.dumps({"recommendations": ["a", "b"], "query": {}}).encode()) == 2
    assert page_items(b'{"recommendations": []}') == 0


def test_the_ratio_to_a_peer_is_that_of_one_caller_for_the_same_requests() -> None:
    rows = ratios([result(measured())])
    assert rows[_ROW.format("CPU")] == pytest.approx(9 / 3)
    assert rows[_ROW.format("p50")] == pytest.approx(5 / 2)
    assert not [name for name in ratios([result(None)]) if "peer" in name]


def test_a_peer_that_was_not_measured_has_a_row_that_says_why(tmp_path: Path) -> None:
    results = [result("Cornac is not installed")]
    rows = ratios(results)
    row = "shop, 10 items, one: CPU and p50 of a page over those of the peer (peer)"
    assert rows[row] == "not measured. Cornac is not installed"
    report.write_json(tmp_path / "results.json", results, rows)
    assert "Cornac is not installed" in (tmp_path / "results.json").read_text()
    report.show(results[0], Console(file=io.StringIO()))


def test_the_report_says_what_a_peer_computes_and_what_it_could_not_answer() -> None:
    output = io.StringIO()
    report.show(result(measured()), Console(file=output, width=165))
    text = output.getvalue()
    assert "peer: cornac 1.2" in text
    assert measured().computes in text
    assert "7 events of items that are not in the catalog were left out" in text
    assert "no page for the 30% of requests" in text
    assert "Of 60 calls 1 failed and 2 came back empty" in text

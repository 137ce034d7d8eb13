"""Reasons: shares against the terms of a sum and against SHAP, the item behind them, and the sentences."""

from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitrine.catalog.v1 import event_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.gateway.sentences import LANGUAGES, sentence
from services.item_table import ItemTable
from services.ranking.basis import Basis
from services.ranking.features import Features
from services.ranking.graph import GraphView
from services.ranking.moment import moment
from services.ranking.query import Query
from services.ranking.reasons import KINDS, Reasoner, kinds_of, shares_of
from services.ranking.reranker import ConditionalLogit, RerankerModel, write_reranker
from services.ranking.scales import Scales
from services.ranking.scoring import Scorer
from services.ranking.state import BehaviourState
from tests.recommending import NOW, Shop, purchase, session, violations
from tests.shops import EVENT_TYPES, PER_WORLD, graph, items


def basis() -> Basis:
    """The two worlds with drawn vectors: a world's own direction, and noise."""
    random = np.random.default_rng(0)
    vectors = {}
    for space in ("text", "image"):
        values = random.standard_normal((2 * PER_WORLD, 8)).astype(np.float32) * 0.1
        values[:PER_WORLD, 0] += 1
        values[PER_WORLD:, 1] += 1
        vectors[space] = values / np.linalg.norm(values, axis=1, keepdims=True)
    present = {space: np.ones(2 * PER_WORLD, bool) for space in vectors}
    table = ItemTable.of(items(), vectors, present, [NOW] * (2 * PER_WORLD))
    return Basis(table, GraphView(graph(), table), ("world", "colour"))


def asked(first: int, second: int) -> Query:
    none = np.empty(0, np.float32)
    return Query(
        session=np.array([first, second]),
        session_weights=np.ones(2, np.float32),
        history=np.empty(0, np.int64),
        ages=none,
        weights=none,
        bought=np.empty(0, bool),
        channels=np.empty(0, np.int16),
    )


def test_every_column_is_of_one_kind_at_most_and_every_kind_has_some() -> None:
    features = Features(basis())
    found = kinds_of(features)
    named = [name for names in found.values() for name in names]
    assert len(set(named)) == len(named)
    assert set(features.names) - set(named) == {"session_length", "history_length", "days_since_last"}
    assert all(found[kind] for kind in KINDS)


@pytest.mark.parametrize("trees", [False, True])
def test_shares_are_those_of_the_terms_and_near_shap(tmp_path: Path, trees: bool) -> None:
    over = basis()
    features = Features(over)
    now = moment(BehaviourState(EVENT_TYPES), over.table, 0)
    random = np.random.default_rng(1)
    queries = [asked(*random.choice(2 * PER_WORLD, 2, replace=False).tolist()) for _ in range(30)]
    rows = np.arange(2 * PER_WORLD)
    matrix = np.concatenate([features.matrix(query, rows, now) for query in queries])
    told = np.nan_to_num(matrix)
    weight = random.standard_normal(len(features.names)) * (np.ptp(told, axis=0) > 0)
    choice = ConditionalLogit(features.names, Scales.of(matrix), weight.tolist())
    booster = None
    if trees:
        place = {name: at for at, name in enumerate(features.names)}
        wanted = told[:, place["text_session_most"]] * 3 + told[:, place["world_session"]]
        data = lightgbm.Dataset(matrix, wanted)
        booster = lightgbm.train({"verbosity": -1, "num_leaves": 7, "seed": 0}, data, 20)
    model = RerankerModel(choice, booster)
    write_reranker(tmp_path, model)
    scorer = Scorer(features, over.table, None, tmp_path)
    kinds, place = kinds_of(features), {name: at for at, name in enumerate(features.names)}
    reasoner = Reasoner(scorer, features, over)
    agree = []
    for query in queries[:5]:
        found = reasoner.reasons(query, rows, now)
        terms = model.contributions(features.matrix(query, rows, now))
        exact = np.stack([terms[:, [place[n] for n in kinds[k]]].sum(1) for k in KINDS], axis=1)
        np.testing.assert_allclose(found.shares.sum(1), 1, rtol=1e-5)
        if not trees:
            wanted = shares_of(exact.sum(1), exact.sum(1, keepdims=True) - exact)
            np.testing.assert_allclose(found.shares, wanted, atol=1e-4)
        agree.append((found.shares.argmax(1) == exact.argmax(1)).mean())
    assert np.mean(agree) > 0.8


@given(st.lists(st.lists(st.floats(-5, 5), min_size=5, max_size=5), min_size=1, max_size=8))
def test_shares_add_up_whatever_the_scores_are(added: list[list[float]]) -> None:
    terms = np.array(added)
    whole = terms.sum(1)
    shares = shares_of(whole, whole[:, None] - terms)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)
    assert ((shares >= 0) & (shares <= 1)).all()


def test_the_item_behind_a_kind_is_the_nearest_of_the_persons_own() -> None:
    over = basis()
    features = Features(over)
    now = moment(BehaviourState(EVENT_TYPES), over.table, 0)
    reasoner = Reasoner(Scorer(features, over.table), features, over)
    found = reasoner.reasons(asked(3, PER_WORLD + 4), np.array([5, PER_WORLD + 6]), now)
    # Only a world's own items were bought together with one of it, and are described like it.
    for kind in ("behaviour", "text", "image"):
        assert found.seeds[:, KINDS.index(kind)].tolist() == [0, 1]
    assert (found.seeds[:, KINDS.index("popularity")] == -1).all()


def test_a_page_says_why_over_grpc_in_both_languages(bundle: Path, tmp_path: Path) -> None:
    async def body(stub: Any) -> None:
        request = pb.RecommendRequest(session=session("garden-03"), page_size=5, include_reasons=True)
        page = await stub.Recommend(request)
        assert not page.degraded
        for item in page.items:
            assert sum(reason.share for reason in item.reasons) == pytest.approx(1, abs=1e-5)
            shares = [reason.share for reason in item.reasons]
            assert shares == sorted(shares, reverse=True)
            together = next(r for r in item.reasons if r.kind == "behaviour")
            assert (together.history_item_id, together.history_bought) == ("garden-03", False)
            assert "garden thing 3" in item.explanation
            assert "bought" not in item.explanation
        for kind, bought in (("purchase", True), ("click", False)):
            done = pb.RecommendRequest(
                session=[event_pb2.SessionItem(item_id="garden-03", type=kind)],
                page_size=1,
                include_reasons=True,
            )
            [first] = (await stub.Recommend(done)).items
            assert {r.history_bought for r in first.reasons if r.history_item_id} == {bought}
        plain = pb.RecommendRequest(session=session("garden-03"), page_size=5)
        assert [i.item_id for i in (await stub.Recommend(plain)).items] == [i.item_id for i in page.items]
        assert not any(i.reasons or i.explanation for i in (await stub.Recommend(plain)).items)
        request.language = "zh"
        chinese = (await stub.Recommend(request)).items[0].explanation
        assert "garden thing 3" in chinese
        assert any("\u4e00" <= letter <= "\u9fff" for letter in chinese)
        request.language = "tlh"
        assert await violations(stub.Recommend(request)) == ["language"]
        stranger = await stub.Recommend(pb.RecommendRequest(page_size=3, include_reasons=True))
        assert all(item.explanation and not item.reasons[0].history_item_id for item in stranger.items)
        assert not any("you" in item.explanation for item in stranger.items)
        await stub.WriteEvents(
            pb.WriteEventsRequest(events=[purchase("1", "ann", "garden-04", kind="click")])
        )
        ann = await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=2, include_reasons=True))
        mine = [r for item in ann.items for r in item.reasons if r.history_item_id]
        assert {(r.history_item_id, r.history_bought) for r in mine} == {("garden-04", False)}

    for layout in ("one", "three"):
        Shop(bundle, tmp_path / layout, layout, clock=None).run(body)


def test_a_page_is_there_when_its_reasons_are_not(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(Reasoner, "reasons", broken)

    async def body(stub: Any) -> None:
        page = await stub.Recommend(pb.RecommendRequest(page_size=3, include_reasons=True))
        assert len(page.items) == 3
        assert [d.stage for d in page.degraded] == ["explain"]

    Shop(bundle, tmp_path / "state", "three").run(body)


def test_every_kind_has_its_sentences_in_every_language() -> None:
    said = {
        (kind, language, sentence(kind, language, title, bought=bought))
        for kind in (*KINDS, "nobody")
        for language in LANGUAGES
        for title in ("", "A {curly} cup")
        for bought in (False, True)
    }
    assert len(said) == len(LANGUAGES) * (4 * 3 + 2)
    assert all("{title}" not in text for _, _, text in said)

"""Explanations equal the terms of the score and name the items of the history behind it."""

from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitrine.catalog.v1 import event_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.catalog.item_table import ItemTable
from services.gateway.recommend.explanation_text import LANGUAGES, sentence
from services.ranking.features.context import RankingContext
from services.ranking.features.feature_matrix import Features
from services.ranking.models.co_occurrence import GraphView
from services.ranking.models.linear import ConditionalLogit
from services.ranking.models.reranker import RerankerModel, write_reranker
from services.ranking.models.scaler import FeatureScaler
from services.ranking.scoring.explanations import KINDS, Explainer, kinds_of, shares_of
from services.ranking.scoring.scorer import Scorer
from services.ranking.state.event_columns import EventState
from services.ranking.state.item_stats import item_stats
from services.ranking.state.user_query import UserQuery
from tests.support.shop_server import NOW, Shop, purchase, session, violations
from tests.support.shops import EVENT_TYPES, PER_WORLD, graph, items


def basis() -> RankingContext:
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
    return RankingContext(table, GraphView(graph(), table), ("world", "colour"))


def make_query(first: int, second: int) -> UserQuery:
    none = np.empty(0, np.float32)
    return UserQuery(
        session=np.array([first, second]),
        session_weights=np.ones(2, np.float32),
        history=np.empty(0, np.int64),
        ages=none,
        weights=none,
        purchased=np.empty(0, bool),
        channels=np.empty(0, np.int16),
    )


def test_every_feature_has_at_most_one_reason_and_every_reason_has_some() -> None:
    features = Features(basis())
    kinds = kinds_of(features)
    feature_names = [name for names in kinds.values() for name in names]
    assert len(set(feature_names)) == len(feature_names)
    assert set(features.names) - set(feature_names) == {"session_length", "history_length", "days_since_last"}
    assert all(kinds[kind] for kind in KINDS)


@pytest.mark.parametrize("trees", [False, True])
def test_reason_shares_equal_the_terms_and_are_close_to_shap(tmp_path: Path, trees: bool) -> None:
    over = basis()
    features = Features(over)
    now = item_stats(EventState(EVENT_TYPES), over.table, 0)
    random = np.random.default_rng(1)
    queries = [make_query(*random.choice(2 * PER_WORLD, 2, replace=False).tolist()) for _ in range(30)]
    rows = np.arange(2 * PER_WORLD)
    matrix = np.concatenate([features.matrix(query, rows, now) for query in queries])
    values = np.nan_to_num(matrix)
    # Columns of the last hours are constant without events. How close to SHAP depends on the draw.
    parts = features.parts
    columns = np.flatnonzero(~np.isin(features.names, [*parts["recent"], *parts["impressions"]]))
    weight = np.zeros(len(features.names))
    weight[columns] = random.standard_normal(len(columns)) * (np.ptp(values[:, columns], axis=0) > 0)
    choice = ConditionalLogit(features.names, FeatureScaler.of(matrix), weight.tolist())
    booster = None
    if trees:
        place = {name: at for at, name in enumerate(features.names)}
        label = values[:, place["text_session_most"]] * 3 + values[:, place["world_session"]]
        data = lightgbm.Dataset(matrix, label)
        booster = lightgbm.train({"verbosity": -1, "num_leaves": 7, "seed": 0}, data, 20)
    model = RerankerModel(choice, booster)
    write_reranker(tmp_path, model)
    scorer = Scorer(features, over.table, None, tmp_path)
    kinds, place = kinds_of(features), {name: at for at, name in enumerate(features.names)}
    reasoner = Explainer(scorer, features, over)
    agree = []
    for query in queries[:5]:
        reasons = reasoner.explain(query, rows, now)
        terms = model.contributions(features.matrix(query, rows, now))
        exact = np.stack([terms[:, [place[n] for n in kinds[k]]].sum(1) for k in KINDS], axis=1)
        np.testing.assert_allclose(reasons.shares.sum(1), 1, rtol=1e-5)
        if not trees:
            expected = shares_of(exact.sum(1), exact.sum(1, keepdims=True) - exact)
            np.testing.assert_allclose(reasons.shares, expected, atol=1e-4)
        agree.append((reasons.shares.argmax(1) == exact.argmax(1)).mean())
    assert np.mean(agree) > 0.8


@given(st.lists(st.lists(st.floats(-5, 5), min_size=5, max_size=5), min_size=1, max_size=8))
def test_reason_shares_sum_to_one_for_any_scores(rows_of_terms: list[list[float]]) -> None:
    terms = np.array(rows_of_terms)
    whole = terms.sum(1)
    shares = shares_of(whole, whole[:, None] - terms)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)
    assert ((shares >= 0) & (shares <= 1)).all()


def test_the_history_item_of_a_reason_is_the_nearest() -> None:
    over = basis()
    features = Features(over)
    now = item_stats(EventState(EVENT_TYPES), over.table, 0)
    reasoner = Explainer(Scorer(features, over.table), features, over)
    reasons = reasoner.explain(make_query(3, PER_WORLD + 4), np.array([5, PER_WORLD + 6]), now)
    # Only a world's own items were bought together with one of it, and are described like it.
    for kind in ("behavior", "text", "image"):
        assert reasons.seeds[:, KINDS.index(kind)].tolist() == [0, 1]
    assert (reasons.seeds[:, KINDS.index("popularity")] == -1).all()


async def test_a_page_has_reasons_in_both_languages_over_grpc(bundle: Path, tmp_path: Path) -> None:
    for layout in ("one", "three"):
        async with Shop(bundle, tmp_path / layout, layout, clock=None).serve() as stub:
            request = pb.RecommendRequest(session=session("garden-03"), page_size=5, include_reasons=True)
            page = await stub.Recommend(request)
            assert not page.degraded
            for item in page.items:
                assert sum(reason.share for reason in item.reasons) == pytest.approx(1, abs=1e-5)
                shares = [reason.share for reason in item.reasons]
                assert shares == sorted(shares, reverse=True)
                together = next(r for r in item.reasons if r.kind == "behavior")
                assert (together.history_item_id, together.history_purchased) == ("garden-03", False)
                assert "garden thing 3" in item.explanation
                assert "bought" not in item.explanation
            for kind, is_purchase in (("purchase", True), ("click", False)):
                recommend = pb.RecommendRequest(
                    session=[event_pb2.SessionItem(item_id="garden-03", type=kind)],
                    page_size=1,
                    include_reasons=True,
                )
                [first] = (await stub.Recommend(recommend)).items
                assert {r.history_purchased for r in first.reasons if r.history_item_id} == {is_purchase}
            plain = pb.RecommendRequest(session=session("garden-03"), page_size=5)
            assert [i.item_id for i in (await stub.Recommend(plain)).items] == [i.item_id for i in page.items]
            assert not any(i.reasons or i.explanation for i in (await stub.Recommend(plain)).items)
            request.language = "zh"
            chinese = (await stub.Recommend(request)).items[0].explanation
            assert "garden thing 3" in chinese
            assert any("\u4e00" <= letter <= "\u9fff" for letter in chinese)
            request.language = "tlh"
            assert await violations(stub.Recommend(request)) == ["language"]
            anonymous = await stub.Recommend(pb.RecommendRequest(page_size=3, include_reasons=True))
            assert all(item.explanation and not item.reasons[0].history_item_id for item in anonymous.items)
            assert not any("you" in item.explanation for item in anonymous.items)
            await stub.WriteEvents(
                pb.WriteEventsRequest(events=[purchase("1", "ann", "garden-04", kind="click")])
            )
            ann = await stub.Recommend(pb.RecommendRequest(user_id="ann", page_size=2, include_reasons=True))
            reasons = [r for item in ann.items for r in item.reasons if r.history_item_id]
            assert {(r.history_item_id, r.history_purchased) for r in reasons} == {("garden-04", False)}


async def test_a_page_is_served_without_its_reasons(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(Explainer, "explain", broken)
    async with Shop(bundle, tmp_path / "state", "three").serve() as stub:
        page = await stub.Recommend(pb.RecommendRequest(page_size=3, include_reasons=True))
        assert len(page.items) == 3
        assert [d.stage for d in page.degraded] == ["explain"]


def test_every_reason_has_sentences_in_every_language() -> None:
    sentences = {
        (kind, language, sentence(kind, language, title, purchased=is_purchase))
        for kind in (*KINDS, "anonymous")
        for language in LANGUAGES
        for title in ("", "A {curly} cup")
        for is_purchase in (False, True)
    }
    assert len(sentences) == len(LANGUAGES) * (4 * 3 + 2)
    assert all("{title}" not in text for _, _, text in sentences)

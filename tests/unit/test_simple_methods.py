"""Simple methods equal their definitions, written plainly."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from tests.support.histories import Interaction, make_shop
from training.data.config import ShopConfig
from training.evaluation import simple_methods
from training.evaluation.simple_methods import SimpleMethods, pages
from training.examples.queries import DAY

SETTINGS = ShopConfig(event_types={"purchase": 1.0, "view": 0.25, "impression": 0.0})
ITEMS = {f"i{n}": n for n in range(6)}
FIRST = 20_000


def methods(rows: list[tuple[int, int, int, str]]) -> SimpleMethods:
    """Rows are (user, item, day, type)."""
    interactions = [Interaction(f"u{u}", f"i{i}", kind, (FIRST + day) * DAY) for u, i, day, kind in rows]
    return SimpleMethods.of(make_shop([], interactions, SETTINGS).events, SETTINGS, ITEMS)


ROWS = st.lists(
    st.tuples(
        st.integers(0, 4), st.integers(0, 7), st.integers(0, 30), st.sampled_from(["purchase", "view"])
    ),
    min_size=1,
    max_size=40,
)


@given(ROWS)
def test_popularity_is_the_weight_of_all_engagements_with_items_of_the_shop(
    rows: list[tuple[int, int, int, str]],
) -> None:
    of = methods([*rows, (0, 1, 30, "impression")])
    last = 30
    ever, lately = np.zeros(6), np.zeros(6)
    for _, item, day, kind in rows:
        if item < len(ITEMS):  # others are not in the catalog
            ever[item] += SETTINGS.event_types[kind]
            lately[item] += SETTINGS.event_types[kind] * (day >= last - 7)
    np.testing.assert_allclose(of.popularity, ever)
    np.testing.assert_allclose(of.popularity_lately, lately + ever / max(ever.sum(), 1))


@given(ROWS)
def test_the_cosine_is_that_of_the_items_users(rows: list[tuple[int, int, int, str]]) -> None:
    of = methods(rows)
    dense = of.users.toarray()
    norms = np.maximum(np.linalg.norm(dense, axis=0), 1)
    cosine = (dense.T @ dense) / np.outer(norms, norms)
    np.fill_diagonal(cosine, 0)
    profiles = np.eye(6, dtype=np.float32)
    scores = of.scores(sparse.csr_matrix(profiles))["cosine"]
    np.testing.assert_allclose(scores, cosine, atol=1e-6)


def test_ease_is_ridge_regression_of_each_item_on_the_others() -> None:
    users = (np.random.default_rng(0).random((40, 6)) < 0.4).astype(np.float32)
    weights = simple_methods._ease_weights(sparse.csr_matrix(users), 10.0)
    for item in range(6):
        others = np.delete(np.arange(6), item)
        gram = users[:, others].T @ users[:, others] + 10.0 * np.eye(5)
        expected = np.linalg.solve(gram, users[:, others].T @ users[:, item])
        np.testing.assert_allclose(weights[others, item], expected, atol=1e-5)
        assert weights[item, item] == 0


def test_a_catalog_too_large_for_ease_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    of = methods([(user, item, 0, "purchase") for user in range(3) for item in range(4)])
    profiles = sparse.csr_matrix(np.eye(6, dtype=np.float32))
    assert "EASE" in of.scores(profiles)
    monkeypatch.setattr(simple_methods, "MAX_EASE_ITEMS", 3)
    assert "EASE" not in of.scores(profiles)
    assert "EASE" not in replace(of, users=sparse.csr_matrix((3, 6), dtype=np.float32)).scores(profiles)


def test_pages_hold_the_best_allowed_items_that_are_not_excluded() -> None:
    scores = np.array([[5.0, 4, 3, 2, 1, 0], [0.0, 0, 0, 0, 0, 1]])
    allowed = np.array([True, True, True, True, False, True])
    first, second = pages(scores, allowed, [np.array([0]), np.array([5, 1])], k=3)
    assert first.tolist() == [1, 2, 3]
    assert second.tolist() == [0, 2, 3]

"""The edges of the linear autoencoder equal one ridge regression for each item."""

import numpy as np
import pytest
from scipy import sparse

from training.retrieval.linear_autoencoder import LinearSettings, linear_weights, user_incidence

USERS, ITEMS = 60, 14


def incidence(seed: int = 0) -> sparse.csr_matrix:
    return sparse.csr_matrix((np.random.default_rng(seed).random((USERS, ITEMS)) < 0.25).astype(np.float32))


def unit_vectors(seed: int = 1) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((ITEMS, 5)).astype(np.float32)
    vectors[3] = 0
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9))


def regressions(rows: np.ndarray, penalty: float) -> np.ndarray:
    """Ridge regressions of each item on the others: weights (M, M), from row to column."""
    weights = np.zeros((rows.shape[1],) * 2)
    for item in range(rows.shape[1]):
        others = np.delete(np.arange(rows.shape[1]), item)
        features = rows[:, others]
        gram = features.T @ features + penalty * np.eye(len(others))
        weights[others, item] = np.linalg.solve(gram, features.T @ rows[:, item])
    return weights


@pytest.mark.parametrize("content", [0.0, 3.0])
def test_edges_are_the_positive_weights_of_one_regression_for_each_item(content: float) -> None:
    matrix, vectors = incidence(), unit_vectors()
    users = matrix.toarray().astype(np.float64)
    rows = np.concatenate([users, np.sqrt(content) * vectors.T.astype(np.float64)])
    expected = np.maximum(regressions(rows, 5.0), 0)
    edges = linear_weights(matrix, vectors, LinearSettings(5.0, content), 100).toarray()
    np.testing.assert_allclose(edges / edges.sum(), expected / expected.sum(), atol=1e-6)
    gram = users.T @ users
    cosine = gram / np.sqrt(np.outer(np.diag(gram), np.diag(gram)))
    together = (gram > 0) & ~np.eye(ITEMS, dtype=bool)
    assert edges[edges > 0].mean() == pytest.approx(cosine[together].mean(), rel=1e-4)


def test_only_the_items_with_the_most_users_have_edges() -> None:
    matrix = incidence()
    edges = linear_weights(matrix, None, LinearSettings(5.0), 6)
    degree = np.asarray(matrix.sum(0)).ravel()
    covered = set(np.argsort(-degree, kind="stable")[:6].tolist())
    assert {*edges.nonzero()[0].tolist(), *edges.nonzero()[1].tolist()} <= covered
    alone = linear_weights(matrix[:, sorted(covered)], None, LinearSettings(5.0), 6)
    np.testing.assert_allclose(edges.toarray()[np.ix_(sorted(covered), sorted(covered))], alone.toarray())


@pytest.mark.parametrize("count", [0, 1])
def test_without_two_items_there_are_no_edges(count: int) -> None:
    matrix = sparse.csr_matrix(np.ones((3, count), np.float32))
    edges = linear_weights(
        sparse.hstack([matrix, sparse.csr_matrix((3, 2))]).tocsr(), None, LinearSettings(1.0), 9
    )
    assert (edges.shape, edges.nnz) == ((count + 2, count + 2), 0)


def test_the_latest_items_of_a_user_count() -> None:
    users, items = np.array([7, 7, 9, 7, 7]), np.array([1, 2, 0, 1, 3])
    assert user_incidence(users, items, 4).toarray().tolist() == [[0, 1, 1, 1], [1, 0, 0, 0]]
    assert user_incidence(users, items, 4, limit=2).toarray().tolist() == [[0, 1, 0, 1], [1, 0, 0, 0]]
    assert user_incidence(users[:0], items[:0], 4).shape == (0, 4)

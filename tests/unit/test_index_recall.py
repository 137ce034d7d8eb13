"""The recall that an index measures equals the recall by brute force."""

import logging

import numpy as np
import pytest

from services.embedding.index import recall as recalls
from services.embedding.index import segment as segments
from services.embedding.index.exact_scan import nearest
from services.embedding.index.recall import RecallSample
from services.embedding.index.refine_depth import RefineDepth
from services.embedding.index.segment import Segment, build_faiss_index, build_pq_codes, flat_segment
from services.embedding.index.segmented_index import SegmentedIndex, sample_recall

D, N = 16, 5000


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    drawn = np.random.default_rng(3).standard_normal((N, D))
    unit: np.ndarray = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float16)
    return unit.astype(np.float32)


def lossy(vectors: np.ndarray) -> Segment:
    """A segment whose PQ codes are trusted far too much: only the requested number is reranked."""
    flat = build_faiss_index(vectors, "SQfp16")
    return Segment(np.arange(len(vectors)), flat, build_pq_codes(vectors), RefineDepth(1, 1.0))


def brute_recall(segment: Segment, vectors: np.ndarray, count: int) -> float:
    index = SegmentedIndex(D)
    index.replace_all(segment)
    exact = np.argsort(-(vectors @ vectors.T), axis=1)[:, :count]
    found = [hits.hashes for hits in index.search(vectors, count)]
    return float(np.mean([np.isin(e, f).mean() for e, f in zip(exact, found, strict=True)]))


@pytest.mark.parametrize("page", [100, 1 << 16])
def test_the_exact_scan_finds_the_nearest(
    vectors: np.ndarray, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.embedding.index.exact_scan._PAGE", page)
    scores, rows = nearest(vectors.__getitem__, N, vectors[:7], 50)
    products = vectors[:7] @ vectors.T
    np.testing.assert_allclose(scores, -np.sort(-products, axis=1)[:, :50], atol=1e-6)
    np.testing.assert_allclose(scores, np.take_along_axis(products, rows, 1), atol=1e-6)


def test_measured_recall_is_near_the_true_one(vectors: np.ndarray) -> None:
    measured = sample_recall(lossy(vectors), D)
    assert measured is not None
    true = brute_recall(lossy(vectors), vectors, 100)
    assert true < 0.95
    assert abs(measured - true) < 0.03


@pytest.mark.parametrize("count", [1, 3, 150])
def test_an_exact_index_of_any_size_has_recall_1(vectors: np.ndarray, count: int) -> None:
    some = np.concatenate([vectors[:count], vectors[:1]])  # with a duplicate
    assert sample_recall(flat_segment(np.arange(count + 1), some), D) == 1


def test_the_cost_of_the_measurement_is_bounded(monkeypatch: pytest.MonkeyPatch, vectors: np.ndarray) -> None:
    assert RecallSample.of(vectors.__getitem__, 0, D) is None
    monkeypatch.setattr(recalls, "_MAX_OPERATIONS", 2 * N * D * 60)
    sample = RecallSample.of(vectors.__getitem__, N, D)
    assert sample is not None
    assert len(sample.queries) == 60
    monkeypatch.setattr(recalls, "_MAX_OPERATIONS", 2 * N * D * 19)
    assert RecallSample.of(vectors.__getitem__, N, D) is None


def test_maintenance_measures_each_new_segment_once_and_reports_a_low_recall(
    vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index = SegmentedIndex(D, 1000, lambda hashes, rows: lossy(rows.astype(np.float32)))
    index.open()
    assert index.recall is None
    index.reconcile(np.empty(0, np.int64), np.arange(N), vectors, 1)
    monkeypatch.setattr("services.embedding.index.segmented_index.LOW_RECALL", 0.99)
    with caplog.at_level(logging.INFO):
        index.maintain(1)
        index.maintain(1)
    recall = index.recall
    assert recall is not None
    assert recall < 0.99
    assert [record.getMessage() for record in caplog.records if "finds only" in record.getMessage()] == [
        f"the index in memory finds only {recall:.3f} of the 100 nearest items"
    ]


def test_a_graph_that_is_searched_too_narrowly_has_a_low_recall(
    vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "_CODES_PER_NODE", 0)
    graph = Segment(np.arange(N), build_faiss_index(vectors, "HNSW4,SQfp16"))
    assert graph.is_approximate
    assert sample_recall(graph, D) == pytest.approx(brute_recall(graph, vectors, 100), abs=0.03)

"""Search with Vitrine's index, compared with the plain FAISS call, hnswlib and usearch, in one run.

    python -m bench.index --rows 10000,100000 [--storages fp16,fp32,sq8] [--churn 100000] [--json FILE]
    python -m bench.index --rows 100000 --vectors BUNDLE/catalog/text.npy --graphs --churn 0
    python -m bench.index --rows 1000000 --storages fp16,pq --alone --churn 0
    python -m bench.index --rows 10000000 --storages pq --alone --churn 0        # 20 GB of disk, an hour

Every size is searched as the services do, by codes or by a graph (`hnsw_min_items`), and with --graphs also
the other way. Vectors are random: 384 components from 32 factors around 2,000 centers, plus noise, because
text vectors vary in few directions as well. They are float16, in a file if there are many. Recall is of the
100 nearest, relative to brute force. With --vectors, items and queries are a sample of a file. All indexes
search one query at a time on one thread. The other graphs have the same links and construction width, and the
smallest search width that reaches Vitrine's recall.
"""

import argparse
import json
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from unittest.mock import patch

import faiss
import hnswlib
import numpy as np
from rich.console import Console
from rich.table import Table
from usearch.index import Index

from services.embedding.index import segment as segments
from services.embedding.index.builder import LARGE_ROWS, Builder
from services.embedding.index.id_map import IdMap
from services.embedding.index.segment import MappedSegment, Segment, flat_segment
from services.embedding.index.segmented_index import SegmentedIndex
from services.embedding.index.vector_index import PositionCache, Selection
from services.serving.settings import Settings

_DIMENSION = 384
_CENTRES = 2000
_FACTORS = 32
_SPREAD, _NOISE = 0.5, 0.02
_QUERIES = 200
_LIMIT = 100
_GRAPH_ROWS = int(Settings.model_fields["hnsw_min_items"].default)
_PAGE, _MAPPED = 100_000, 2_000_000
_WIDTHS = (100, 120, 150, 200, 250, 300, 400, 600, 800, 1200, 1600)
_SHARES = (0.5, 0.1, 0.01, 0.001)
_WRITE_BATCH, _WRITE_PAUSE = 200, 0.02
Search = Callable[[np.ndarray], np.ndarray]
"""The hits of one query, float32 (1, D)."""


def main() -> None:
    """Measure every size and print a table and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="10000,100000")
    parser.add_argument("--storages", default="fp16,fp32,sq8,pq")
    parser.add_argument(
        "--graphs", action="store_true", help="also the other kind of index than the services use"
    )
    parser.add_argument("--alone", action="store_true", help="without hnswlib and usearch")
    parser.add_argument("--vectors", type=Path, help="an .npy of unit vectors, instead of random ones")
    parser.add_argument(
        "--churn", type=int, default=100_000, help="the number of items, of which a fifth is replaced"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    results = []
    for rows in map(int, options.rows.split(",")):
        data = _random_vectors(rows) if options.vectors is None else _sampled(options.vectors, rows)
        results += _measured(*data, options.storages.split(","), alone=options.alone, graphs=options.graphs)
    _show(results)
    _show_growth(results)
    results += _churned(options.churn) if options.churn else []
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def _measured(
    vectors: np.ndarray, queries: np.ndarray, storages: list[str], *, alone: bool, graphs: bool
) -> list[dict[str, Any]]:
    count, dimension = vectors.shape
    exact = _brute(vectors, queries)
    hashes = np.random.default_rng(1).permutation(count).astype(np.int64)
    results = []
    with_graph_by_default = count >= _GRAPH_ROWS
    variants = [
        (storage, with_graph)
        for storage in storages
        for with_graph in (with_graph_by_default, not with_graph_by_default)
    ]
    graphs = graphs and count >= LARGE_ROWS
    for storage, with_graph in variants if graphs else variants[::2]:
        start = time.perf_counter()
        large = count >= LARGE_ROWS or storage == "pq"
        segment = (Builder(storage, int(with_graph)) if large else partial(flat_segment, storage=storage))(
            hashes, vectors
        )
        seconds = time.perf_counter() - start
        index = SegmentedIndex(dimension)
        index.replace_all(segment)
        row_of = np.argsort(hashes)

        def search_index(
            query: np.ndarray, index: SegmentedIndex = index, row_of: np.ndarray = row_of
        ) -> np.ndarray:
            rows: np.ndarray = row_of[index.search(query, _LIMIT)[0].hashes]
            return rows

        # Search a requested graph even if codes are cheaper.
        with patch.object(
            segments,
            "_CODES_PER_NODE",
            0 if with_graph != with_graph_by_default else segments._CODES_PER_NODE,
        ):
            # In turns, so that other load affects both.
            index_times, faiss_times = _timed([search_index, _bare(segment)], queries)
        # Not in turns: a full scan replaces the contents of the caches.
        [scan_times] = _timed([_every(segment)], queries)
        row: dict[str, Any] = {
            "rows": count,
            "what": f"vitrine {storage}, {_way(segment)}",
            "build_s": seconds,
            "bytes": _bytes(segment),
        }
        row |= _figures(index_times, exact)
        row["to_bare"] = index_times[0].mean() / faiss_times[0].mean()
        row["to_scan"] = index_times[0].mean() / scan_times[0].mean()
        results.append(row)
        results.append({"rows": count, "what": "the FAISS call alone"} | _figures(faiss_times, exact))
        results.append({"rows": count, "what": "FAISS' scan of every vector"} | _figures(scan_times, exact))
        if storage == storages[0]:
            results += _filtered(index, vectors, hashes, queries)
        if (
            storage == storages[0]
            and with_graph == with_graph_by_default
            and count >= LARGE_ROWS
            and not alone
        ):
            results += _others(vectors, queries, exact, row["recall"])
    return results


def _random_vectors(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors float16 (count, 384), and queries float32 (200, 384) of the same distribution."""
    random = np.random.default_rng(0)
    centers = random.standard_normal((_CENTRES, _FACTORS), np.float32)
    mixing = random.standard_normal((_FACTORS, _DIMENSION), np.float32) / np.float32(_FACTORS**0.5)
    with TemporaryFile() as file:
        shape = (count + _QUERIES, _DIMENSION)
        # A memory map of an unnamed file, because the vectors may exceed memory.
        rows = np.memmap(file, np.float16, shape=shape) if count > _MAPPED else np.empty(shape, np.float16)
    for start in range(0, len(rows), _PAGE):
        count_in_page = min(_PAGE, len(rows) - start)
        factors = centers[random.integers(0, _CENTRES, count_in_page)]
        factors += _SPREAD * random.standard_normal(factors.shape, np.float32)
        vectors = factors @ mixing + _NOISE * random.standard_normal((count_in_page, _DIMENSION), np.float32)
        rows[start : start + count_in_page] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return rows[:count], rows[count:].astype(np.float32)


def _sampled(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and queries sampled from a file."""
    vectors = np.load(path, mmap_mode="r")
    rows = np.random.default_rng(0).permutation(np.flatnonzero(vectors.any(axis=1)))[: count + _QUERIES]
    if len(rows) < count + _QUERIES:
        raise SystemExit(f"{path} has {len(rows)} vectors, {count + _QUERIES} are needed")
    return vectors[rows[_QUERIES:]].astype(np.float16), vectors[rows[:_QUERIES]].astype(np.float32)


def _brute(vectors: np.ndarray, queries: np.ndarray, limit: int = _LIMIT) -> np.ndarray:
    heap = faiss.ResultHeap(len(queries), limit, keep_max=True)
    for start in range(0, len(vectors), _PAGE):
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(np.ascontiguousarray(vectors[start : start + _PAGE], np.float32))
        scores, rows = index.search(queries, limit)
        heap.add_result(scores, np.where(rows < 0, rows, rows + start))
    heap.finalize()
    nearest: np.ndarray = heap.I
    return nearest


def _way(segment: Segment) -> str:
    return "graph" if segment.has_graph else "codes" if segment.large else "every vector"


def _bare(segment: Segment) -> Search:
    """The plain FAISS call of a search."""
    if segment.has_graph:
        wide = faiss.SearchParametersHNSW(efSearch=400)  # type: ignore[attr-defined]
        return lambda query: segment.index.search(query, _LIMIT, params=wide)[1][0]
    if not segment.large:
        return _every(segment)
    if isinstance(segment, MappedSegment):  # FAISS has only the codes
        deep = segment.depth.of(_LIMIT)
        return lambda query: segment.pq_codes.search(query, deep)[1][0]  # type: ignore[union-attr]
    refined = faiss.IndexRefine(segment.pq_codes, segment.index)
    deeper = faiss.IndexRefineSearchParameters(k_factor=segment.depth.of(_LIMIT) / _LIMIT)  # type: ignore[call-arg]
    return lambda query: refined.search(query, _LIMIT, params=deeper)[1][0]


def _every(segment: Segment) -> Search:
    """FAISS' scan of all rows: the vectors as stored, or their codes."""
    stored = faiss.downcast_index(segment.index.storage) if segment.has_graph else segment.index  # type: ignore[attr-defined]
    return lambda query: stored.search(query, _LIMIT)[1][0]


def _timed(searches: list[Search], queries: np.ndarray) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Seconds (Q,) and hits of each search, in turns after a warm-up.

    Each search finds rows in the caches that the previous one has read, so the order rotates.
    """
    for search in searches:
        for query in queries[:20]:
            search(query[None])
    seconds = np.zeros((len(searches), len(queries)))
    rows: list[list[np.ndarray]] = [[] for _ in searches]
    for index, query in enumerate(queries):
        for position in np.roll(np.arange(len(searches)), index):
            search = searches[position]
            start = time.perf_counter()
            rows[position].append(search(query[None]))
            seconds[position, index] = time.perf_counter() - start
    return list(zip(seconds, rows, strict=True))


def _figures(timed: tuple[np.ndarray, list[np.ndarray]], exact: np.ndarray) -> dict[str, float]:
    seconds, rows = timed
    recall = np.mean([np.isin(e, r).mean() for e, r in zip(exact, rows, strict=True)])
    p50, p99 = 1000 * np.percentile(seconds, (50, 99))
    return {"recall": float(recall), "p50_ms": float(p50), "p99_ms": float(p99)}


def _bytes(segment: Segment) -> float:
    """Bytes in memory per row, measured as the size of FAISS' file."""
    path = Path(f"/tmp/vitrine-bench-{os.getpid()}")  # noqa: S108 - its own name
    size = 0
    for index in {segment.index, segment.pq_codes or segment.index}:
        faiss.write_index(index, str(path))
        size += path.stat().st_size
        path.unlink()
    return size / len(segment)


def _filtered(
    index: SegmentedIndex, vectors: np.ndarray, hashes: np.ndarray, queries: np.ndarray
) -> list[dict[str, Any]]:
    """Recall and time if a share of the items qualifies, relative to brute force over these."""
    results, places = [], PositionCache()
    for share in _SHARES:
        mask = np.random.default_rng(2).random(len(hashes)) < share
        if not mask.any():
            continue
        exact = hashes[mask][_brute(vectors[mask], queries, min(_LIMIT, int(mask.sum())))]
        selection = Selection(hashes, mask, IdMap(hashes).rows, places)

        def search(query: np.ndarray, selection: Selection = selection) -> np.ndarray:
            return index.search(query, _LIMIT, selection)[0].hashes

        [timed] = _timed([search], queries)
        results.append(
            {"rows": len(hashes), "what": f"vitrine, {share:.1%} qualify"} | _figures(timed, exact)
        )
    return results


def _others(
    vectors: np.ndarray, queries: np.ndarray, exact: np.ndarray, recall: float
) -> list[dict[str, Any]]:
    start = time.perf_counter()
    hnsw = hnswlib.Index("ip", vectors.shape[1])
    hnsw.init_index(len(vectors), ef_construction=80, M=32)
    hnsw.add_items(vectors, num_threads=1)
    built = [("hnswlib", time.perf_counter() - start)]
    hnsw.set_num_threads(1)
    start = time.perf_counter()
    usearch: Any = Index(ndim=vectors.shape[1], metric="ip", dtype="f16", connectivity=32, expansion_add=80)
    usearch.add(np.arange(len(vectors)), vectors, threads=1)
    built.append(("usearch", time.perf_counter() - start))

    def search_usearch(query: np.ndarray) -> np.ndarray:
        keys: np.ndarray = usearch.search(query[0], _LIMIT, threads=1).keys.astype(np.int64)
        return keys

    def widen_usearch(width: int) -> None:
        usearch.expansion_search = width

    searches: list[tuple[Search, Callable[[int], None]]] = [
        (lambda query: hnsw.knn_query(query, _LIMIT)[0][0].astype(np.int64), hnsw.set_ef),
        (search_usearch, widen_usearch),
    ]
    results = []
    for (name, seconds), (search, widen) in zip(built, searches, strict=True):
        for width in _WIDTHS:
            widen(width)
            [timed] = _timed([search], queries)
            figures = _figures(timed, exact)
            if figures["recall"] >= recall:
                break
        results.append({"rows": len(vectors), "what": f"{name}, width {width}", "build_s": seconds} | figures)
    return results


def _churned(count: int) -> list[dict[str, Any]]:
    """Searches before, during and after replacing a fifth of the items, including compaction.

    A third of the replaced items is deleted and comes back under other ids.
    """
    vectors, queries = _random_vectors(count + count // 5)
    vectors, new_vectors = vectors[:count].copy(), vectors[count:]
    index = SegmentedIndex(_DIMENSION, LARGE_ROWS, Builder(graph_rows=_GRAPH_ROWS))
    ids = np.arange(count, dtype=np.int64)
    index.open()
    index.reconcile(np.empty(0, np.int64), ids, vectors, 0)
    index.maintain(0)
    phases = [_phase("before", index, ids, vectors, queries, lambda: False)]
    random, done = np.random.default_rng(4), threading.Event()
    places = random.permutation(count)[: len(new_vectors)]
    memory = [_resident()]

    def replace() -> None:
        for start in range(0, len(places), _WRITE_BATCH):
            part = places[start : start + _WRITE_BATCH]
            removed = ids[part[::3]].tolist()
            ids[part[::3]] += count
            vectors[part] = new_vectors[start : start + len(part)]
            index.change(dict(zip(ids[part].tolist(), vectors[part], strict=True)), removed)
            memory.append(_resident())
            time.sleep(_WRITE_PAUSE)
        index.maintain(0)
        memory.append(_resident())
        done.set()

    writing = threading.Thread(target=replace)
    writing.start()
    phases.append(_phase("during", index, ids, vectors, queries, lambda: not done.is_set()))
    writing.join()
    phases.append(_phase("after", index, ids, vectors, queries, lambda: False))
    growth = (max(memory) - memory[0]) / (count * _DIMENSION * 2)
    table = Table(title=f"a fifth of {count} items replaced, {_WRITE_BATCH} at a time")
    columns = ("when", "searches", "recall", "p50_ms", "p99_ms")
    for column in columns:
        table.add_column(column, justify="left" if column == "when" else "right")
    for row in phases:
        table.add_row(*(_text(row.get(column)) for column in columns))
    Console().print(table)
    Console().print(
        f"memory grows by at most {growth:.2f} times the size of the vectors, apart from building codes"
    )
    return [{"rows": count, "what": "churn", "grown": growth, "phases": phases}]


def _phase(
    phase: str,
    index: SegmentedIndex,
    ids: np.ndarray,
    vectors: np.ndarray,
    queries: np.ndarray,
    is_running: Callable[[], bool],
) -> dict[str, Any]:
    """Search each query at least once, and again as long as `is_running`; recall only if nothing changes."""
    is_static, seconds = not is_running(), list[float]()
    hits = []
    while True:
        for query in queries:
            start = time.perf_counter()
            hits.append(index.search(query[None], _LIMIT)[0].hashes)
            seconds.append(time.perf_counter() - start)
        if not is_running():
            break
    figures: dict[str, Any] = {"when": phase, "searches": len(seconds)}
    if is_static:
        exact = ids[_brute(vectors, queries)]
        figures["recall"] = float(np.mean([np.isin(e, f).mean() for e, f in zip(exact, hits, strict=True)]))
    p50, p99 = 1000 * np.percentile(seconds, (50, 99))
    return figures | {"p50_ms": float(p50), "p99_ms": float(p99)}


def _resident() -> int:
    """Bytes of this process in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _show(results: list[dict[str, Any]]) -> None:
    columns = ("rows", "what", "recall", "p50_ms", "p99_ms", "to_bare", "to_scan", "build_s", "bytes")
    table = Table(title="100 nearest of 384 components, one query at a time")
    for column in columns:
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in results:
        table.add_row(*(_text(row.get(column)) for column in columns))
    Console(width=130).print(table)


def _text(value: object) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _show_growth(results: list[dict[str, Any]]) -> None:
    """The exponent of the time of a search, from the smallest size to the largest."""
    rows = [row for row in results if row["what"].startswith("vitrine fp16, ")]
    if len({row["rows"] for row in rows}) > 1:
        (first, last) = rows[0], rows[-1]
        exponent = np.log(last["p50_ms"] / first["p50_ms"]) / np.log(last["rows"] / first["rows"])
        Console().print(f"a search grows as rows^{exponent:.2f} from {first['rows']} to {last['rows']}")


if __name__ == "__main__":
    main()

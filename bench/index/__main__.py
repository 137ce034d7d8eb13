"""Search by Vitrine's index against the bare FAISS call, hnswlib and usearch, in one run.

    python -m bench.index --rows 10000,100000 [--storages fp16,fp32,sq8] [--churn 100000] [--json FILE]
    python -m bench.index --rows 100000 --vectors BUNDLE/catalogue/text.npy --graphs --churn 0
    python -m bench.index --rows 1000000 --storages fp16,pq --alone --churn 0
    python -m bench.index --rows 10000000 --storages pq --alone --churn 0        # 20 GB of disk, an hour

Every size is searched as it is served, by codes or by a graph (`graph_rows`), and with --graphs by the other
way too. Vectors are drawn: 384 components made of 32 factors around 2,000 centres, and noise, for vectors of
texts too vary in few directions, and kept as float16, in a file where they are many. Recall is of the 100
nearest, against brute force. With --vectors they are some of a file's, others of which ask. Everything
searches one query at a time on one thread; the others' graphs have the same links and building width, and
the least search width that reaches Vitrine's recall.
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

from services.embedding import segments
from services.embedding.builder import LARGE_ROWS, Builder
from services.embedding.index import Places, Selection
from services.embedding.numbered import Numbered
from services.embedding.segmented import SegmentedIndex
from services.embedding.segments import MappedSegment, Segment, scanned
from services.settings import Settings

_DIMENSION = 384
_CENTRES = 2000
_FACTORS = 32
_SPREAD, _NOISE = 0.5, 0.02
_QUERIES = 200
_LIMIT = 100
_GRAPH_ROWS = int(Settings.model_fields["graph_rows"].default)
_PAGE, _MAPPED = 100_000, 2_000_000
_WIDTHS = (100, 120, 150, 200, 250, 300, 400, 600, 800, 1200, 1600)
_SHARES = (0.5, 0.1, 0.01, 0.001)
_WRITTEN, _BETWEEN_WRITES = 200, 0.02
Search = Callable[[np.ndarray], np.ndarray]
"""The rows found for one query, float32 (1, D)."""


def main() -> None:
    """Measure every size and print a table and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="10000,100000")
    parser.add_argument("--storages", default="fp16,fp32,sq8,pq")
    parser.add_argument(
        "--graphs", action="store_true", help="graphs where codes are served, and the reverse"
    )
    parser.add_argument("--alone", action="store_true", help="without hnswlib and usearch")
    parser.add_argument("--vectors", type=Path, help="an .npy of unit vectors to take in place of drawn ones")
    parser.add_argument("--churn", type=int, default=100_000, help="items, of which a fifth is replaced")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    found = []
    for rows in map(int, options.rows.split(",")):
        given = _drawn(rows) if options.vectors is None else _sampled(options.vectors, rows)
        found += _measured(*given, options.storages.split(","), alone=options.alone, graphs=options.graphs)
    _show(found)
    _show_growth(found)
    found += _churned(options.churn) if options.churn else []
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def _measured(
    vectors: np.ndarray, queries: np.ndarray, storages: list[str], *, alone: bool, graphs: bool
) -> list[dict[str, Any]]:
    count, dimension = vectors.shape
    exact = _brute(vectors, queries)
    numbers = np.random.default_rng(1).permutation(count).astype(np.int64)
    found = []
    served = count >= _GRAPH_ROWS
    ways = [(storage, with_graph) for storage in storages for with_graph in (served, not served)]
    graphs = graphs and count >= LARGE_ROWS
    for storage, with_graph in ways if graphs else ways[::2]:
        began = time.perf_counter()
        large = count >= LARGE_ROWS or storage == "pq"
        segment = (Builder(storage, int(with_graph)) if large else partial(scanned, storage=storage))(
            numbers, vectors
        )
        seconds = time.perf_counter() - began
        index = SegmentedIndex(dimension)
        index.replace_all(segment)
        row_of = np.argsort(numbers)

        def ours(query: np.ndarray, index: SegmentedIndex = index, row_of: np.ndarray = row_of) -> np.ndarray:
            rows: np.ndarray = row_of[index.search(query, _LIMIT)[0].numbers]
            return rows

        # A graph that is asked for is walked, though codes may be cheaper.
        with patch.object(
            segments, "_CODES_PER_NODE", 0 if with_graph != served else segments._CODES_PER_NODE
        ):
            # In turns, so that what else the machine does falls on both.
            mine, faiss_alone = _timed([ours, _bare(segment)], queries)
        # Not in turns: it brings every vector into the caches, and takes what others had there.
        [every] = _timed([_every(segment)], queries)
        row: dict[str, Any] = {
            "rows": count,
            "what": f"vitrine {storage}, {_way(segment)}",
            "build_s": seconds,
            "bytes": _bytes(segment),
        }
        row |= _figures(mine, exact)
        row["to_bare"] = mine[0].mean() / faiss_alone[0].mean()
        row["to_scan"] = mine[0].mean() / every[0].mean()
        found.append(row)
        found.append({"rows": count, "what": "the FAISS call alone"} | _figures(faiss_alone, exact))
        found.append({"rows": count, "what": "FAISS' scan of every vector"} | _figures(every, exact))
        if storage == storages[0]:
            found += _filtered(index, vectors, numbers, queries)
        if storage == storages[0] and with_graph == served and count >= LARGE_ROWS and not alone:
            found += _others(vectors, queries, exact, row["recall"])
    return found


def _drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors float16 (count, 384), and queries float32 (200, 384) like them."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((_CENTRES, _FACTORS), np.float32)
    mixing = random.standard_normal((_FACTORS, _DIMENSION), np.float32) / np.float32(_FACTORS**0.5)
    with TemporaryFile() as file:
        shape = (count + _QUERIES, _DIMENSION)
        # Mapped, so that memory need not hold them; they stay when the file has no name.
        rows = np.memmap(file, np.float16, shape=shape) if count > _MAPPED else np.empty(shape, np.float16)
    for start in range(0, len(rows), _PAGE):
        some = min(_PAGE, len(rows) - start)
        factors = centres[random.integers(0, _CENTRES, some)]
        factors += _SPREAD * random.standard_normal(factors.shape, np.float32)
        drawn = factors @ mixing + _NOISE * random.standard_normal((some, _DIMENSION), np.float32)
        rows[start : start + some] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return rows[:count], rows[count:].astype(np.float32)


def _sampled(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The same of a file's vectors."""
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
    found: np.ndarray = heap.I
    return found


def _way(segment: Segment) -> str:
    return "graph" if segment.has_graph else "codes" if segment.large else "every vector"


def _bare(segment: Segment) -> Search:
    """The FAISS call that a search comes down to, and nothing around it."""
    if segment.has_graph:
        wide = faiss.SearchParametersHNSW(efSearch=400)  # type: ignore[attr-defined]
        return lambda query: segment.index.search(query, _LIMIT, params=wide)[1][0]
    if not segment.large:
        return _every(segment)
    if isinstance(segment, MappedSegment):  # FAISS has the codes alone
        deep = segment.depth.of(_LIMIT)
        return lambda query: segment.codes.search(query, deep)[1][0]  # type: ignore[union-attr]
    refined = faiss.IndexRefine(segment.codes, segment.index)
    deeper = faiss.IndexRefineSearchParameters(k_factor=segment.depth.of(_LIMIT) / _LIMIT)  # type: ignore[call-arg]
    return lambda query: refined.search(query, _LIMIT, params=deeper)[1][0]


def _every(segment: Segment) -> Search:
    """FAISS' scan of all that it has: the vectors as they are stored, or codes for them."""
    stored = faiss.downcast_index(segment.index.storage) if segment.has_graph else segment.index  # type: ignore[attr-defined]
    return lambda query: stored.search(query, _LIMIT)[1][0]


def _timed(searches: list[Search], queries: np.ndarray) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Seconds (Q,) and rows found of each search, asked in turns after a warm-up.

    Each of them walks through rows that the one before has brought into the caches, so none is always last.
    """
    for search in searches:
        for query in queries[:20]:
            search(query[None])
    seconds = np.zeros((len(searches), len(queries)))
    rows: list[list[np.ndarray]] = [[] for _ in searches]
    for at, query in enumerate(queries):
        for which in np.roll(np.arange(len(searches)), at):
            search = searches[which]
            began = time.perf_counter()
            rows[which].append(search(query[None]))
            seconds[which, at] = time.perf_counter() - began
    return list(zip(seconds, rows, strict=True))


def _figures(timed: tuple[np.ndarray, list[np.ndarray]], exact: np.ndarray) -> dict[str, float]:
    seconds, rows = timed
    recall = np.mean([np.isin(e, r).mean() for e, r in zip(exact, rows, strict=True)])
    p50, p99 = 1000 * np.percentile(seconds, (50, 99))
    return {"recall": float(recall), "p50_ms": float(p50), "p99_ms": float(p99)}


def _bytes(segment: Segment) -> float:
    """Of what is in memory, per row, as FAISS writes it: within a few bytes of what it holds."""
    path = Path(f"/tmp/vitrine-bench-{os.getpid()}")  # noqa: S108 - its own name
    size = 0
    for index in {segment.index, segment.codes or segment.index}:
        faiss.write_index(index, str(path))
        size += path.stat().st_size
        path.unlink()
    return size / len(segment)


def _filtered(
    index: SegmentedIndex, vectors: np.ndarray, numbers: np.ndarray, queries: np.ndarray
) -> list[dict[str, Any]]:
    """Recall and time where a share of the items qualifies, against brute force over those."""
    found, places = [], Places()
    for share in _SHARES:
        mask = np.random.default_rng(2).random(len(numbers)) < share
        if not mask.any():
            continue
        exact = numbers[mask][_brute(vectors[mask], queries, min(_LIMIT, int(mask.sum())))]
        selection = Selection(numbers, mask, Numbered(numbers).rows, places)

        def search(query: np.ndarray, selection: Selection = selection) -> np.ndarray:
            return index.search(query, _LIMIT, selection)[0].numbers

        [timed] = _timed([search], queries)
        found.append({"rows": len(numbers), "what": f"vitrine, {share:.1%} qualify"} | _figures(timed, exact))
    return found


def _others(
    vectors: np.ndarray, queries: np.ndarray, exact: np.ndarray, recall: float
) -> list[dict[str, Any]]:
    began = time.perf_counter()
    theirs = hnswlib.Index("ip", vectors.shape[1])
    theirs.init_index(len(vectors), ef_construction=80, M=32)
    theirs.add_items(vectors, num_threads=1)
    built = [("hnswlib", time.perf_counter() - began)]
    theirs.set_num_threads(1)
    began = time.perf_counter()
    usearch: Any = Index(ndim=vectors.shape[1], metric="ip", dtype="f16", connectivity=32, expansion_add=80)
    usearch.add(np.arange(len(vectors)), vectors, threads=1)
    built.append(("usearch", time.perf_counter() - began))

    def search_usearch(query: np.ndarray) -> np.ndarray:
        keys: np.ndarray = usearch.search(query[0], _LIMIT, threads=1).keys.astype(np.int64)
        return keys

    def widen_usearch(width: int) -> None:
        usearch.expansion_search = width

    searches: list[tuple[Search, Callable[[int], None]]] = [
        (lambda query: theirs.knn_query(query, _LIMIT)[0][0].astype(np.int64), theirs.set_ef),
        (search_usearch, widen_usearch),
    ]
    found = []
    for (name, seconds), (search, widen) in zip(built, searches, strict=True):
        for width in _WIDTHS:
            widen(width)
            [timed] = _timed([search], queries)
            figures = _figures(timed, exact)
            if figures["recall"] >= recall:
                break
        found.append({"rows": len(vectors), "what": f"{name}, width {width}", "build_s": seconds} | figures)
    return found


def _churned(count: int) -> list[dict[str, Any]]:
    """Searches while a fifth of the items is replaced and compaction goes on: before, meanwhile, and after.

    A third of what is replaced is deleted and comes back under other numbers.
    """
    vectors, queries = _drawn(count + count // 5)
    vectors, coming = vectors[:count].copy(), vectors[count:]
    index = SegmentedIndex(_DIMENSION, LARGE_ROWS, Builder(graph_rows=_GRAPH_ROWS))
    numbers = np.arange(count, dtype=np.int64)
    index.open()
    index.hold(np.empty(0, np.int64), numbers, vectors, 0)
    index.tidy(0)
    told = [_phase("before", index, numbers, vectors, queries, lambda: False)]
    random, done = np.random.default_rng(4), threading.Event()
    places = random.permutation(count)[: len(coming)]
    memory = [_resident()]

    def replace() -> None:
        for start in range(0, len(places), _WRITTEN):
            some = places[start : start + _WRITTEN]
            gone = numbers[some[::3]].tolist()
            numbers[some[::3]] += count
            vectors[some] = coming[start : start + len(some)]
            index.change(dict(zip(numbers[some].tolist(), vectors[some], strict=True)), gone)
            memory.append(_resident())
            time.sleep(_BETWEEN_WRITES)
        index.tidy(0)
        memory.append(_resident())
        done.set()

    writing = threading.Thread(target=replace)
    writing.start()
    told.append(_phase("meanwhile", index, numbers, vectors, queries, lambda: not done.is_set()))
    writing.join()
    told.append(_phase("after", index, numbers, vectors, queries, lambda: False))
    grown = (max(memory) - memory[0]) / (count * _DIMENSION * 2)
    table = Table(title=f"a fifth of {count} items replaced, {_WRITTEN} at a time")
    columns = ("when", "searches", "recall", "p50_ms", "p99_ms")
    for column in columns:
        table.add_column(column, justify="left" if column == "when" else "right")
    for row in told:
        table.add_row(*(_text(row.get(column)) for column in columns))
    Console().print(table)
    Console().print(
        f"at most {grown:.2f} times the vectors' size more memory meanwhile, that of making codes apart"
    )
    return [{"rows": count, "what": "churn", "grown": grown, "phases": told}]


def _phase(
    when: str,
    index: SegmentedIndex,
    numbers: np.ndarray,
    vectors: np.ndarray,
    queries: np.ndarray,
    goes_on: Callable[[], bool],
) -> dict[str, Any]:
    """Each query once and on while it goes on; recall is told of what stands still."""
    still, seconds = not goes_on(), list[float]()
    found = []
    while True:
        for query in queries:
            began = time.perf_counter()
            found.append(index.search(query[None], _LIMIT)[0].numbers)
            seconds.append(time.perf_counter() - began)
        if not goes_on():
            break
    told: dict[str, Any] = {"when": when, "searches": len(seconds)}
    if still:
        exact = numbers[_brute(vectors, queries)]
        told["recall"] = float(np.mean([np.isin(e, f).mean() for e, f in zip(exact, found, strict=True)]))
    p50, p99 = 1000 * np.percentile(seconds, (50, 99))
    return told | {"p50_ms": float(p50), "p99_ms": float(p99)}


def _resident() -> int:
    """Bytes of this process in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _show(found: list[dict[str, Any]]) -> None:
    columns = ("rows", "what", "recall", "p50_ms", "p99_ms", "to_bare", "to_scan", "build_s", "bytes")
    table = Table(title="100 nearest of 384 components, one query at a time")
    for column in columns:
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in found:
        table.add_row(*(_text(row.get(column)) for column in columns))
    Console(width=130).print(table)


def _text(value: object) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _show_growth(found: list[dict[str, Any]]) -> None:
    """The exponent of the time of a search, from the smallest size to the largest."""
    mine = [row for row in found if row["what"].startswith("vitrine fp16, ")]
    if len({row["rows"] for row in mine}) > 1:
        (first, last) = mine[0], mine[-1]
        exponent = np.log(last["p50_ms"] / first["p50_ms"]) / np.log(last["rows"] / first["rows"])
        Console().print(f"a search grows as rows^{exponent:.2f} from {first['rows']} to {last['rows']}")


if __name__ == "__main__":
    main()

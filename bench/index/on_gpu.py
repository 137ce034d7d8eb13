"""Queries per second at a recall of 0.95: FAISS on the GPU, torch's scan there, and FAISS on the CPU.

`bench.gpu` runs it. The CPU searches the CPU form of the indexes that the GPU built, on all cores. "Bare" is
the FAISS call alone; "as served" adds what a segment does around it: the exact scores of the candidates, and
a second search where too few were found. Without a GPU the same code runs on the CPU form everywhere.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from services.embedding.index.device_segment import DeviceBuilder, DeviceSegment
from services.embedding.index.gpu_flat import GpuBuilder, GpuSegment
from services.embedding.index.placement import GpuPlacement, HostPlacement
from services.embedding.index.segment import Segment, SegmentHits

DIMENSION, LIMIT, QUERIES = 384, 100, 4096
_RECALL, _JUDGED = 0.95, 128
_BATCHES = (1, 64, 1024)
_SHARES = (0.5, 0.01)
_WIDTHS = (128, 192, 256, 384, 512)
_MIN_SECONDS, _MIN_CALLS = 0.3, 3
_GROWTH = 1.5  # a row of a larger index takes longer to build
Rows = list[dict[str, Any]]
Search = Callable[[np.ndarray], np.ndarray]
"""The rows of the hits, int64 (Q, K), of queries, float32 (Q, D)."""


@dataclass(frozen=True)
class Deadline:
    """The end of the run, as of `time.monotonic`: no step starts later."""

    end: float

    def passed(self, seconds: float = 0.0) -> bool:
        """Whether the time is up, or will be in a number of seconds."""
        return time.monotonic() + seconds > self.end


def random_vectors(device: str, count: int) -> tuple[torch.Tensor, np.ndarray]:
    """Vectors float16 (count, D) on the device and 4,096 queries float32 on the host, as in bench.index."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, device=device, generator=generator)
    centers, mixing = draw(2000, 32), draw(32, DIMENSION) / 32**0.5
    rows = torch.empty(count + QUERIES, DIMENSION, dtype=torch.float16, device=device)
    for start in range(0, len(rows), 100_000):
        part = rows[start : start + 100_000]
        center = torch.randint(len(centers), (len(part),), device=device, generator=generator)
        factors = centers[center] + 0.5 * draw(len(part), 32)
        vectors = factors @ mixing + 0.02 * draw(len(part), DIMENSION)
        part.copy_(torch.nn.functional.normalize(vectors, dim=1))
    return rows[QUERIES:], rows[:QUERIES].float().cpu().numpy()


def exact_nearest(vectors: torch.Tensor, queries: np.ndarray, live: np.ndarray | None) -> np.ndarray:
    """The nearest rows (Q, K) by float32 products, page by page."""
    device_queries, best = torch.from_numpy(queries).to(vectors.device), None
    for start in range(0, len(vectors), 1 << 20):
        scores = device_queries @ vectors[start : start + (1 << 20)].float().T
        if live is not None:
            dead = torch.from_numpy(~live[start : start + (1 << 20)]).to(scores.device)
            scores.masked_fill_(dead, -torch.inf)
        page = scores.topk(min(LIMIT, scores.shape[1]))
        hits = page.values, page.indices + start
        if best is not None:
            hits = torch.cat([best[0], hits[0]], 1), torch.cat([best[1], hits[1]], 1)
        best = hits
    assert best is not None  # noqa: S101 - there are vectors
    count = LIMIT if live is None else min(LIMIT, int(live.sum()))
    order = best[0].topk(min(count, best[0].shape[1])).indices
    nearest: np.ndarray = best[1].gather(1, order).cpu().numpy()
    return nearest


def recall_of(exact: np.ndarray, hits: np.ndarray) -> float:
    """The mean share of the exact rows (Q, K) among the hits (Q, K)."""
    return float(np.mean([np.isin(e, f).mean() for e, f in zip(exact, hits, strict=True)]))


def compare(device: str, sizes: Sequence[int], deadline: Deadline) -> Iterator[dict[str, Any]]:
    """Rows of the table for each size: the slowest builds of the largest size come last.

    A build that is expected to end after the deadline, by the one before, is left out.
    """
    builds: dict[str, float] = {}  # seconds per row
    for count in sizes:
        vectors, queries = random_vectors(device, count)
        judged, random = queries[:_JUDGED], np.random.default_rng(1)
        lives = {share: random.random(count) < share for share in _SHARES}
        filtered = {share: (live, exact_nearest(vectors, judged, live)) for share, live in lives.items()}
        exact = exact_nearest(vectors, judged, None)
        bench = _Bench(count, vectors.cpu().numpy(), queries, exact, filtered, deadline)
        del vectors
        for measure in (bench.torch_scan, bench.flat, bench.pq, bench.graph):
            name = measure.__name__
            if device != "cpu":
                torch.cuda.empty_cache()  # FAISS cannot use what torch keeps
            expected = _GROWTH * builds.get(name, 0.0) * count
            if deadline.passed(expected):
                yield {
                    "rows": count,
                    "what": f"no time was left for {name}, a build of about {expected:.0f} s",
                }
                continue
            try:
                for row in measure(device):
                    builds[name] = max(row.get("build_s", 0.0) / count, builds.get(name, 0.0))
                    yield row
            except RuntimeError as error:  # one failing index does not end the run
                yield {"rows": count, "what": f"{name}: {str(error).splitlines()[0][-90:]}"}


@dataclass(frozen=True)
class _Bench:
    count: int
    vectors: np.ndarray
    queries: np.ndarray
    exact: np.ndarray
    filtered: dict[float, tuple[np.ndarray, np.ndarray]]
    deadline: Deadline

    def torch_scan(self, device: str) -> Iterator[dict[str, Any]]:
        segment, seconds = self._built(GpuBuilder(device))
        yield self._row(f"torch scan on {device}", partial(_served, segment), seconds)
        yield from self._filtered(f"torch scan on {device}", segment)

    def flat(self, device: str) -> Iterator[dict[str, Any]]:
        segment, seconds = self._built(self._builder(device, graph_rows=0))
        flat = segment.flat
        name = f"faiss-gpu flat{_where(device)}"
        yield self._row(f"{name}, bare", lambda some: flat.search(some, LIMIT)[1], seconds)
        yield self._row(f"{name}, as served", partial(_served, segment), seconds)
        yield from self._filtered(name, segment)
        cpu = Segment(segment.hashes, segment.index)
        yield self._row("faiss-cpu scan, float16", partial(_served, cpu), 0.0, batches=(1, 64))

    def pq(self, device: str) -> Iterator[dict[str, Any]]:
        segment, seconds = self._built(self._builder(device, pq=True))
        if segment.host_codes is None:
            return
        name = f"faiss-gpu IVF-PQ{_where(device)}"
        lists = segment.host_codes.nlist
        # Fewer lists have too few rows, and the answer would come from the exact scan behind them.
        least = 4 * LIMIT * lists / self.count
        probes = [1 << power for power in range(12) if least <= 1 << power <= lists]
        choices = [(f"{number} lists", replace(segment, probes=number)) for number in probes]
        yield from self._best(f"{name}, as served", choices, seconds)
        yield self._row(f"{name}, calibrated: {segment.probes} lists", partial(_served, segment), seconds)
        yield from self._filtered(name, segment)
        on_cpu = [
            (label, replace(choice, placement=HostPlacement(), codes=segment.host_codes))
            for label, choice in choices
        ]
        yield from self._best("faiss-cpu IVF-PQ, as served", on_cpu, 0.0, batches=(1, 64))

    def graph(self, device: str) -> Iterator[dict[str, Any]]:
        segment, seconds = self._built(self._builder(device, graph_rows=1))
        graph, name = segment.graph, f"faiss-gpu CAGRA{_where(device)}"
        if graph is None:
            return
        for place, index, what in (
            (segment.placement, graph, f"{name}, bare"),
            (HostPlacement(), segment.index, "faiss-cpu, CAGRA as HNSW, bare"),
        ):
            for width in _WIDTHS:

                def search(
                    some: np.ndarray, width: int = width, place: Any = place, index: Any = index
                ) -> Any:
                    return place.search_graph(index, some, LIMIT, width, None)

                if self._recall(search) >= _RECALL or width == _WIDTHS[-1]:
                    yield self._row(f"{what}, {width} kept", search, seconds)
                    break
        yield self._row(f"{name}, as served", partial(_served, segment), seconds)
        yield from self._filtered(name, segment)

    def _builder(self, device: str, **options: Any) -> DeviceBuilder:
        ordinal = torch.device(device).index or 0
        place = HostPlacement if device == "cpu" else partial(GpuPlacement, ordinal)
        return DeviceBuilder(place, **options)

    def _built(self, builder: Callable[[np.ndarray, np.ndarray], Any]) -> tuple[Any, float]:
        start = time.perf_counter()
        segment = builder(np.arange(self.count, dtype=np.int64), self.vectors)
        return segment, time.perf_counter() - start

    def _best(
        self,
        what: str,
        choices: Sequence[tuple[str, DeviceSegment]],
        build_seconds: float,
        batches: Sequence[int] = _BATCHES,
    ) -> Iterator[dict[str, Any]]:
        """The first choice that reaches the recall, or the last."""
        for label, segment in choices:
            search = partial(_served, segment)
            is_last = segment is choices[-1][1] or self.deadline.passed()
            if is_last or self._recall(search) >= _RECALL:
                yield self._row(f"{what}, {label}", search, build_seconds, batches)
                return

    def _recall(self, search: Search) -> float:
        return recall_of(self.exact, search(self.queries[:_JUDGED]))

    def _row(
        self, what: str, search: Search, build_seconds: float, batches: Sequence[int] = _BATCHES
    ) -> dict[str, Any]:
        rates: dict[str, Any] = {}
        for batch in batches:
            rates[f"qps, {batch} at once"] = self._rate(search, batch) if not self.deadline.passed() else ""
        return {
            "rows": self.count,
            "what": what,
            "recall": self._recall(search),
            **rates,
            "build_s": build_seconds,
        }

    def _rate(self, search: Search, batch: int) -> float:
        """Queries per second of one caller, over different queries."""
        starts = range(0, QUERIES - batch + 1, batch)
        search(self.queries[:batch])
        calls, begin = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < _MIN_SECONDS or calls < _MIN_CALLS:
            start = starts[calls % len(starts)]
            search(self.queries[start : start + batch])
            calls += 1
        return calls * batch / elapsed

    def _filtered(self, what: str, segment: DeviceSegment | GpuSegment) -> Iterator[dict[str, Any]]:
        for share, (live, exact) in self.filtered.items():
            if self.deadline.passed():
                return
            search = partial(_served, segment, live=live)
            rows = search(self.queries[:_JUDGED])
            yield {
                "rows": self.count,
                "what": f"{what}, {share:.0%} qualify",
                "recall": recall_of(exact, rows),
                "qps, 1 at once": self._rate(search, 1),
                "obeyed": str(bool(live[rows].all())),
            }


def _served(segment: Any, queries: np.ndarray, live: np.ndarray | None = None) -> np.ndarray:
    hits: SegmentHits = segment.search(queries, LIMIT, live)
    return hits.rows


def _where(device: str) -> str:
    return " (CPU form)" if device == "cpu" else ""

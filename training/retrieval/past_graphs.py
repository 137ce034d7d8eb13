"""The item graphs of a run: one per part of the ranking window, on earlier events, and one on all events."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from services.ranking.models.co_occurrence import ItemGraph
from training.core.progress import track
from training.data.config import ShopConfig
from training.data.events import Events
from training.examples.queries import DAY, baskets
from training.examples.windows import Windows
from training.retrieval.graph_tuning import tune_graph
from training.retrieval.item_graph import content_relation, fit_item_graph

TUNED, FINAL = "tuned.json", "final"


def write_graphs(
    directory: Path,
    events: Events,
    settings: ShopConfig,
    hashes: np.ndarray,
    vectors: Mapping[str, np.ndarray],
    present: Mapping[str, np.ndarray],
    windows: Windows,
) -> None:
    """Tune the edge weighting on the events before the ranking window, fit the graphs and write them.

    `hashes` int64 (M,) are the item hashes, in the order of `vectors` and `present`. The graph of a part of
    the window is in the directory named by its first day since 1970.
    """
    is_engagement = engagements(events, settings)
    nodes = nodes_of(events, hashes)
    groups = baskets(events)
    tuned_graphs = tune_graph(events, settings, nodes, windows.tuned_from, windows.since)
    report = {relation: result.to_dict() for relation, result in tuned_graphs.items()}
    (directory / TUNED).write_text(json.dumps(report, indent=1) + "\n")
    weightings = {relation: result.weighting for relation, result in tuned_graphs.items()}
    content = {
        space: content_relation(values, present[space], hashes, nodes, events.number[is_engagement])
        for space, values in vectors.items()
    }
    days = (windows.parts // DAY).tolist() if len(events) else []
    for name in track([*days, FINAL], "item graphs"):
        selected = is_engagement if name == FINAL else is_engagement & (events.time < name * DAY)
        graph = fit_item_graph(
            events.user[selected].astype(np.int64),
            groups[selected],
            events.time[selected],
            events.number[selected],
            weightings,
            settings.graph.neighbors,
            nodes,
        )
        ItemGraph(graph.item_hashes, {**graph.relations, **content}).save(directory / str(name))


class PastGraphs(Mapping[int, ItemGraph]):
    """The graphs of a directory by the first day, since 1970, for which each holds; read when asked for."""

    def __init__(self, directory: Path) -> None:
        self._paths = {int(path.name): path for path in directory.iterdir() if path.name.isdigit()}

    def __getitem__(self, day: int) -> ItemGraph:
        return ItemGraph.load(self._paths[day])

    def __iter__(self) -> Iterator[int]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def engagements(events: Events, settings: ShopConfig) -> np.ndarray:
    """Which events have a positive weight, bool (N,)."""
    weights = np.array(list(settings.event_types.values()))
    return np.asarray(weights[events.kind] > 0)


def nodes_of(events: Events, hashes: np.ndarray) -> np.ndarray:
    """The hashes of all items, including those of events, int64, rising."""
    return np.unique(np.concatenate([hashes, events.number]))

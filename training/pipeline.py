"""`vitrine train`: a shop directory in, a published bundle out, stage by stage.

The last days of the events are the ranking days: what is learned from behaviour before them makes
the rows that CTR head and reranker learn from, so that no row knows its own basket. What
is published is then fitted once more on everything.
"""

import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services import catalog, interests, item_table
from services.bundle import REPORT, Catalogue, Profile, created, publish, write_catalogue
from services.catalog import Item, item_number
from services.embedding import index
from services.item_table import ItemTable
from services.ranking import (
    basis,
    blend,
    features,
    graph,
    likeness,
    moment,
    order,
    query,
    reranker,
    scales,
    sequence,
    sources,
    state,
)
from services.ranking import ctr as ctr_module
from services.ranking import propensity as propensity_module
from services.ranking import ranking as ranking_service
from services.ranking.graph import ItemGraph
from training import (
    ascent,
    choice,
    encoding,
    graph_tuning,
    item_graph,
    judging,
    ladder,
    lesson,
    lists,
    metrics,
    propensity,
    queries,
    rankers,
    ranking,
    replay,
    rows,
)
from training import ctr as ctr_fit
from training import reranker as reranker_fit
from training import sequence as sequence_fit
from training.dataset import Shop, read_shop
from training.encoding import Encoded
from training.queries import DAY, baskets
from training.replay import Replay
from training.report import write_report
from training.shop_settings import ShopSettings, with_training
from training.stages import Stages, alone, digest_of

_TUNED = "tuned.json"
_POPULAR = 2000
_POPULAR_DAYS = 7
_RANKING_CODE = [
    queries,
    replay,
    rows,
    lesson,
    rankers,
    ranking,
    ctr_fit,
    lists,
    choice,
    ascent,
    reranker_fit,
    features,
    graph,
    likeness,
    moment,
    order,
    basis,
    sources,
    scales,
    ctr_module,
    reranker,
    blend,
    index,
    catalog,
    interests,
    item_table,
    metrics,
    ranking_service,
    state,
    query,
    sequence,
]
_LIBRARIES = ("torch", "transformers", "open-clip-torch", "lightgbm")
_log = logging.getLogger(__name__)


def train(
    data: Path,
    out: Path,
    *,
    shop_file: Path | None,
    until: datetime | None,
    training: Path | None = None,
    text_base: str | None = None,
    image_base: str | None = None,
    unjudged: bool = False,
) -> Path:
    """Train on a shop directory and publish; the bundle's directory.

    Only events before `until` are used. What an earlier run finished on the same inputs is
    kept under `out`/.stages and taken from there.
    """
    shop = read_shop(data, shop_file, until)
    if training:
        shop = replace(shop, settings=with_training(shop.settings, training))
    for report in shop.reports.values():
        _log.info("%s: %d rows read, %d kept %s", report.file, report.read, report.kept, dict(report.reasons))
    settings = _with_bases(shop.settings, text_base, image_base)
    if unjudged:
        judged = settings.ranking.model_copy(update={"judged": 0})
        settings = settings.model_copy(update={"ranking": judged})
    stages = Stages(out / ".stages")
    learned_until = lesson.first_day(shop.events, settings) * DAY
    encoded = encoding.encode(stages, shop, settings, learned_until)
    graphs = _graph_stage(stages, shop, encoded, learned_until)
    walks = _sequence_stage(stages, shop, settings, encoded, learned_until)
    ranked = _ranking_stage(stages, shop, settings, encoded, graphs, walks)
    buying = _propensity_stage(stages, shop, settings)
    found = json.loads((ranked / judging.FILE).read_text())
    found["propensity"] = json.loads((buying / propensity.FILE).read_text())
    found["graph"] = json.loads((graphs / _TUNED).read_text())
    found["made"] = _made(settings)
    told = _report(shop, until, encoded, found, stages)
    with alone(out / ".staged.lock"):
        return _publish(out, shop, until, encoded, (graphs, walks, ranked, buying), told, unjudged=unjudged)


def _publish(
    out: Path,
    shop: Shop,
    until: datetime | None,
    encoded: Encoded,
    parts: tuple[Path, Path, Path, Path],
    report: Mapping[str, object],
    *,
    unjudged: bool,
) -> Path:
    """A bundle under `out` of the encoders and of the stages: graphs, sequence model, rankers, propensity."""
    graphs, walks, ranked, buying = parts
    staged = out / ".staged"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for space, encoder in encoded.encoders.items():
        shutil.copytree(encoder, staged / space)
    shutil.copytree(graphs / "final", staged / "graph")
    if (walks / "final").is_dir():
        shutil.copytree(walks / "final", staged / "sequence")
    for part in ranking.PARTS:
        if (ranked / part).is_dir():
            shutil.copytree(ranked / part, staged / part)
    if (buying / propensity.PART).is_dir():
        shutil.copytree(buying / propensity.PART, staged / propensity.PART)
    items = _with_photographs(shop.items, encoded)
    write_catalogue(staged / "catalogue", Catalogue(items, encoded.final, encoded.present))
    (staged / "popular").mkdir()
    np.save(staged / "popular" / "numbers.npy", popular(shop))
    write_report(staged / REPORT, report)
    bundle = publish(staged, out, profile(shop), until, report=not unjudged)
    shutil.rmtree(staged, ignore_errors=True)  # still there when the same bundle was
    return bundle


def profile(shop: Shop) -> Profile:
    """What the services must know of the shop."""
    settings = shop.settings
    return Profile(
        event_types=dict(settings.event_types),
        targets=tuple(settings.targets),
        granularity=settings.time.granularity,
        attributes=tuple(settings.items.text_attributes),
        numbers=tuple(settings.items.number_attributes),
    )


def popular(shop: Shop) -> np.ndarray:
    """The item numbers most engaged with in the last week, then ever, best first: int64 (P,)."""
    events = shop.events
    weights = np.array(list(shop.settings.event_types.values()))[events.kind]
    recent = events.time >= events.time[-1] - _POPULAR_DAYS * DAY
    known = {item_number(item.id) for item in shop.items}
    numbers, at = np.unique(events.number, return_inverse=True)
    score = np.bincount(at, weights * (recent + 1e-3), len(numbers))
    order = np.lexsort((numbers, -score))
    return np.array([n for n in numbers[order].tolist() if n in known][:_POPULAR], np.int64)


def _with_bases(settings: ShopSettings, text_base: str | None, image_base: str | None) -> ShopSettings:
    text = settings.text.model_copy(update={"base": text_base} if text_base else {})
    image = settings.image.model_copy(update={"base": image_base} if image_base else {})
    return settings.model_copy(update={"text": text, "image": image})


def _with_photographs(items: list[Item], encoded: Encoded) -> list[Item]:
    """The items with the hash of their photograph, where that was encoded."""
    return [
        Item(**{**item.__dict__, "image_hash": encoded.photographs[item.id]})
        if item.id in encoded.photographs
        else item
        for item in items
    ]


def _graph_stage(stages: Stages, shop: Shop, encoded: Encoded, learned_until: int) -> Path:
    """One graph for each ranking day, of earlier events alone, and the one of all events."""
    events, settings = shop.events, shop.settings
    engaged = np.array(list(settings.event_types.values()))[events.kind] > 0
    numbers = np.array([item_number(item.id) for item in shop.items], np.int64)
    nodes = np.unique(np.concatenate([numbers, events.number]))
    groups = baskets(events)

    def build(directory: Path) -> None:
        tuned = graph_tuning.tune_graph(events, settings, nodes, learned_until)
        found = {relation: of.to_dict() for relation, of in tuned.items()}
        (directory / _TUNED).write_text(json.dumps(found, indent=1) + "\n")
        weightings = {relation: of.weighting for relation, of in tuned.items()}
        content = {
            space: item_graph.content_relation(
                values, encoded.present[space], numbers, nodes, events.number[engaged]
            )
            for space, values in encoded.base.items()
        }
        last = int(events.time[-1] // DAY)
        for name in [*range(learned_until // DAY, last + 1), "final"]:
            mine = engaged if name == "final" else engaged & (events.time < name * DAY)
            fitted = item_graph.fit_item_graph(
                events.user[mine].astype(np.int64),
                groups[mine],
                events.time[mine],
                events.number[mine],
                weightings,
                settings.graph.neighbours,
                nodes,
            )
            ItemGraph(fitted.numbers, {**fitted.relations, **content}).save(directory / str(name))

    inputs = [
        digest_of(events.user.tobytes(), events.number.tobytes(), events.time.tobytes(), groups.tobytes()),
        digest_of(engaged.tobytes(), events.kind[events.time < learned_until].tobytes(), nodes.tobytes()),
        settings.model_dump(mode="json", exclude={"text", "image", "ranking", "sequence", "propensity"}),
        settings.ranking.bare,
        learned_until,
        encoded.base_keys,
    ]
    return stages.run("graph", inputs, [graph_tuning, item_graph, graph, queries, query], build)


def _sequence_stage(
    stages: Stages, shop: Shop, settings: ShopSettings, encoded: Encoded, learned_until: int
) -> Path:
    """The sequence model that knows nothing of the ranking days, and the one of all events."""
    attributes, weights = settings.items.text_attributes, dict(settings.event_types)
    since = [created(item) for item in shop.items]

    def build(directory: Path) -> None:
        for name, vectors, before in (
            ("before", encoded.fold, learned_until),
            ("final", encoded.final, int(shop.events.time[-1]) + 1),
        ):
            table = ItemTable.of(shop.items, vectors, encoded.present, since)
            engaged = sequence_fit.Engagements.of(shop.events, weights, table, before)
            net = sequence_fit.fit_sequence(engaged, table, settings.sequence, attributes)
            if net is not None:
                sequence.write_sequence(directory / name, net)

    events = shop.events
    inputs = [
        learned_until,
        [encoded.fold_keys, *(encoder.name for encoder in encoded.encoders.values())],
        digest_of(events.user.tobytes(), events.number.tobytes(), events.time.tobytes()),
        digest_of(events.kind.tobytes(), queries.baskets(events).tobytes()),
        digest_of(*(repr((item.id, item.attributes)).encode() for item in shop.items)),
        [weights, attributes, settings.sequence.model_dump()],
    ]
    code = [sequence_fit, sequence, queries, query, item_table, graph]
    return stages.run("sequence", inputs, code, build)


def _ranking_stage(
    stages: Stages, shop: Shop, settings: ShopSettings, encoded: Encoded, graphs: Path, walks: Path
) -> Path:
    """The CTR head and the reranker, with what they were judged to be worth."""
    events = shop.events

    def build(directory: Path) -> None:
        by_day = {int(p.name): ItemGraph.load(p) for p in graphs.iterdir() if p.name.isdigit()}
        model = walks / "before"
        past = Replay(shop, by_day, encoded.fold, encoded.present, model if model.is_dir() else None)
        ranking.fit(past, shop, settings, encoded.fold, directory)

    inputs = [
        graphs.name,
        walks.name,
        encoded.fold_keys,
        digest_of(events.kind.tobytes(), events.position.tobytes(), events.session.tobytes()),
        digest_of(events.channel.tobytes(), *(name.encode() for name in events.channel_names)),
        digest_of(events.price.tobytes(), repr(shop.items).encode(), *(k.encode() for k in events.user_ids)),
        settings.model_dump(mode="json", exclude={"text", "image", "propensity"}),
    ]
    return stages.run("ranking", inputs, [*_RANKING_CODE, judging, ladder], build)


def _propensity_stage(stages: Stages, shop: Shop, settings: ShopSettings) -> Path:
    """Who buys soon, where that can be foretold."""
    events, price = shop.events, np.nan_to_num(shop.events.price, nan=-1)
    inputs = [
        digest_of(events.user.tobytes(), events.time.tobytes(), events.kind.tobytes(), price.tobytes()),
        [list(settings.event_types), settings.targets, settings.propensity.model_dump()],
    ]
    code = [propensity, propensity_module, metrics, replay, ctr_fit, state, moment]
    return stages.run("propensity", inputs, code, lambda at: propensity.fit(shop, settings, at))


def _made(settings: ShopSettings) -> dict[str, object]:
    """On what, by which libraries and with which settings a bundle is made."""
    device = f"{os.cpu_count()} {platform.machine()} cores, torch on {torch.get_num_threads()} of them"
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()} and {device}"
    return {
        "device": device,
        "libraries": {name: version(name) for name in _LIBRARIES},
        "settings": dict(_flat(settings.model_dump(mode="json", exclude_defaults=True))),
    }


def _flat(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _report(
    shop: Shop,
    until: datetime | None,
    encoded: Encoded,
    found: Mapping[str, object],
    stages: Stages,
) -> dict[str, object]:
    return {
        "shop": {
            "items": len(shop.items),
            "events": len(shop.events),
            "users": len(np.unique(shop.events.user)),
            "photographs": len(encoded.photographs),
            "until": until.isoformat() if until else None,
        },
        "input": {
            report.file: {
                "read": report.read,
                "kept": report.kept,
                "reasons": dict(report.reasons),
                "examples": report.examples,
            }
            for report in shop.reports.values()
        },
        "encoders": encoded.judged,
        **found,
        "stages": stages.seconds,
    }

"""`vitrine train`: reads a shop directory, trains stage by stage and publishes a bundle.

The last days of the events are the ranking days. Models fitted on the behavior before them make the
training rows of the CTR head and the reranker, so no row contains its own basket. The published models
are then fitted once more on all events.
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

from services.catalog.bundle import REPORT, BundleCatalog, ShopSchema, publish, write_catalog
from services.catalog.items import Item, item_hash
from training import ranking_stage
from training.core.stages import Stages, digest_of, exclusive_lock
from training.data.config import ShopConfig
from training.data.dataset import read_shop
from training.data.inspection.verdict import Verdict, assess_shop
from training.data.settings_file import with_training
from training.data.shop import ShopData
from training.encoders import fit_encoders
from training.encoders.fit_encoders import FittedEncoders
from training.evaluation import evaluate
from training.evaluation.report import write_report
from training.evaluation.summary import summary_lines
from training.examples import queries
from training.examples.queries import DAY
from training.examples.windows import Windows, choose_windows
from training.ranking import propensity, taste_models
from training.retrieval import past_graphs, sequence_models

_MAX_POPULAR = 2000
_POPULAR_DAYS = 7
_LIBRARIES = ("torch", "transformers", "open-clip-torch", "timm", "lightgbm")
_log = logging.getLogger(__name__)


def train(
    data: Path,
    out: Path,
    *,
    shop_file: Path | None,
    until: datetime | None,
    training_config: Path | None = None,
    text_base: str | None = None,
    image_base: str | None = None,
    skip_evaluation: bool = False,
    allow_losses: bool = False,
) -> tuple[Path, list[str]]:
    """Train on a shop directory and publish a bundle; return its directory and five lines for a shopkeeper.

    Only events before `until` are used. Finished stages are stored under `out`/.stages and reused by a later
    run with the same inputs.

    Raises:
        FailedPrecondition: the files are unusable, or too many rows are lost without `allow_losses`.
    """
    shop = read_shop(data, shop_file, until)
    if training_config:
        shop = replace(shop, settings=with_training(shop.settings, training_config))
    for report in shop.reports.values():
        _log.info(
            "%s: %d of %d rows used %s", report.file, report.rows_used, report.rows_read, report.reasons
        )
    _log.info("%s", shop.images.report.summary)
    settings = _with_bases(shop.settings, text_base, image_base)
    verdict = assess_shop(replace(shop, settings=settings))
    verdict.require(allow_losses=allow_losses)
    if skip_evaluation:
        no_evaluation = settings.ranking.model_copy(update={"eval_queries": 0})
        settings = settings.model_copy(update={"ranking": no_evaluation})
    stages = Stages(out / ".stages")
    windows = choose_windows(shop.events, settings)
    split_time = windows.since
    if len(shop.events):
        _log.info("%s", windows)
    encoded = fit_encoders.encode(stages, shop, settings, split_time)
    graphs = _graph_stage(stages, shop, encoded, windows)
    sequences = _sequence_stage(stages, shop, settings, encoded, split_time)
    tastes = _taste_stage(stages, shop, settings, split_time)
    rankers = _ranking_stage(stages, shop, settings, encoded, graphs, sequences, tastes, windows)
    propensities = _propensity_stage(stages, shop, settings)
    sections = json.loads((rankers / evaluate.FILE).read_text())
    sections["propensity"] = json.loads((propensities / propensity.FILE).read_text())
    sections["graph"] = json.loads((graphs / past_graphs.TUNED).read_text())
    sections["provenance"] = _provenance(settings)
    if len(shop.events):
        sections["windows"] = windows.to_dict()
    decisions = rankers / ranking_stage.DECISIONS
    of_rankers = json.loads(decisions.read_text()) if decisions.is_file() else []
    sections["decisions"] = [*(decision.to_dict() for decision in encoded.decisions), *of_rankers]
    document = _report(shop, until, encoded, sections, stages, verdict)
    document["summary"] = lines = summary_lines(document)
    with exclusive_lock(out / ".staged.lock"):
        bundle = _publish(
            out,
            shop,
            until,
            encoded,
            (graphs, sequences, tastes, rankers, propensities),
            document,
            skip_evaluation=skip_evaluation,
        )
    return bundle, lines


def _publish(
    out: Path,
    shop: ShopData,
    until: datetime | None,
    encoded: FittedEncoders,
    parts: tuple[Path, Path, Path, Path, Path],
    report: Mapping[str, object],
    *,
    skip_evaluation: bool,
) -> Path:
    """Assemble and publish a bundle under `out` from the encoders and the stage directories `parts`.

    `parts` are the graphs, the sequence and taste models, the rankers and the propensity models.
    """
    graphs, sequences, tastes, rankers, propensities = parts
    staged = out / ".staged"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for space, encoder in encoded.encoders.items():
        shutil.copytree(encoder, staged / space)
    shutil.copytree(graphs / past_graphs.FINAL, staged / "graph")
    if (sequences / sequence_models.FINAL).is_dir():
        shutil.copytree(sequences / sequence_models.FINAL, staged / "sequence")
    if (tastes / taste_models.FINAL).is_dir():
        shutil.copytree(tastes / taste_models.FINAL, staged / "taste")
    for part in ranking_stage.PARTS:
        if (rankers / part).is_dir():
            shutil.copytree(rankers / part, staged / part)
    if (propensities / propensity.PART).is_dir():
        shutil.copytree(propensities / propensity.PART, staged / propensity.PART)
    items = _with_image_hashes(shop.items, encoded)
    write_catalog(staged / "catalog", BundleCatalog(items, encoded.final, encoded.present))
    (staged / "popular").mkdir()
    np.save(staged / "popular" / "numbers.npy", popular_items(shop))
    write_report(staged / REPORT, report)
    bundle = publish(staged, out, shop_schema(shop), until, report=not skip_evaluation)
    shutil.rmtree(staged, ignore_errors=True)  # remains if the same bundle already exists
    return bundle


def shop_schema(shop: ShopData) -> ShopSchema:
    """The description of the shop that the services need."""
    settings = shop.settings
    return ShopSchema(
        event_types=dict(settings.event_types),
        targets=tuple(settings.targets),
        granularity=settings.time.granularity,
        attributes=tuple(settings.items.text_attributes),
        numbers=tuple(settings.items.number_attributes),
    )


def popular_items(shop: ShopData) -> np.ndarray:
    """The hashes of the most popular items, int64 (P,), best first: by the last week, then by all time."""
    events = shop.events
    if not len(events):
        return np.empty(0, np.int64)
    weights = np.array(list(shop.settings.event_types.values()))[events.kind]
    recent = events.time >= events.time[-1] - _POPULAR_DAYS * DAY
    catalog_hashes = {item_hash(item.id) for item in shop.items}
    hashes, index = np.unique(events.number, return_inverse=True)
    score = np.bincount(index, weights * (recent + 1e-3), len(hashes))
    order = np.lexsort((hashes, -score))
    return np.array([n for n in hashes[order].tolist() if n in catalog_hashes][:_MAX_POPULAR], np.int64)


def _with_bases(settings: ShopConfig, text_base: str | None, image_base: str | None) -> ShopConfig:
    text = settings.text.model_copy(update={"base": text_base} if text_base else {})
    image = settings.image.model_copy(update={"base": image_base} if image_base else {})
    return settings.model_copy(update={"text": text, "image": image})


def _with_image_hashes(items: list[Item], encoded: FittedEncoders) -> list[Item]:
    """The items, each with the hash of its image if that image was encoded."""
    return [
        Item(**{**item.__dict__, "image_hash": encoded.image_hashes[item.id]})
        if item.id in encoded.image_hashes
        else item
        for item in items
    ]


def _graph_stage(stages: Stages, shop: ShopData, encoded: FittedEncoders, windows: Windows) -> Path:
    """Fit one graph per part of the ranking window, on earlier events only, and one graph on all events."""
    events, settings = shop.events, shop.settings
    hashes = np.array([item_hash(item.id) for item in shop.items], np.int64)
    is_engagement, basket_codes = past_graphs.engagements(events, settings), queries.baskets(events)
    early = events.kind[events.time < windows.since]
    inputs = [
        digest_of(
            events.user.tobytes(), events.number.tobytes(), events.time.tobytes(), basket_codes.tobytes()
        ),
        digest_of(is_engagement.tobytes(), early.tobytes(), hashes.tobytes()),
        settings.model_dump(
            mode="json", exclude={"text", "image", "ranking", "sequence", "taste", "propensity"}
        ),
        settings.ranking.no_session_share,
        [windows.since, windows.tuned_from, windows.parts.tolist()],
        encoded.base_keys,
    ]
    entry = past_graphs.write_graphs
    return stages.run(
        "graph", inputs, entry, events, settings, hashes, encoded.base, encoded.present, windows
    )


def _sequence_stage(
    stages: Stages, shop: ShopData, settings: ShopConfig, encoded: FittedEncoders, split_time: int
) -> Path:
    """Fit one sequence model without the ranking days and one on all events."""
    attributes, weights = settings.items.text_attributes, dict(settings.event_types)
    events = shop.events
    inputs = [
        split_time,
        [encoded.fold_keys, *(encoder.name for encoder in encoded.encoders.values())],
        digest_of(events.user.tobytes(), events.number.tobytes(), events.time.tobytes()),
        digest_of(events.kind.tobytes(), queries.baskets(events).tobytes()),
        digest_of(*(repr((item.id, item.attributes)).encode() for item in shop.items)),
        [weights, attributes, settings.sequence.model_dump()],
    ]
    return stages.run(
        "sequence",
        inputs,
        sequence_models.write_models,
        shop,
        settings.sequence,
        encoded.fold,
        encoded.final,
        encoded.present,
        split_time,
    )


def _taste_stage(stages: Stages, shop: ShopData, settings: ShopConfig, split_time: int) -> Path:
    """Fit one taste model without the ranking days and one on all events."""
    events = shop.events
    inputs = [
        split_time,
        digest_of(events.user.tobytes(), events.number.tobytes(), events.time.tobytes()),
        digest_of(events.kind.tobytes(), *(key.encode() for key in events.user_ids)),
        digest_of(*(repr((item.id, item.attributes, item.price)).encode() for item in shop.items)),
        [dict(settings.event_types), settings.targets, settings.items.text_attributes],
        settings.taste.model_dump(),
    ]
    return stages.run("taste", inputs, taste_models.write_models, shop, settings.taste, split_time)


def _ranking_stage(
    stages: Stages,
    shop: ShopData,
    settings: ShopConfig,
    encoded: FittedEncoders,
    graphs: Path,
    sequences: Path,
    tastes: Path,
    windows: Windows,
) -> Path:
    """Fit the CTR head and the reranker and evaluate them."""
    events = shop.events

    inputs = [
        [graphs.name, windows.evaluated_from],
        sequences.name,
        tastes.name,
        encoded.fold_keys,
        digest_of(events.kind.tobytes(), events.position.tobytes(), events.session.tobytes()),
        digest_of(events.channel.tobytes(), *(name.encode() for name in events.channel_names)),
        digest_of(events.price.tobytes(), repr(shop.items).encode(), *(k.encode() for k in events.user_ids)),
        settings.model_dump(mode="json", exclude={"text", "image", "propensity"}),
    ]
    return stages.run(
        "ranking",
        inputs,
        ranking_stage.write_rankers,
        shop,
        settings,
        encoded.fold,
        encoded.present,
        graphs,
        sequences,
        tastes,
        windows,
    )


def _propensity_stage(stages: Stages, shop: ShopData, settings: ShopConfig) -> Path:
    """Fit the models of near purchases that beat the base rate."""
    events, price = shop.events, np.nan_to_num(shop.events.price, nan=-1)
    inputs = [
        digest_of(events.user.tobytes(), events.time.tobytes(), events.kind.tobytes(), price.tobytes()),
        [list(settings.event_types), settings.targets, settings.propensity.model_dump()],
    ]
    return stages.run("propensity", inputs, propensity.fit, shop, settings)


def _logs_pages(shop: ShopData) -> bool:
    """Whether any event is an impression within a session."""
    weights = np.array(list(shop.settings.event_types.values()))
    return bool(((weights[shop.events.kind] == 0) & (shop.events.session >= 0)).any())


def _provenance(settings: ShopConfig) -> dict[str, object]:
    """The device, the library versions and the non-default settings of this run."""
    device = f"{os.cpu_count()} {platform.machine()} cores, torch on {torch.get_num_threads()} of them"
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()} and {device}"
    return {
        "device": device,
        "libraries": {name: version(name) for name in _LIBRARIES},
        "settings": dict(_flatten(settings.model_dump(mode="json", exclude_defaults=True))),
    }


def _flatten(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _report(
    shop: ShopData,
    until: datetime | None,
    encoded: FittedEncoders,
    sections: Mapping[str, object],
    stages: Stages,
    verdict: Verdict,
) -> dict[str, object]:
    return {
        "shop": {
            "items": len(shop.items),
            "events": len(shop.events),
            "users": len(np.unique(shop.events.user)),
            "images": len(encoded.image_hashes),
            "until": until.isoformat() if until else None,
            "logs_pages": _logs_pages(shop),
        },
        "input": {f"{report.file} ({name})": report.to_dict() for name, report in shop.reports.items()},
        "verdict": {"allowed": verdict.reasons, "warnings": verdict.warnings},
        "images": {
            "files": shop.images.report.files,
            "items": len(shop.images.report.matching.of_item),
            "problems": shop.images.report.problems,
            "unreadable": encoded.unreadable,
        },
        "encoders": encoded.pair_recall,
        **sections,
        "stages": stages.seconds,
    }

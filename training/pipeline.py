"""`vitrine train`: a shop directory in, a published bundle out, stage by stage."""

import logging
import shutil
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from services.bundle import Catalogue, Profile, publish, write_catalogue
from services.catalog import item_number, item_text
from services.embedding import encoders
from services.embedding.encoders import TextEncoder, TextSettings
from services.ranking import graph as graph_module
from training import item_graph, text_encoder
from training.dataset import Events, Shop, read_shop
from training.stages import Stages, digest_of

DAY = 86_400_000_000
_POPULAR = 2000
_POPULAR_DAYS = 7
_ENCODED_AT_ONCE = 2048
_log = logging.getLogger(__name__)


def train(data: Path, out: Path, *, shop_file: Path | None, until: datetime | None, text_base: str) -> Path:
    """Train on a shop directory and publish; the bundle's directory.

    Only events before `until` are used. What an earlier run finished on the same inputs is
    kept under `out`/.stages and taken from there.
    """
    shop = read_shop(data, shop_file, until)
    for report in shop.reports.values():
        _log.info("%s: %d rows read, %d kept %s", report.file, report.read, report.kept, dict(report.reasons))
    stages = Stages(out / ".stages")
    text = _text_stage(stages, text_base)
    vectors = _vector_stage(stages, shop, text)
    graph = _graph_stage(stages, shop.events, shop.settings.time.granularity)
    staged = out / ".staged"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    shutil.copytree(text, staged / "text")
    shutil.copytree(graph, staged / "graph")
    text_vectors = np.load(vectors / "text.npy")
    present = np.ones(len(shop.items), bool)
    write_catalogue(staged / "catalogue", Catalogue(shop.items, {"text": text_vectors}, {"text": present}))
    (staged / "popular").mkdir()
    np.save(staged / "popular" / "numbers.npy", popular(shop))
    return publish(staged, out, profile(shop), until)


def profile(shop: Shop) -> Profile:
    """What the services must know of the shop."""
    settings = shop.settings
    return Profile(
        event_types=dict(settings.event_types),
        targets=tuple(settings.targets),
        granularity=settings.time.granularity,
        attributes=tuple(settings.items.text_attributes),
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


def _text_stage(stages: Stages, base: str) -> Path:
    bf16 = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    settings = TextSettings(max_tokens=96, precision="bf16" if bf16 else "fp32")
    located = text_encoder.locate(base)
    identity = encoders.digest(Path(located)) if Path(located).is_dir() else located
    return stages.run(
        "text",
        [identity, asdict(settings)],
        [text_encoder],
        lambda directory: text_encoder.save_frozen(base, directory, settings),
    )


def _vector_stage(stages: Stages, shop: Shop, encoder: Path) -> Path:
    texts = [item_text(item) for item in shop.items]

    def build(directory: Path) -> None:
        model = TextEncoder(encoder, "cuda" if torch.cuda.is_available() else "cpu")
        rows = []
        for start in range(0, len(texts), _ENCODED_AT_ONCE):
            rows.append(model.encode(texts[start : start + _ENCODED_AT_ONCE]).vectors.astype(np.float16))
            _log.info("texts: %d of %d encoded", min(start + _ENCODED_AT_ONCE, len(texts)), len(texts))
        np.save(directory / "text.npy", np.concatenate(rows))

    inputs = [encoders.digest(encoder), digest_of(*(text.encode() for text in texts))]
    return stages.run("vectors", inputs, [encoders], build)


def _graph_stage(stages: Stages, events: Events, granularity: str) -> Path:
    inputs = digest_of(
        events.user.tobytes(), events.number.tobytes(), events.time.tobytes(), events.kind.tobytes()
    )
    return stages.run(
        "graph",
        [inputs, granularity],
        [item_graph, graph_module],
        lambda directory: item_graph.fit_item_graph(
            events.user.astype(np.int64), baskets(events), events.number
        ).save(directory),
    )


def baskets(events: Events) -> np.ndarray:
    """The basket of each event, int64 (N,): its session, or what its person did that day."""
    day = events.time // DAY
    of_day = events.user.astype(np.int64) * (1 << 31) + day
    return np.where(events.session >= 0, -1 - events.session.astype(np.int64), of_day)

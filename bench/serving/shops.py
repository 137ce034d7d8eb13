"""The shops that are served: bundles with a state whose events and items are imported already.

A state is prepared once, by the commands and with the first start that a shop has, and is kept; each
measurement serves a copy of it.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from bench.runs import vitrine
from bench.serving import servers
from bench.serving.driver import wait_until_idle
from services.catalog.bundle import Bundle
from training.data.events import Events

_READY = "ready.json"
_NOON = timedelta(hours=12)


@dataclass(frozen=True)
class Shop:
    """A bundle and a prepared state, with what requests are drawn from.

    `user_weights` float64 (U,) are the events of each of the `user_ids`, by which users are drawn.
    `item_weights` float64 (N,) says how often each of the `item_ids` is in a session. The services' clock
    stands at `time`. `first_start_seconds` is the time of the start that imported the items. `events` makes
    the events of the state again, for a server of another kind.
    """

    name: str
    bundle: Path
    state: Path
    user_ids: list[str]
    user_weights: np.ndarray = field(repr=False)
    item_ids: list[str]
    item_weights: np.ndarray = field(repr=False)
    event_types: list[str]
    time: datetime
    first_start_seconds: float
    interactions: int
    events: Callable[[], Events] = field(repr=False)

    @property
    def options(self) -> list[str]:
        """The flags of `vitrine serve` besides bundle, state and address."""
        return [f"--fixed-time={self.time.isoformat()}", "--bundle-poll-seconds=0"]

    @contextmanager
    def served(
        self, folder: Path, layout: str = servers.ONE, options: tuple[str, ...] = ()
    ) -> Iterator[servers.Services]:
        """Services over a copy of the state in `folder`, which is deleted at the end."""
        log = folder / "server.log"
        with (
            copied_state(self, folder) as state,
            servers.running(self.bundle, state, log, layout, [*self.options, *options]) as services,
        ):
            wait_until_idle(services)
            yield services


@contextmanager
def copied_state(shop: Shop, folder: Path) -> Iterator[Path]:
    """A copy of a shop's state in `folder` until the end of the block."""
    state = folder / "state"
    shutil.copytree(shop.state, state)
    try:
        yield state
    finally:
        shutil.rmtree(state, ignore_errors=True)


def existing_shop(bundle_path: Path, data: Path, cache: Path) -> Shop:
    """A bundle with the interactions of the shop directory that it was trained on."""
    from training.data.dataset import read_shop  # noqa: PLC0415 - loads pyarrow

    bundle = Bundle(bundle_path)
    events = read_shop(data).events
    item_ids = [item.id for item in bundle.catalog().items]
    index = {item_id: row for row, item_id in enumerate(item_ids)}
    rows = np.array([index.get(item_id, -1) for item_id in events.item_ids])[events.item]
    time = (bundle.until or datetime.fromtimestamp(int(events.time[-1]) / 1e6).astimezone()) + _NOON
    state = cache / f"state-{bundle.version}"

    def import_events() -> None:
        vitrine("import", f"--data={data}", f"--bundle={bundle.directory}", f"--state={state}")

    seconds = prepared(bundle.directory, state, time, import_events)
    return Shop(
        name=data.parent.name if data.name == "shop" else data.name,
        bundle=bundle.directory,
        state=state,
        user_ids=events.user_ids,
        user_weights=np.bincount(events.user, minlength=len(events.user_ids)).astype(np.float64),
        item_ids=item_ids,
        item_weights=np.bincount(rows[rows >= 0], minlength=len(item_ids)) + 1e-3,
        event_types=list(bundle.profile.event_types),
        time=time,
        first_start_seconds=seconds,
        interactions=len(events),
        events=lambda: read_shop(data).events,
    )


def prepared(bundle: Path, state: Path, time: datetime, import_events: Callable[[], None]) -> float:
    """Make a state unless it is there: import the events, then start once until all indexes are built.

    Returns the seconds of that first start, which imports the items, until SERVING.
    """
    if (state / _READY).is_file():
        return float(json.loads((state / _READY).read_text())["first_start_seconds"])
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    import_events()
    options = [f"--fixed-time={time.isoformat()}", "--bundle-poll-seconds=0"]
    with servers.running(bundle, state, state.with_suffix(".log"), options=options) as services:
        wait_until_idle(services)
    (state / _READY).write_text(json.dumps({"first_start_seconds": services.start_seconds}) + "\n")
    return services.start_seconds

"""A training run killed inside any stage goes on where it stopped; what did not change is not run again.

Run as a module this file is the run that gets killed: one process that forks a training for every
stage, each going on where the one before was killed.
"""

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from services.bundle import MANIFEST
from services.cli import main
from tests.models import make_image_encoder, make_text_encoder
from training.stages import Stages

pytestmark = pytest.mark.usefixtures("one_thread")

UNTIL = "2026-01-07"
WORLDS = ("garden", "kitchen")
PICTURED = 8
TOML = """
[items]
text_attributes = ["world"]
[event_types]
click = 0.25
purchase = 1.0
[time]
granularity = "day"
[text]
layers = 1
steps = 2
batch = 8
max_tokens = 8
head_steps = 2
[image]
epochs = 1
batch = 4
head_steps = 2
[ranking]
days = 3
candidates = 10
judged = 5
trees = 2
ctr_epochs = 1
"""
Rows = list[dict[str, Any]]


def items() -> Rows:
    return [
        {"id": f"{w}{n}", "title": f"{w} thing {n}", "world": w, "price": 5 + n, "family_id": f"{w}{n // 2}"}
        for w in WORLDS
        for n in range(10)
    ]


def events() -> Rows:
    """On each of six days, eight people engage with four things of one world."""
    generator = np.random.default_rng(0)
    made = []
    for day in range(1, 7):
        for person in range(8):
            for at, n in enumerate(generator.permutation(10)[:4].tolist()):
                item, kind = f"{WORLDS[person % 2]}{n}", "click" if at == 0 else "purchase"
                made.append(
                    {"user_id": f"p{person}", "item_id": item, "type": kind, "time": f"2026-01-0{day}"}
                )
    return made


def write(directory: Path, of_items: Rows, of_events: Rows, toml: str = TOML) -> Path:
    """A shop directory; every change of it keeps the photographs' files as they are."""
    directory.mkdir(exist_ok=True)
    for name, rows in (("items", of_items), ("events", of_events)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "shop.toml").write_text(toml)
    images = directory / "images"
    images.mkdir(exist_ok=True)
    for n, row in enumerate(items()[:PICTURED]):
        path = images / f"{row['id']}.png"
        if not path.exists():
            Image.new("RGB", (40, 40), (30 * n, 200 - 20 * n, 90)).save(path)
    return directory


def command(shop: Path, bases: Path, out: Path) -> list[str]:
    at = [f"--data={shop}", f"--out={out}", f"--until={UNTIL}"]
    return ["train", *at, f"--text-base={bases / 'text'}", f"--image-base={bases / 'image'}"]


def version(out: Path) -> list[str]:
    """The bundles under a directory."""
    return sorted(path.parent.name for path in out.glob(f"*/{MANIFEST}"))


def finished(out: Path) -> set[str]:
    return {path.name for path in (out / ".stages").iterdir() if path.is_dir() and path.suffix != ".part"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bases")
    make_text_encoder(directory / "text")
    make_image_encoder(directory / "image")
    return directory


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("shop"), items(), events())


@pytest.fixture(scope="module")
def killed(shop: Path, bases: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `main` of this module saw, and where."""
    root = tmp_path_factory.mktemp("killed")
    run = [sys.executable, "-m", "tests.test_resume", str(shop), str(bases), str(root)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(run, check=True, env=environment, cwd=Path(__file__).parent.parent)
    found: dict[str, Any] = json.loads((root / "found.json").read_text())
    return found | {"root": root}


def test_a_run_killed_inside_any_stage_goes_on_where_it_stopped(killed: dict[str, Any]) -> None:
    stages, runs = killed["stages"], killed["runs"]
    assert {"text", "image", "graph", "sequence", "ranking", "propensity"} <= set(stages)
    assert len(stages) == len(set(stages))
    for at, stage in enumerate(stages):
        run = runs[at]
        assert run["exit"] == -signal.SIGKILL
        # The stage that was killed before is built anew, and no other.
        assert run["begun"] == stages[max(at - 1, 0) : at + 1]
        assert sorted(name.rsplit("-", 1)[0] for name in run["finished"]) == sorted(stages[:at])
        assert stage not in run["finished"]
        assert run["bundles"] == []
    assert runs[-1]["exit"] == 0
    assert runs[-1]["begun"] == stages[-1:]
    assert runs[-1]["bundles"] == killed["undisturbed"]
    assert len(killed["undisturbed"]) == 1
    resumed = killed["root"] / "resumed"
    assert not list(resumed.rglob("half"))
    assert not list(resumed.rglob("*.part"))


def built(
    change: Callable[[Rows, Rows], None],
    killed: dict[str, Any],
    shop: Path,
    bases: Path,
    caplog: pytest.LogCaptureFixture,
    toml: str = TOML,
) -> set[str]:
    """The stages that run when the shop of the undisturbed run has changed; then the shop is put back."""
    of_items, of_events = items(), events()
    change(of_items, of_events)
    write(shop, of_items, of_events, toml)
    caplog.clear()
    try:
        with caplog.at_level(logging.INFO):
            assert main(command(shop, bases, killed["root"] / "whole")) == 0
    finally:
        write(shop, items(), events())
    return {r.getMessage().split(":")[0] for r in caplog.records if ": done in" in r.getMessage()}


def test_nothing_is_run_again_when_nothing_changed(
    killed: dict[str, Any], shop: Path, bases: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = version(killed["root"] / "whole")
    assert built(lambda i, e: None, killed, shop, bases, caplog) == set()
    assert version(killed["root"] / "whole") == before


def test_a_price_trains_no_encoder_again(
    killed: dict[str, Any], shop: Path, bases: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(of_items: Rows, of_events: Rows) -> None:
        of_items[3]["price"] = 77

    assert built(change, killed, shop, bases, caplog) == {"ranking"}


def test_a_title_trains_both_encoders_again(
    killed: dict[str, Any], shop: Path, bases: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(of_items: Rows, of_events: Rows) -> None:
        of_items[3]["title"] = "a gnome"

    # Files of photographs, the bases as they came, what those see in photographs and who buys know no titles.
    untouched = {"photographs", "text-frozen", "image-frozen", "image-frozen-vectors", "propensity"}
    expected = set(killed["stages"]) - untouched
    assert built(change, killed, shop, bases, caplog) == expected


def test_a_ranking_setting_runs_the_ranking_again_and_nothing_else(
    killed: dict[str, Any], shop: Path, bases: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toml = TOML.replace("trees = 2", "trees = 3")
    assert built(lambda i, e: None, killed, shop, bases, caplog, toml) == {"ranking"}


def test_a_propensity_setting_runs_the_propensity_again_and_nothing_else(
    killed: dict[str, Any], shop: Path, bases: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toml = f"{TOML}[propensity]\ndays = [1, 2]\n"
    assert built(lambda i, e: None, killed, shop, bases, caplog, toml) == {"propensity"}


def test_another_type_of_an_event_runs_what_weighs_engagements_again(
    killed: dict[str, Any], shop: Path, bases: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(of_items: Rows, of_events: Rows) -> None:
        assert of_events[-1]["type"] == "purchase"
        of_events[-1]["type"] = "click"

    assert built(change, killed, shop, bases, caplog) == {"sequence", "ranking", "propensity"}


def test_a_shop_too_small_to_judge_is_trained_all_the_same(bases: Path, tmp_path: Path) -> None:
    few = [row for row in events() if row["user_id"] == "p0" and row["time"] > "2026-01-05"]
    shop = write(tmp_path / "shop", items(), few)
    assert main(command(shop, bases, tmp_path / "out")) == 0
    assert len(version(tmp_path / "out")) == 1


class _Watched(Stages):
    """Stages that write down what they begin, and kill their process inside one of them."""

    begun: Path
    fatal = ""

    def run(self, name: str, inputs: Any, code: list[ModuleType], build: Callable[[Path], None]) -> Path:
        def watched(directory: Path) -> None:
            with self.begun.open("a") as file:
                file.write(name + "\n")
            if name == self.fatal:
                (directory / "half").write_text("x")
                os.kill(os.getpid(), signal.SIGKILL)
            build(directory)

        return super().run(name, inputs, code, watched)


def _run(shop: Path, bases: Path, out: Path, begun: Path, fatal: str) -> None:
    from training import pipeline  # noqa: PLC0415 - the run that is watched

    torch.set_num_threads(1)
    _Watched.begun, _Watched.fatal = begun, fatal
    pipeline.Stages = _Watched  # type: ignore[attr-defined]
    sys.exit(main(command(shop, bases, out)))


def _forked(shop: Path, bases: Path, out: Path, root: Path, fatal: str = "") -> dict[str, Any]:
    begun = root / "begun"
    begun.write_text("")
    child = multiprocessing.get_context("fork").Process(target=_run, args=(shop, bases, out, begun, fatal))
    child.start()
    child.join()
    return {
        "exit": child.exitcode,
        "begun": begun.read_text().split(),
        "finished": sorted(finished(out)),
        "bundles": version(out),
    }


def _main(shop: Path, bases: Path, root: Path) -> None:
    import training.pipeline  # noqa: F401, PLC0415 - once, for all that are forked

    whole = _forked(shop, bases, root / "whole", root)
    runs = [_forked(shop, bases, root / "resumed", root, fatal) for fatal in [*whole["begun"], ""]]
    found = {"stages": whole["begun"], "undisturbed": whole["bundles"], "runs": runs}
    (root / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    _main(*(Path(argument) for argument in sys.argv[1:]))

"""A killed training run resumes at the stage where it stopped, and unchanged stages do not run again.

As a module this file is the run that tests kill: one process that forks a training for every stage, each
of which resumes the one before.
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
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cli.main import main
from services.catalog.bundle import MANIFEST
from tests.support.models import make_image_encoder, make_text_encoder
from training.core.stages import Stages

pytestmark = pytest.mark.usefixtures("single_thread")

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
trainable_layers = 1
steps = 2
batch = 8
max_tokens = 8
projection_steps = 2
[image]
epochs = 1
batch = 4
projection_steps = 2
[ranking]
ranking_days = 3
candidates_per_query = 10
eval_queries = 5
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
    rows = []
    for day in range(1, 7):
        for user in range(8):
            for at, n in enumerate(generator.permutation(10)[:4].tolist()):
                item, kind = f"{WORLDS[user % 2]}{n}", "click" if at == 0 else "purchase"
                rows.append({"user_id": f"p{user}", "item_id": item, "type": kind, "time": f"2026-01-0{day}"})
    return rows


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


def contents(versions: list[str]) -> list[str]:
    """The parts of versions that follow from the content of bundles, not from the time of publishing."""
    return [version.partition("-")[2] for version in versions]


def finished_stages(out: Path) -> set[str]:
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
def killed_runs(shop: Path, bases: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `main` of this module saw, and where."""
    root = tmp_path_factory.mktemp("killed")
    run = [sys.executable, "-m", "tests.e2e.test_resume", str(shop), str(bases), str(root)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(run, check=True, env=environment, cwd=Path(__file__).parents[2])
    report: dict[str, Any] = json.loads((root / "runs.json").read_text())
    return report | {"root": root}


def test_a_run_killed_inside_any_stage_resumes_there(killed_runs: dict[str, Any]) -> None:
    stages, runs = killed_runs["stages"], killed_runs["runs"]
    assert {"text", "image", "graph", "sequence", "ranking", "propensity"} <= set(stages)
    assert len(stages) == len(set(stages))
    for at, stage in enumerate(stages):
        run = runs[at]
        assert run["exit"] == -signal.SIGKILL
        # The stage that was killed before is built anew, and no other.
        assert run["starts"] == stages[max(at - 1, 0) : at + 1]
        assert sorted(name.rsplit("-", 1)[0] for name in run["finished"]) == sorted(stages[:at])
        assert stage not in run["finished"]
        assert run["bundles"] == []
    assert runs[-1]["exit"] == 0
    assert runs[-1]["starts"] == stages[-1:]
    assert contents(runs[-1]["bundles"]) == contents(killed_runs["undisturbed"])
    assert len(killed_runs["undisturbed"]) == 1
    resumed = killed_runs["root"] / "resumed"
    assert not list(resumed.rglob("half"))
    assert not list(resumed.rglob("*.part"))


def rebuilt_stages(
    change: Callable[[Rows, Rows], None],
    killed_runs: dict[str, Any],
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
            assert main(command(shop, bases, killed_runs["root"] / "whole")) == 0
    finally:
        write(shop, items(), events())
    return {r.getMessage().split(":")[0] for r in caplog.records if ": done in" in r.getMessage()}


def test_an_unchanged_shop_runs_no_stage_again(
    killed_runs: dict[str, Any], shop: Path, bases: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = version(killed_runs["root"] / "whole")
    assert rebuilt_stages(lambda i, e: None, killed_runs, shop, bases, caplog) == set()
    assert version(killed_runs["root"] / "whole") == before


def test_a_changed_price_trains_no_encoder_again(
    killed_runs: dict[str, Any], shop: Path, bases: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(of_items: Rows, of_events: Rows) -> None:
        of_items[3]["price"] = 77

    assert rebuilt_stages(change, killed_runs, shop, bases, caplog) == {"taste", "ranking"}


def test_a_changed_title_trains_both_encoders_again(
    killed_runs: dict[str, Any], shop: Path, bases: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(of_items: Rows, of_events: Rows) -> None:
        of_items[3]["title"] = "a gnome"

    # Files of photographs, the bases as they came, what those see in photographs, tastes and who buys know no
    # titles.
    untouched = {"photographs", "text-frozen", "image-frozen", "image-frozen-vectors", "taste", "propensity"}
    expected = set(killed_runs["stages"]) - untouched
    assert rebuilt_stages(change, killed_runs, shop, bases, caplog) == expected


def test_a_ranking_setting_runs_only_the_ranking_again(
    killed_runs: dict[str, Any], shop: Path, bases: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toml = TOML.replace("trees = 2", "trees = 3")
    assert rebuilt_stages(lambda i, e: None, killed_runs, shop, bases, caplog, toml) == {"ranking"}


def test_a_propensity_setting_runs_only_the_propensity_again(
    killed_runs: dict[str, Any], shop: Path, bases: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toml = f"{TOML}[propensity]\ndays = [1, 2]\n"
    assert rebuilt_stages(lambda i, e: None, killed_runs, shop, bases, caplog, toml) == {"propensity"}


def test_a_changed_event_type_runs_the_stages_that_weight_engagements(
    killed_runs: dict[str, Any], shop: Path, bases: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(of_items: Rows, of_events: Rows) -> None:
        assert of_events[-1]["type"] == "purchase"
        of_events[-1]["type"] = "click"

    expected = {"sequence", "taste", "ranking", "propensity"}
    assert rebuilt_stages(change, killed_runs, shop, bases, caplog) == expected


def test_a_shop_too_small_for_evaluation_is_trained(bases: Path, tmp_path: Path) -> None:
    few = [row for row in events() if row["user_id"] == "p0" and row["time"] > "2026-01-05"]
    shop = write(tmp_path / "shop", items(), few)
    assert main(command(shop, bases, tmp_path / "out")) == 0
    assert len(version(tmp_path / "out")) == 1


class _FatalStages(Stages):
    """Stages that write down what they begin, and kill their process inside one of them."""

    stage_log: Path
    fatal = ""

    def _build(self, name: str, done: Path, build: Callable[[Path], None]) -> float:
        def build_or_die(directory: Path) -> None:
            with self.stage_log.open("a") as file:
                file.write(name + "\n")
            if name == self.fatal:
                (directory / "half").write_text("x")
                os.kill(os.getpid(), signal.SIGKILL)
            build(directory)

        return super()._build(name, done, build_or_die)


@pytest.mark.parametrize("broken", [PICTURED, PICTURED // 2])
def test_unreadable_images_are_named_and_can_leave_no_image_part(
    bases: Path, tmp_path: Path, broken: int, caplog: pytest.LogCaptureFixture
) -> None:
    shop, out = write(tmp_path / "shop", items(), events()), tmp_path / "out"
    for row in items()[:broken]:
        (shop / "images" / f"{row['id']}.png").write_bytes(b"<html>403 Forbidden</html>")
    (shop / "images" / "nobody.png").write_bytes(b"")
    if broken == PICTURED:  # most of the images are lost
        assert main([*command(shop, bases, out), "--skip-evaluation"]) == 1
    assert main([*command(shop, bases, out), "--skip-evaluation", "--allow-losses"]) == 0
    bundle = out / version(out)[0]
    assert (bundle / "image").is_dir() == (broken < PICTURED)
    report = json.loads((bundle / "report" / "report.json").read_text())["images"]
    assert (report["files"], report["items"], len(report["unreadable"])) == (PICTURED + 1, PICTURED, broken)
    assert "1 image files match no item (nobody.png)" in caplog.text
    assert (
        f"{broken} of {PICTURED} images cannot be decoded: {items()[0]['id']}.png: is not a read"
        in caplog.text
    )


def _run(shop: Path, bases: Path, out: Path, stage_log: Path, fatal: str) -> None:
    from training import pipeline  # noqa: PLC0415 - the run that is watched

    torch.set_num_threads(1)
    _FatalStages.stage_log, _FatalStages.fatal = stage_log, fatal
    pipeline.Stages = _FatalStages  # type: ignore[attr-defined]
    sys.exit(main(command(shop, bases, out)))


def _fork_run(shop: Path, bases: Path, out: Path, root: Path, fatal: str = "") -> dict[str, Any]:
    stage_log = root / "starts"
    stage_log.write_text("")
    child = multiprocessing.get_context("fork").Process(
        target=_run, args=(shop, bases, out, stage_log, fatal)
    )
    child.start()
    child.join()
    return {
        "exit": child.exitcode,
        "starts": stage_log.read_text().split(),
        "finished": sorted(finished_stages(out)),
        "bundles": version(out),
    }


def _main(shop: Path, bases: Path, root: Path) -> None:
    import training.pipeline  # noqa: F401, PLC0415 - once, for all that are forked

    whole = _fork_run(shop, bases, root / "whole", root)
    runs = [_fork_run(shop, bases, root / "resumed", root, fatal) for fatal in [*whole["starts"], ""]]
    report = {"stages": whole["starts"], "undisturbed": whole["bundles"], "runs": runs}
    (root / "runs.json").write_text(json.dumps(report))


if __name__ == "__main__":
    _main(*(Path(argument) for argument in sys.argv[1:]))

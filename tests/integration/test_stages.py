"""A stage is complete or leaves nothing, and one of two concurrent runs makes it."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.catalog.bundle import MANIFEST
from training.core.stages import Stages


def test_an_interrupted_stage_leaves_nothing(tmp_path: Path) -> None:
    stages = Stages(tmp_path)

    fails = [True]

    def build(directory: Path) -> None:
        if fails:
            (directory / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run("s", [1], build)
    assert not any(path.is_dir() for path in tmp_path.iterdir())
    fails.clear()
    whole = stages.run("s", [1], build)
    assert list(whole.iterdir()) == []
    fails.append(True)
    assert stages.run("s", [1], build) == whole
    assert not (whole / MANIFEST).exists()


def test_one_of_two_concurrent_runs_makes_a_stage(tmp_path: Path) -> None:
    builds, start = [], threading.Event()

    def build(directory: Path) -> None:
        start.set()
        time.sleep(0.2)  # the other has come to the lock meanwhile
        (directory / "whole").write_text("x")
        builds.append(directory)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(Stages(tmp_path).run, "s", [1], build)
        start.wait()
        other = pool.submit(Stages(tmp_path).run, "s", [1], build)
        assert one.result() == other.result()
    assert len(builds) == 1
    shutil.rmtree(one.result())
    for again in (Stages(tmp_path), Stages(tmp_path)):  # made once more, and kept
        again.run("s", [1], build)
        assert again.seconds["s"] >= 0.2
    assert len(builds) == 2
    assert (one.result() / "whole").read_text() == "x"

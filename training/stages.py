"""Stages of a training run, each kept under a key of its inputs so that it is not run twice.

A stage's directory is written aside and renamed: one that exists is whole. Of two runs at once that need the
same stage one makes it and the other waits.
"""

import fcntl
import hashlib
import inspect
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Any

_log = logging.getLogger(__name__)


class Stages:
    """Stage directories under `root`, named after the stage and the key of its inputs.

    `seconds` tells how long each took, one that was kept when it was run.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        # As it was loaded: a file that is edited during a long run is not the code that runs.
        self._sources = {
            name: inspect.getsource(module)
            for name, module in list(sys.modules.items())
            if name.startswith(("training.", "services."))
        }
        self.seconds: dict[str, float] = {}
        root.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, inputs: Any, code: list[ModuleType], build: Callable[[Path], None]) -> Path:
        """The directory of a stage: as it was left if `inputs` (JSON) and `code` are the same, else built."""
        # Some are loaded only where a setting asks for them.
        sources = [self._sources.setdefault(m.__name__, inspect.getsource(m)) for m in code]
        document = json.dumps([inputs, sources], sort_keys=True, default=str)
        key = hashlib.blake2b(document.encode(), digest_size=8).hexdigest()
        done = self._root / f"{name}-{key}"
        with alone(self._root / f"{name}-{key}.seconds") as took:
            if done.is_dir():
                _log.info("%s: nothing changed, kept from an earlier run", name)
                if seconds := took.read():
                    self.seconds[name] = float(seconds)
                return done
            self.seconds[name] = _build(done, build)
            took.truncate(0)  # of a stage that somebody took away
            took.write(f"{self.seconds[name]}\n")
        _log.info("%s: done in %.1f s", name, self.seconds[name])
        return done


@contextmanager
def alone(path: Path) -> Iterator[IO[str]]:
    """A file that no other run has open so at the time: it is waited for. A run that ends lets go of it."""
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file


def _build(done: Path, build: Callable[[Path], None]) -> float:
    """Build a directory aside and put it in its place; the seconds it took."""
    aside = done.with_name(f"{done.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    began = time.perf_counter()
    try:
        build(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    aside.rename(done)
    return round(time.perf_counter() - began, 1)


def digest_of(*parts: bytes) -> str:
    """A short digest of byte strings, for the inputs of a stage."""
    state = hashlib.blake2b(digest_size=12)
    for part in parts:
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.hexdigest()

"""Stages of a training run, each kept under a key of its inputs so that it is not run twice.

A stage's directory is written aside and renamed: one that exists is whole.
"""

import hashlib
import inspect
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

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
        sources = [self._sources[module.__name__] for module in code]
        document = json.dumps([inputs, sources], sort_keys=True, default=str)
        key = hashlib.blake2b(document.encode(), digest_size=8).hexdigest()
        done = self._root / f"{name}-{key}"
        took = self._root / f"{name}-{key}.seconds"
        if done.is_dir():
            _log.info("%s: nothing changed, kept from an earlier run", name)
            if took.is_file():
                self.seconds[name] = float(took.read_text())
            return done
        aside = self._root / f"{name}-{key}.part"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        began = time.perf_counter()
        try:
            build(aside)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        self.seconds[name] = round(time.perf_counter() - began, 1)
        took.write_text(f"{self.seconds[name]}\n")
        aside.rename(done)
        _log.info("%s: done in %.1f s", name, self.seconds[name])
        return done


def digest_of(*parts: bytes) -> str:
    """A short digest of byte strings, for the inputs of a stage."""
    state = hashlib.blake2b(digest_size=12)
    for part in parts:
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.hexdigest()

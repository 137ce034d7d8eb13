"""Stages of a training run. A stage is stored under a key of its code, settings and inputs, and reused.

A stage is written to a temporary directory that is then renamed, so an existing directory is complete. If
two runs need the same stage at once, one builds it and the other waits.
"""

import fcntl
import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Concatenate, ParamSpec

import services
import training
from training.core.import_closure import SourceTree

P = ParamSpec("P")
_log = logging.getLogger(__name__)


class Stages:
    """Stage directories under `root`, named after the stage and the key of its inputs and code.

    `seconds` maps each stage to its duration; for a reused stage, to the duration of its first run.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        # Read the sources once: an edit during a long run does not change the code that this process runs.
        self._sources = SourceTree(
            {package.__name__: _directory(package) for package in (services, training)}
        )
        self.seconds: dict[str, float] = {}
        root.mkdir(parents=True, exist_ok=True)

    def run(
        self,
        name: str,
        inputs: Any,
        entry: Callable[Concatenate[Path, P], None],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Path:
        """The directory of a stage: a stored one if `inputs` and the code are the same, else a new one.

        `entry` writes it; its arguments are the directory, `args` and `kwargs`. `inputs` (JSON) describe the
        arguments that the output depends on. The code is the import closure of the module of `entry`
        (`import_closure.py`).
        """
        document = json.dumps([inputs, self.code(entry)], sort_keys=True, default=str)
        key = hashlib.blake2b(document.encode(), digest_size=8).hexdigest()
        target = self._root / f"{name}-{key}"
        with exclusive_lock(self._root / f"{name}-{key}.seconds") as duration:
            if target.is_dir():
                _log.info("%s: unchanged, reused from an earlier run", name)
                if seconds := duration.read():
                    self.seconds[name] = float(seconds)
                return target
            self.seconds[name] = self._build(
                name, target, lambda directory: entry(directory, *args, **kwargs)
            )
            duration.truncate(0)  # the duration of a deleted stage
            duration.write(f"{self.seconds[name]}\n")
        _log.info("%s: done in %.1f s", name, self.seconds[name])
        return target

    def code(self, entry: Callable[..., None]) -> list[str]:
        """The identity of the code that `entry` runs: its name and the digest of its module's closure.

        Raises:
            ValueError: `entry` is not a function of a module in a package.
        """
        module = _module_of(entry)
        package = module.partition(".")[0]
        loaded = sys.modules.get(package)
        if loaded is not None and hasattr(loaded, "__path__"):
            self._sources.add(package, _directory(loaded))
        return [f"{module}.{entry.__qualname__}", self._sources.digest(module)]

    def _build(self, name: str, target: Path, build: Callable[[Path], None]) -> float:
        """Write the directory of stage `name` under a temporary name and rename it; return the seconds."""
        partial = target.with_name(f"{target.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        start = time.perf_counter()
        try:
            build(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        partial.rename(target)
        return round(time.perf_counter() - start, 1)


@contextmanager
def exclusive_lock(path: Path) -> Iterator[IO[str]]:
    """Open a file under an exclusive lock, after waiting for other runs. The lock ends with the process."""
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file


def _directory(package: ModuleType) -> Path:
    return Path(next(iter(package.__path__)))


def _module_of(entry: Callable[..., None]) -> str:
    """The name under which the module of a function can be imported."""
    if entry.__module__ != "__main__":
        return entry.__module__
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else entry.__module__


def digest_of(*parts: bytes) -> str:
    """A short digest of byte strings, for the inputs of a stage."""
    state = hashlib.blake2b(digest_size=12)
    for part in parts:
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.hexdigest()

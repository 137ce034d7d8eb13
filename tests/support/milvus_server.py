"""A Milvus server process that tests can stop, kill and restart."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from pymilvus import MilvusClient, MilvusException

from tests.conftest import skip_without
from tests.support.processes import free_port


class Milvus:
    """A Milvus server on loopback; acknowledged writes survive `kill`."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._port = directory, free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "milvus_lite", "server", "--data-dir", str(self._directory)]
        self._process = subprocess.Popen(
            [*command, "--port", str(self._port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while self._process.poll() is None:
            try:
                MilvusClient(self.address, timeout=1).close()
                return
            except MilvusException:
                time.sleep(0.05)
        raise AssertionError("Milvus did not start")

    def hang(self) -> None:
        """Suspend the server: it keeps its connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@contextmanager
def running_milvus(directory: Path) -> Iterator[Milvus]:
    """A Milvus server for the block."""
    if not find_spec("milvus_lite"):
        skip_without("milvus", "milvus-lite is not installed")
    milvus = Milvus(directory)
    milvus.start()
    try:
        yield milvus
    finally:
        milvus.kill()

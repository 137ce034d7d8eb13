"""Pages without RPC and store: the same requests to the same servicer, called in one process and in turn.

    python -m bench.serving.bare --bundle DIR --state DIR --requests FILE --count N --fixed-time TIME

Prints the CPU time of this process for a page in ms: searches, look-ups, features, models and rules, with the
messages between the parts, but without sockets, admission, parsing and the impression log. What is left of a
served page's CPU time beyond it is the price of the server.
"""

import argparse
import asyncio
import json
import logging
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from bench.serving.client import read_requests
from bench.serving.shops import Shop, copied_state
from services.core import gc_tuning, native_threads
from services.serving.app import App
from services.serving.settings import Settings

_WARM_UP = 60


def bare_cpu_ms(shop: Shop, folder: Path, requests: Path, count: int) -> float:
    """The CPU time of a bare page of a shop, measured in a process of its own."""
    with copied_state(shop, folder) as state:
        command = [sys.executable, "-m", "bench.serving.bare", f"--bundle={shop.bundle}", f"--state={state}"]
        command += [f"--requests={requests}", f"--count={count}", f"--fixed-time={shop.time.isoformat()}"]
        # `prepare` is too late for NumPy, which is imported above.
        environment = {"OPENBLAS_NUM_THREADS": "1", **os.environ}
        process = subprocess.run(  # noqa: S603 - our own module
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
    return float(json.loads(process.stdout.splitlines()[-1])["cpu_ms"])


async def _measured(settings: Settings, requests: list[bytes], count: int) -> float:
    app = App(settings)
    await app.start()
    try:
        assert app.gateway is not None  # noqa: S101 - the process hosts it
        messages = [pb.RecommendRequest.FromString(request) for request in requests]
        # The warm-up takes the last requests, the measurement the first, as many as there are of each.
        for message in messages[-_WARM_UP:]:
            await app.gateway.Recommend(message, None)
        start = time.process_time()
        for index in range(count):
            await app.gateway.Recommend(messages[index % len(messages)], None)
        return 1e3 * (time.process_time() - start) / count
    finally:
        await app.stop()


def main() -> None:
    """Measure what the command line says."""
    native_threads.prepare()  # as `vitrine serve` does, both
    gc_tuning.enable()
    logging.basicConfig(level=logging.WARNING)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--fixed-time", type=datetime.fromisoformat, required=True)
    options = parser.parse_args()
    settings = Settings(
        bundle=options.bundle,
        state=options.state,
        address="127.0.0.1:0",
        fixed_time=options.fixed_time,
        bundle_poll_seconds=0,
        impression_log_days=0,
    )
    cpu_ms = asyncio.run(_measured(settings, read_requests(options.requests), options.count))
    print(json.dumps({"cpu_ms": cpu_ms}))  # noqa: T201 - the answer


if __name__ == "__main__":
    main()

"""Fuzz every method of all services of a real server; fail if a request reveals a bug.

    python -m tests.fuzz --messages 20000 --seed 0

One seed always gives the same requests; `--first N --messages 1` repeats request N.
"""

import argparse
import asyncio
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from services.serving.loaded_bundle import ALL
from tests.fuzz.calls import Tally, send, tokens
from tests.fuzz.messages import Fuzzer
from tests.support.contracts import METHODS, method_name
from tests.support.prediction_models import write_prediction_models
from tests.support.processes import free_port, running_process, wait_until_serving
from tests.support.shops import UNTIL, make_bundle

_MOST_SHOWN = 40
_TRACE = re.compile(r"^Traceback.*?^\S[^\n]*$", re.MULTILINE | re.DOTALL)


def fuzz(numbers: Sequence[int], seed: int, at_once: int = 16) -> tuple[Tally, Counter[str]]:
    """Send the requests with these numbers; return their outcomes and the tracebacks of the server's log.

    Raises:
        AssertionError: the server has ended, or is not healthy at the end.
    """
    with tempfile.TemporaryDirectory() as folder:
        root, port, log = Path(folder), free_port(), Path(folder) / "log"
        clock = ["--fixed-time", (UNTIL + timedelta(hours=12)).isoformat()]
        bundle = make_bundle(root, more=write_prediction_models)

        async def run() -> Tally:
            with log.open("wb") as log_file:
                async with running_process(bundle, root / "state", port, *clock, log=log_file) as process:
                    return await _send(process, port, numbers, seed, at_once)

        tally = asyncio.run(run())
        return tally, Counter(_TRACE.findall(log.read_text(errors="replace")))


async def _send(
    process: "subprocess.Popen[bytes]", port: int, numbers: Sequence[int], seed: int, at_once: int
) -> Tally:
    target = f"127.0.0.1:{port}"
    fuzzer = Fuzzer(seed, await tokens(target))
    tally = await send(target, fuzzer, numbers, at_once)
    assert process.poll() is None, f"the server ended with {process.returncode}"
    for service in ALL:
        await wait_until_serving(port, service)
    return tally


def _table(tally: Tally) -> str:
    codes = sorted({code for _, code in tally.codes})
    width = max(len(method_name(method)) for method in METHODS)
    lines = [" ".join(["".ljust(width), *codes])]
    for method in METHODS:
        counts = (str(tally.codes[method_name(method), code]).rjust(len(code)) for code in codes)
        lines.append(" ".join([method_name(method).ljust(width), *counts]))
    return "\n".join(lines)


def main() -> int:
    """Print the table, the bugs and the tracebacks; return 1 if there is a bug."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first request")
    options = parser.parse_args()
    start = time.monotonic()
    tally, traces = fuzz(range(options.first, options.first + options.messages), options.seed)
    lines = [_table(tally), ""]
    for bug in tally.bugs[:_MOST_SHOWN]:
        lines.append(f"{bug.code} of {bug.method}, number {bug.number}: {bug.message}\n  {bug.request}")
    lines += [
        f"{count} times in the server's log:\n{trace}" for trace, count in traces.most_common(_MOST_SHOWN)
    ]
    seconds = time.monotonic() - start
    lines.append(
        f"seed {options.seed}: {tally.codes.total()} calls in {seconds:.0f} s, "
        f"{len(tally.bugs)} INTERNAL or UNKNOWN, {traces.total()} tracebacks in the log"
    )
    print("\n".join(lines))  # noqa: T201 - the output of the command
    return 1 if tally.bugs or traces else 0


if __name__ == "__main__":
    sys.exit(main())

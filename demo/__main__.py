"""`python -m demo`: from nothing to a running recommender and a tour of it.

Makes a shop, trains on it, imports its events, serves it, takes the tour, stops the server.
What an earlier run made from the same recipe and code is kept. Uses the commands that a
shop would use; knows nothing of what they do.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console

from demo import tour
from demo.shop import Recipe, add_recipe, is_current, shop_end, write_shop

_VITRINE = (sys.executable, "-m", "cli.main")
_MAX_AGE_DAYS = 7
"""A shop whose last events are older is made anew, for what is popular and new fades."""
_PORT = 50051
_START_SECONDS = 300.0
_STOP_SECONDS = 30.0


@contextmanager
def step(console: Console, title: str) -> Iterator[None]:
    """Announce a step, and at its end how long it took."""
    console.rule(f"[bold]{title}")
    start = time.perf_counter()
    yield
    console.print(f"[green]{title}: {time.perf_counter() - start:.1f} s")


def make(out: Path, recipe: Recipe, console: Console) -> None:
    """Write the shop unless it is there."""
    if is_current(out, recipe):
        console.print("kept from an earlier run")
        return
    counts = write_shop(out, recipe)
    console.print(", ".join(f"{count:,} {name}s" for name, count in counts.items()))


def vitrine(*arguments: str | Path, console: Console) -> str:
    """Run a command of vitrine, its output passed on; the last line of its stdout.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [*_VITRINE, *map(str, arguments)]
    console.print(
        "$ vitrine " + shlex.join(command[len(_VITRINE) :]), style="cyan", markup=False, soft_wrap=True
    )
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=_quiet())  # noqa: S603 - our own
    console.print(result.stdout.strip(), markup=False, highlight=False, soft_wrap=True)
    return result.stdout.strip().splitlines()[-1]


def _quiet() -> dict[str, str]:
    """The environment without bars that redraw themselves, which are of no use between other lines."""
    return os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}


@contextmanager
def served(bundle: Path, state: Path, console: Console) -> Iterator[str]:
    """The address of a server that runs as long as the block; RuntimeError when it never serves."""
    address = f"127.0.0.1:{_free_port()}"
    command = [*_VITRINE, "serve", "--bundle", str(bundle), "--state", str(state), "--address", address]
    process = subprocess.Popen(command, env=_quiet())  # noqa: S603 - our own command
    try:
        _wait_until_serving(address, process)
        console.print(f"serving at {address}")
        yield address
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    """The usual port, so that the calls shown can be repeated; another where that is taken."""
    for port in (_PORT, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise RuntimeError("no port is free")


def _wait_until_serving(address: str, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + _START_SECONDS
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < end and process.poll() is None:
            try:
                reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass
            time.sleep(0.2)
    raise RuntimeError(f"nothing serves at {address}")


def run(out: Path, recipe: Recipe, console: Console) -> None:
    """All steps, under `out`."""
    with step(console, "Make a shop"):
        make(out, recipe, console)
    with step(console, "Train"):
        # All events are before the end; naming it gives an unchanged bundle an unchanged version.
        until = f"{recipe.end:%Y-%m-%d}"
        paths = ("--data", out / "shop", "--out", out / "bundles", "--until", until)
        bundle = Path(vitrine("train", *paths, console=console))
    state = out / "state" / bundle.name
    with step(console, "Import its events"):
        vitrine("import", "--data", out / "shop", "--bundle", bundle, "--state", state, console=console)
    with step(console, "Serve and take the tour"), served(bundle, state, console) as address:
        page = tour.run(address, out / "shop", out / "tour", console)
    console.rule("[bold]Serve it again")
    for line in (
        f"vitrine serve --bundle {bundle} --state {state} --address {address}",
        f"python -m demo.tour --address {address} --data {out / 'shop'} --out {out / 'tour'}",
        f"python -m demo.measure --address {address} --data {out} --bundle {bundle}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    tour.print_next_calls(address, page, console)


def _today() -> datetime:
    return datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 130 when it was interrupted, 1 when a step failed."""
    parser = argparse.ArgumentParser(prog="python -m demo", description="A shop, a recommender, a tour.")
    parser.add_argument("--dir", type=Path, default=Path("build/demo"), help="where everything goes")
    add_recipe(parser)
    options = parser.parse_args(arguments)
    console = Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is told to stop stops its server
    until = shop_end(options.dir)
    if until is None or until < _today() - timedelta(days=_MAX_AGE_DAYS):
        until = _today()
    recipe = replace(Recipe(), seed=options.seed, items=options.items, users=options.users, end=until)
    try:
        run(options.dir, recipe, console)
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    except (subprocess.CalledProcessError, RuntimeError, grpc.RpcError) as error:
        console.print(f"[red]the demo stopped:[/red] {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What every benchmark does: run Vitrine's commands, and keep a ledger of what was ever run on test."""

import json
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEDGER = ROOT / "docs" / "test-ledger.jsonl"


def vitrine(*arguments: str) -> str:
    """Run a command of Vitrine's; what it printed."""
    command = [sys.executable, "-m", "services.cli", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own command
    return done.stdout.strip()


def record(benchmark: str, bundle: str, val: Mapping[str, float], test: Mapping[str, float]) -> None:
    """One more line of what was ever run on test: nothing is tried there in secret."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607 - the git that is there
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout.strip()
    line = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "benchmark": benchmark,
        "commit": commit,
        "bundle": Path(bundle).name,
        "val": dict(val),
        "test": dict(test),
    }
    with LEDGER.open("a") as file:
        file.write(json.dumps(line) + "\n")

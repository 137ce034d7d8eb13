"""Shared by all benchmarks: runs Vitrine's commands and keeps a ledger of all runs on test."""

import json
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEDGER = ROOT / "docs" / "test-ledger.jsonl"


def vitrine(*arguments: str) -> str:
    """Run a command of Vitrine and return its output."""
    command = [sys.executable, "-m", "cli.main", *arguments]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own command
    return process.stdout.strip()


def record(benchmark: str, bundle: str, val: Mapping[str, float], test: Mapping[str, float]) -> None:
    """Append a run on test to the ledger, so that every use of test is public."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607 - the installed git
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

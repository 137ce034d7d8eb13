"""All files use the same tool versions."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_pre_commit_and_the_environment_use_the_same_ruff() -> None:
    hook = re.search(r"ruff-pre-commit\s+rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    pin = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert hook is not None
    assert pin is not None
    assert hook[1] == pin[1]

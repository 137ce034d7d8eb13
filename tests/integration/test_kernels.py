"""Compiled loops are kept on disk for the code that they were compiled from; broken files cost only time."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disks import small_disk

ROOT = Path(__file__).parents[2]
MODULE = """
import numpy as np
from services.core.kernels import array, kernel

@kernel(array(np.int64))
def added(values):
    total = {start}
    for value in values:
        total += value
    return total

@kernel(array(np.float64))
def counted(values):
    return len(values)

hits = [sum(one.stats.cache_hits.values()) for one in (added, counted)]
print(added(np.arange(4)), min(hits))
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "code" / "loop.py"
    path.parent.mkdir()
    path.write_text(MODULE.format(start=0))
    return path


def run(module: Path, cache: Path, **more: str) -> tuple[list[int], str]:
    """The sum of a module's kernel and the number of kernels that were not compiled; the messages."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(cache), **more}
    process = subprocess.run(
        [sys.executable, module], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return [int(word) for word in process.stdout.split()], process.stderr


def test_a_second_start_compiles_nothing(module: Path, tmp_path: Path) -> None:
    assert run(module, tmp_path / "cache") == ([6, 0], "")
    assert run(module, tmp_path / "cache") == ([6, 1], "")


def test_other_code_is_compiled(module: Path, tmp_path: Path) -> None:
    run(module, tmp_path / "cache")
    before = set((tmp_path / "cache").rglob("*.nb?"))
    module.write_text(MODULE.format(start=1))
    assert run(module, tmp_path / "cache") == ([7, 0], "")
    assert before < set((tmp_path / "cache").rglob("*.nb?"))  # the files of other code stay as they are


@pytest.mark.parametrize("pattern", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("content", [b"", b"\x80\x05", b"no pickle"])
def test_a_broken_file_is_replaced(module: Path, tmp_path: Path, pattern: str, content: bytes) -> None:
    run(module, tmp_path / "cache")
    for path in (tmp_path / "cache").rglob(pattern):
        path.write_bytes(content)
    result, messages = run(module, tmp_path / "cache")
    assert result == [6, 0]
    assert "cannot be read and is compiled again" in messages
    assert run(module, tmp_path / "cache") == ([6, 1], "")


def test_a_full_disk_costs_time_and_is_said_once(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", mebibytes=1) as disk:
        module = disk.path / "loop.py"
        module.write_text(MODULE.format(start=0))
        disk.fill()
        result, messages = run(module, disk.path, HOME=str(disk.path), XDG_CACHE_HOME=str(disk.path))
    assert result == [6, 0]
    assert messages.count("compiled loops are not kept") == 1
    assert "NUMBA_CACHE_DIR" in messages


def test_a_read_only_folder_is_read(module: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", mebibytes=2) as disk:
        run(module, disk.path)
        disk.make_read_only()
        assert run(module, disk.path) == ([6, 1], "")


def test_the_command_of_the_page_for_operators_compiles_every_kernel(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    [code] = re.findall(r'`python -c "(import [^"]+)"`', page)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "protos" / "gen")])
    environment = {**os.environ, "PYTHONPATH": paths, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert len(list(tmp_path.rglob("*.nbi"))) == len(list(kernels()))


def test_a_broken_file_in_a_read_only_folder_costs_time(module: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", mebibytes=2) as disk:
        run(module, disk.path)
        for path in disk.path.rglob("*.nbi"):
            path.write_bytes(b"no pickle")
        disk.make_read_only()
        result, messages = run(module, disk.path)
    assert result == [6, 0]
    assert messages.count("compiled loops are not kept") == 1


def test_without_any_folder_that_can_be_written_one_line_says_so(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", mebibytes=1) as disk:
        module = disk.path / "loop.py"
        module.write_text(MODULE.format(start=0))
        disk.make_read_only()
        nowhere = str(disk.path / "none")
        result, messages = run(module, disk.path / "none", HOME=nowhere, XDG_CACHE_HOME=nowhere)
    assert result == [6, 0]
    assert messages.count("compiled loops are not kept") == 1


def kernels() -> Iterator[tuple[str, ast.Module, ast.FunctionDef]]:
    for path in sorted((ROOT / "services").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for function in tree.body:
            if isinstance(function, ast.FunctionDef) and any(
                isinstance(d, ast.Call) and isinstance(d.func, ast.Name) and d.func.id == "kernel"
                for d in function.decorator_list
            ):
                yield f"{path.relative_to(ROOT)}: {function.name}", tree, function


def test_a_kernel_uses_nothing_of_another_module_of_ours() -> None:
    """What is kept depends on the text of the module that has the kernel, and on no other."""
    names = []
    for name, tree, function in kernels():
        imported = {
            alias.asname or alias.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "services"
            for alias in node.names
        }
        used = {n.id for part in function.body for n in ast.walk(part) if isinstance(n, ast.Name)}
        assert not used & imported, f"{name} uses {used & imported}"
        names.append(name)
    assert len(names) > 15

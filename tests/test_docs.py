"""The calls that README and docs show are made, by the real grpcurl, as they stand there."""

import asyncio
import os
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
from vitrine.catalog.v1 import item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from tests.conftest import skip_without
from tests.recommending import Shop
from tests.shops import make_bundle

ROOT = Path(__file__).parents[1]
_ALL = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PAGES = [page for page in _ALL if "grpcurl -p" in page.read_text()]
ADDRESS = "127.0.0.1:50051"


def blocks(page: Path) -> list[str]:
    """The indented blocks of a page that call grpcurl."""
    found = re.findall(r"(?:^(?:    .*)?\n)+", page.read_text(), re.MULTILINE)
    return [textwrap.dedent(block) for block in found if "grpcurl -p" in block]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_calls_of_a_page_work_as_written(page: Path, tmp_path: Path) -> None:
    grpcurl = shutil.which("grpcurl") or shutil.which("grpcurl", path=str(Path.home() / "go/bin"))
    if grpcurl is None:
        skip_without("grpcurl", "grpcurl is not installed")
        return
    named = sorted(set(re.findall(r'"((?:a|p\d*)-?\d+)"', page.read_text())))
    path = os.pathsep.join([str(Path(grpcurl).parent), os.environ["PATH"]])

    async def body(stub: Any) -> None:
        red = item_pb2.Attribute(name="colour", texts=["red"])
        items = [item_pb2.Item(id=name, title=f"Red wool scarf {name}", attributes=[red]) for name in named]
        if items:
            await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=items))
        for block in blocks(page):
            # Docs name the service once and use it in later blocks.
            script = f"S=vitrine.gateway.v1.RecommendationService\n{block.replace(ADDRESS, stub.target)}"
            run = await asyncio.create_subprocess_exec(
                "bash", "-euc", script, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
                env=os.environ | {"PATH": path},
            )  # fmt: skip
            said, _ = await run.communicate()
            assert run.returncode == 0, f"{block}\n{said.decode()}"

    Shop(make_bundle(tmp_path), tmp_path / "state", "one", clock=None).run(body)


def test_every_test_that_a_page_names_is_there() -> None:
    named = {
        reference for page in _ALL for reference in re.findall(r"`(tests/\w+\.py::\w+)`", page.read_text())
    }
    assert named
    for reference in named:
        path, _, test = reference.partition("::")
        assert f"def {test}(" in (ROOT / path).read_text(), reference

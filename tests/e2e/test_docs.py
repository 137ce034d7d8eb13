"""The grpcurl calls of the README and the docs work as written."""

import asyncio
import os
import re
import shutil
import textwrap
from pathlib import Path

import pytest
from vitrine.catalog.v1 import item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from tests.conftest import skip_without
from tests.support.shop_server import Shop
from tests.support.shops import make_bundle

ROOT = Path(__file__).parents[2]
_ALL = (*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md")))
PAGES = [page for page in _ALL if "grpcurl -p" in page.read_text()]
ADDRESS = "127.0.0.1:50051"


def blocks(page: Path) -> list[str]:
    """The indented blocks of a page that call grpcurl."""
    paragraphs = re.findall(r"(?:^(?:    .*)?\n)+", page.read_text(), re.MULTILINE)
    return [textwrap.dedent(block) for block in paragraphs if "grpcurl -p" in block]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
async def test_the_calls_of_a_page_work_as_written(page: Path, tmp_path: Path) -> None:
    grpcurl = shutil.which("grpcurl") or shutil.which("grpcurl", path=str(Path.home() / "go/bin"))
    if grpcurl is None:
        skip_without("grpcurl", "grpcurl is not installed")
        return
    item_ids = sorted(set(re.findall(r'"((?:a|p\d*)-?\d+)"', page.read_text())))
    path = os.pathsep.join([str(Path(grpcurl).parent), os.environ["PATH"]])
    async with Shop(make_bundle(tmp_path), tmp_path / "state", "one", clock=None).serve() as stub:
        red = item_pb2.Attribute(name="colour", texts=["red"])
        items = [
            item_pb2.Item(id=name, title=f"Red wool scarf {name}", attributes=[red]) for name in item_ids
        ]
        if items:
            await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=items))
        for block in blocks(page):
            # Docs name the service once and use it in later blocks.
            script = f"S=vitrine.gateway.v1.RecommendationService\n{block.replace(ADDRESS, stub.target)}"
            run = await asyncio.create_subprocess_exec(
                "bash", "-euc", script, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
                env=os.environ | {"PATH": path},
            )  # fmt: skip
            output, _ = await run.communicate()
            assert run.returncode == 0, f"{block}\n{output.decode()}"


def test_every_test_that_a_page_names_exists() -> None:
    names = {
        reference for page in _ALL for reference in re.findall(r"`(tests/[\w/]+\.py::\w+)`", page.read_text())
    }
    assert names
    for reference in names:
        path, _, test = reference.partition("::")
        assert f"def {test}(" in (ROOT / path).read_text(), reference

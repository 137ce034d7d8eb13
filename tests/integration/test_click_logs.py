"""The public logs of news pages, read and written as shops: their counts, and nothing of the future."""

import os
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from bench.clicks.baselines import baseline_scores
from bench.clicks.logs import FOLDERS, READERS, ClickLog, Page
from bench.clicks.scoring import per_page
from bench.clicks.shops import write_shop
from bench.runs import ROOT
from tests.conftest import skip_without
from training.data.dataset import read_shop

# By the READMEs of the data: pages of training and of test; the AUC of a random and of a simple order.
PUBLISHED = {
    "mind": (4032, 968, 0.502, "category share of the history", 0.559),
    "ebnerd": (24_724, 25_356, 0.499, "click rate of the last six hours", 0.676),
}


@pytest.fixture(scope="module", params=sorted(READERS))
def log(request: pytest.FixtureRequest) -> tuple[str, ClickLog]:
    default = ROOT.parent / "shared" / "data" / "clicks"
    directory = Path(os.environ.get("VITRINE_CLICKS", default)) / FOLDERS[request.param]
    if not directory.is_dir():
        skip_without("clicks", "needs ../shared/data/clicks or VITRINE_CLICKS")
    return request.param, READERS[request.param](directory)


def _test_pages(log: ClickLog) -> list[Page]:
    period = log.periods["test"]
    return [page for page in log.pages if period.start <= page.time < period.end]


def test_pages_are_those_of_the_protocol(log: tuple[str, ClickLog]) -> None:
    name, pages = log
    before, after, *_ = PUBLISHED[name]
    held_out = _test_pages(pages)
    assert len(held_out) == pytest.approx(after, abs=3)  # of the last seconds of a day
    assert len(pages.pages) == before + after
    assert all(page.clicked and page.clicked <= set(page.shown) for page in held_out)


def test_simple_orders_have_the_published_auc(log: tuple[str, ClickLog]) -> None:
    name, pages = log
    _, _, chance, method, auc = PUBLISHED[name]
    held_out = _test_pages(pages)
    scores = baseline_scores(name, pages, pages.periods["test"], held_out)
    for key, expected in (("random", chance), (method, auc)):
        values = per_page(scores[key], held_out)["auc"]
        error = float(values.std()) / len(values) ** 0.5
        assert float(values.mean()) == pytest.approx(expected, abs=4 * error), key


def test_a_shop_knows_nothing_of_held_out_pages(log: tuple[str, ClickLog], tmp_path: Path) -> None:
    name, pages = log
    start = pages.periods["test"].start
    write_shop(name, pages, start, tmp_path)
    times = pq.read_table(tmp_path / "events.parquet", columns=["time"])["time"]
    assert pc.max(times).as_py() < start
    shop = read_shop(tmp_path)
    earlier = [page for page in pages.pages if page.time < start]
    impressions = np.count_nonzero(np.array(list(shop.settings.event_types.values()))[shop.events.kind] == 0)
    assert impressions == sum(len(page.shown) for page in earlier)

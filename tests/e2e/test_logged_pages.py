"""A shop that logs pages: its bundle has a taste model, its report judges by pages, and it is served."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from cli.main import main
from services.catalog.bundle import Bundle
from services.ranking.models.taste import read_taste
from tests.support.models import make_text_encoder

COLORS = ("red", "blue", "green", "white")
ITEMS, USERS, DAYS = 40, 120, 8
TOML = """
[items]
text_attributes = ["colour"]
[event_types]
impression = 0.0
click = 0.25
purchase = 1.0
[text]
mode = "frozen"
projection_steps = 2
[ranking]
candidates_per_query = 20
eval_queries = 20
trees = 20
ctr_epochs = 1
[task]
queries = { val = "queries.jsonl" }
"""

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each day, ten items are shown to each user, who likes some colors and clicks from the top."""
    directory = tmp_path_factory.mktemp("shop")
    random = np.random.default_rng(0)
    items = [
        {"id": f"i{n}", "title": f"thing {n}", "colour": COLORS[n % 4], "price": 5 + n} for n in range(ITEMS)
    ]
    likes = 2.0 * random.standard_normal((USERS, len(COLORS)))
    events, queries = [], []
    for day in range(1, DAYS + 1):
        for user in range(USERS):
            common = {"user_id": f"p{user}", "session_id": f"s{day}-{user}"}
            hour = f"2026-01-0{day}T{8 + user % 12:02}"
            purchases = []
            for place, n in enumerate(random.permutation(ITEMS)[:10].tolist(), 1):
                row = common | {"item_id": f"i{n}", "position": place}
                events.append(row | {"type": "impression", "time": f"{hour}:00:00Z"})
                logit = likes[user, n % 4] - 1
                if random.random() < place**-0.5 * expit(logit):
                    events.append(row | {"type": "click", "time": f"{hour}:01:00Z"})
                    if random.random() < expit(logit):
                        events.append(row | {"type": "purchase", "time": f"{hour}:02:00Z"})
                        purchases.append(f"i{n}")
            if day == DAYS and purchases:
                queries.append(
                    {"user_id": f"p{user}", "date": f"2026-01-0{DAYS}", "session": [], "targets": purchases}
                )
    for name, rows in (("items", items), ("events", events), ("queries", queries)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "shop.toml").write_text(TOML)
    return directory


@pytest.fixture(scope="module")
def bundle(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    base, out = make_text_encoder(tmp_path_factory.mktemp("base")), tmp_path_factory.mktemp("bundles")
    arguments = [f"--data={shop}", f"--out={out}", f"--until=2026-01-0{DAYS}", f"--text-base={base}"]
    assert main(["train", *arguments]) == 0
    return Bundle(out)


def test_the_bundle_has_a_taste_model(bundle: Bundle) -> None:
    directory = bundle.component("taste")
    assert directory is not None
    settings = read_taste(directory).settings
    assert settings.attributes == ("colour",)
    assert settings.variances[0] > 0.3
    assert 0 < settings.strong_slope < 3


def test_the_report_judges_by_logged_pages(bundle: Bundle) -> None:
    report = json.loads((bundle.directory / "report" / "report.json").read_text())
    pages = report["pages"]
    assert {"position alone", "whole bundle", "without taste", "without trees", "popular"} <= pages.keys()
    assert pages["whole bundle"]["gained"]["ci95"][0] > 0
    assert pages["without taste"]["lost"]["mean"] > 0
    steps = report["cumulative_ablation"]  # whose quality says nothing here
    assert steps["trees"].keys() == {"milliseconds"}
    assert steps["trees"]["milliseconds"] >= steps["counts"]["milliseconds"] > 0
    slices = report["page_slices"]
    assert sorted(slices["position"]) == ["1", "2", "3", "4-5", "6-10"]
    assert slices["user"].keys() <= {"returning", "new"}
    assert slices["user"]["returning"]["gained"]["ci95"][0] > 0
    assert sum(of["rows"] for of in slices["item"].values()) == sum(
        of["rows"] for of in slices["user"].values()
    )
    assert "## Logged pages" in (bundle.directory / "report" / "report.md").read_text()


def test_pages_show_what_the_user_likes_in_one_process_and_in_three(
    shop: Path, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--data={shop}", f"--bundle={bundle.directory}", "--split=val", f"--out={tmp_path / 'run'}"]
    assert main(["evaluate", *arguments, "--over-grpc=20"]) == 0
    assert "20 queries over gRPC to three processes: 0 pages differ" in capsys.readouterr().err
    purchases: dict[str, list[int]] = {}
    for line in (shop / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["type"] == "purchase":
            purchases.setdefault(event["user_id"], []).append(int(event["item_id"][1:]) % 4)
    shares = []
    for line in (tmp_path / "run").read_text().splitlines():
        answer = json.loads(line)
        bought = np.bincount(purchases[answer["user_id"]], minlength=4)
        if bought.sum() > 4:
            shares.append(np.mean([int(item[1:]) % 4 == bought.argmax() for item in answer["items"][:5]]))
    assert len(shares) > 10
    assert np.mean(shares) > 0.6

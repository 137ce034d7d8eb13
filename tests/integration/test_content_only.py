"""A shop without events trains and serves from item contents alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from vitrine.catalog.v1 import event_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from cli.main import main
from services.catalog.bundle import Bundle
from services.serving.app import App
from services.serving.settings import Settings
from tests.support.models import make_text_encoder

WORLDS = ("garden", "kitchen")


async def test_a_shop_without_events_trains_reports_and_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shop = tmp_path / "shop"
    shop.mkdir()
    rows = [{"id": f"{w} {n}", "title": f"{w} thing {n}", "price": 0} for w in WORLDS for n in range(12)]
    (shop / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (shop / "shop.toml").write_text(
        "[event_types]\nview = 0.2\npurchase = 1.0\n[text]\nprojection_steps = 2\n"
    )
    base = make_text_encoder(tmp_path / "base")
    arguments = [f"--data={shop}", f"--out={tmp_path / 'out'}", f"--text-base={base}"]
    assert main(["train", *arguments]) == 0
    assert "no events file: the bundle uses item contents alone" in caplog.text
    bundle = Bundle(tmp_path / "out")
    assert len(np.load(bundle.directory / "popular" / "numbers.npy")) == 0
    report = json.loads((bundle.directory / "report" / "report.json").read_text())
    assert report["shop"]["events"] == 0
    assert "no events file" in report["verdict"]["warnings"][-1]
    app = App(Settings(bundle=bundle.directory, state=tmp_path / "state", address="127.0.0.1:0"))
    await app.start()
    assert app.gateway is not None
    session = [event_pb2.SessionItem(item_id="garden 1")]
    anonymous = await app.gateway.Recommend(pb.RecommendRequest(page_size=5), None)
    viewer = await app.gateway.Recommend(pb.RecommendRequest(page_size=5, session=session), None)
    await app.stop()
    assert len(viewer.items) == 5
    assert len(anonymous.items) == 5
    assert not viewer.degraded


def test_a_possible_events_file_is_not_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "items.csv").write_text("id,title\na,hat\n")
    (tmp_path / "orders.csv").write_text("user_id,item_id,time\nu,a,2026-11-01\n")
    assert main(["inspect", f"--data={tmp_path}"]) == 1
    assert "orders.csv" in capsys.readouterr().err
    (tmp_path / "orders.csv").unlink()
    assert main(["inspect", f"--data={tmp_path}"]) == 0

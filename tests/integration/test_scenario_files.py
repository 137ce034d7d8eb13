"""An invalid file of scenarios is refused with a reason."""

from pathlib import Path

import pytest
from vitrine.catalog.v1 import filter_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.core.errors import InvalidArgument
from services.gateway.experiments.scenarios import Scenarios
from tests.support.shop_server import Shop, equals_filter, violations


async def test_a_filter_too_deep_together_with_the_scenario_is_refused(
    all_in_one: Shop, tmp_path: Path
) -> None:
    file = tmp_path / "scenarios.toml"
    file.write_text('[shelf]\nfilter = { equals = { attribute = "world", text = "kitchen" } }\n')
    deep = equals_filter("world", "kitchen")
    for _ in range(7):
        deep = filter_pb2.Filter(none_of=deep)

    async with all_in_one.serve(scenarios=file) as stub:
        await stub.Recommend(pb.RecommendRequest(filter=deep))
        for check in (True, False):
            request = pb.RecommendRequest(scenario="shelf", filter=deep, validate_only=check)
            assert await violations(stub.Recommend(request)) == ["filter"]


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (b"[home\n", "scenarios: is no TOML"),
        (b"\xff", "scenarios: is no TOML"),
        (b"home = 3\n", "scenarios.home"),
        (b"home = " + b"[" * 20_000, "scenarios: is no TOML"),
        (b"[home]\nsorces = []\n", "sorces"),
        (b'[home]\nsources = ["grave"]\n', "scenarios.home.sources: 'grave'"),
        (b"[home]\ndiversity = 2.0\n", "scenarios.home.diversity"),
        (b'[home]\ndiversity = "much"\n', "scenarios.home: Failed to parse diversity"),
        (b"[home]\nfilter = {}\n", "scenarios.home.filter: has no condition"),
        (b"[home]\nrules.caps = [{ max_count = 1 }]\n", "scenarios.home.rules.caps[0].attribute"),
        (b'[home]\nordering = "ORDERING_RANDOM"\n', "ordering"),
    ],
)
def test_an_invalid_file_is_refused_with_the_faulty_key(tmp_path: Path, content: bytes, key: str) -> None:
    file = tmp_path / "scenarios.toml"
    file.write_bytes(content)
    with pytest.raises(InvalidArgument) as caught:
        Scenarios(file)
    assert key in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="scenarios: cannot be read"):
        Scenarios(tmp_path / "nowhere.toml")

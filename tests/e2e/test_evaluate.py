"""`vitrine evaluate` measures a bundle on several days, next to simple methods, and says what is missing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli import evaluation_queries, evaluation_report
from cli.main import main
from tests.support.models import make_text_encoder

pytestmark = pytest.mark.usefixtures("single_thread")
WORLDS = ("garden", "kitchen")
TOML = """
[items]
text_attributes = ["world"]
[event_types]
view = 0.2
purchase = 1.0
[text]
mode = "frozen"
projection_steps = 0
[sequence]
epochs = 0
[task]
queries = { val = "queries.jsonl" }
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two worlds of twelve items; on each of eight days, six people buy four things of one world."""
    directory = tmp_path_factory.mktemp("shop")
    generator = np.random.default_rng(0)
    items = [{"id": f"{w}-{n:02}", "title": f"{w} thing {n}", "world": w} for w in WORLDS for n in range(12)]
    events = []
    for day in range(1, 9):
        for user in range(6):
            for n in generator.permutation(12)[:4]:
                item = f"{WORLDS[user % 2]}-{n:02}"
                row = {"user_id": f"p{user}", "item_id": item, "time": f"2026-01-0{day}T10:00"}
                events += [
                    row | {"type": "view"},
                    row | {"type": "purchase", "time": f"2026-01-0{day}T11:00"},
                ]
    for name, rows in (("items", items), ("events", events)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "shop.toml").write_text(TOML)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_encoder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def bundles(shop: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles")
    assert train(shop, base, out, "--until=2026-01-06") == 0
    return out


def train(shop: Path, base: Path, out: Path, *more: str) -> int:
    arguments = [f"--data={shop}", f"--out={out}", f"--text-base={base}", "--skip-evaluation"]
    return main(["train", *arguments, *more])


def evaluation(shop: Path, bundles: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    capsys.readouterr()
    arguments = ["evaluate", f"--data={shop}", f"--bundle={bundles}", "--over-grpc=0", "--json", *more]
    assert main(arguments) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_later_baskets_are_the_queries_and_methods_are_compared(
    shop: Path, bundles: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "run.jsonl"
    result = evaluation(shop, bundles, capsys, f"--out={out}")
    assert (result["queries"], result["days"], result["degraded"]) == (18, 3, 0)
    assert list(result["methods"]) == ["Vitrine", "popular", "popular, 7 days", "cosine", "EASE"]
    for name, figures in result["methods"].items():
        low, high = figures["recall"]["ci95"]
        assert 0 <= low <= figures["recall"]["mean"] <= high <= 1, name
    # A user stays in one world of twelve items: a page of twenty holds them all.
    assert result["methods"]["Vitrine"]["recall"]["mean"] == 1
    assert result["methods"]["cosine"]["hit"]["mean"] == 1
    assert len(out.read_text().splitlines()) == 18


def test_what_is_left_out_is_said(
    shop: Path, bundles: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluation(shop, bundles, capsys)["notes"] == []
    monkeypatch.setattr(evaluation_queries, "_MAX_DAYS", 2)
    monkeypatch.setattr(evaluation_queries, "MAX_SESSION", 1)
    monkeypatch.setattr(evaluation_report, "MAX_EASE_ITEMS", 5)
    row = {"user_id": "p0", "date": "2026-01-06", "session": ["garden-00"], "targets": ["garden-05", "gone"]}
    (shop / "queries.jsonl").write_text(json.dumps(row) + "\n")
    sampled, cut, ease = evaluation(shop, bundles, capsys, "--limit=7")["notes"]
    assert sampled == "a random sample: 7 of 18 baskets, from 2 of 3 days"
    assert cut.startswith("7 sessions cut to the last 1 items")
    assert ease.startswith("no EASE: 24 items have events")
    unknown, _ = evaluation(shop, bundles, capsys, "--split=val")["notes"]
    assert unknown == "1 target not in the catalog: no method can find them"


def test_a_table_is_printed_for_people(shop: Path, bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", f"--data={shop}", f"--bundle={bundles}", "--over-grpc=3", "--limit=9"]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0].startswith("9 queries of ")
    assert lines[1].split() == ["recall@20", "nDCG@20", "hit@20", "Vitrine", "gains,", "nDCG"]
    assert [line.split("  ")[0] for line in lines[2:7]] == [
        "Vitrine",
        "popular",
        "popular, 7 days",
        "cosine",
        "EASE",
    ]
    assert "3 queries over gRPC to three processes: 0 pages differ" in output.err


def test_a_file_of_queries_may_have_days_types_and_exclusions(
    shop: Path, bundles: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    session = ["garden-00", {"item_id": "garden-01", "type": "view"}]
    rows = [
        {"user_id": "p0", "date": f"2026-01-0{day}", "session": session, "targets": ["garden-05"]}
        | {"excluded_item_ids": ["garden-07", "garden-08"]}
        for day in (6, 8)
    ]
    (shop / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run.jsonl"
    result = evaluation(shop, bundles, capsys, "--split=val", f"--out={out}")
    assert (result["queries"], result["days"]) == (2, 2)
    answers = [json.loads(line)["items"] for line in out.read_text().splitlines()]
    hidden = {"garden-00", "garden-01", "garden-07", "garden-08"}
    for answer in answers:
        assert not hidden & set(answer)
    hits = ["garden-05" in answer for answer in answers]
    assert result["methods"]["Vitrine"]["hit"]["mean"] == np.mean(hits) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", "line 1: Expecting value"),
        ('{"user_id": "p0", "date": "2026-01-06"}', "line 1: 'targets' is missing"),
        ('{"user_id": "p0", "date": "soon", "targets": ["a"]}', "line 1: Invalid isoformat string: 'soon'"),
        ("[1]", "line 1: "),
        ("", "holds no query"),
    ],
)
def test_a_wrong_line_of_queries_is_named(
    shop: Path, bundles: Path, capsys: pytest.CaptureFixture[str], line: str, words: str
) -> None:
    (shop / "queries.jsonl").write_text(line)
    assert main(["evaluate", f"--data={shop}", f"--bundle={bundles}", "--split=val"]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert '"targets": ["i2"]' in error


def test_what_cannot_be_evaluated_comes_with_a_cure(
    shop: Path, base: Path, bundles: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert train(shop, base, tmp_path / "all") == 0
    assert main(["evaluate", f"--data={shop}", f"--bundle={tmp_path / 'all'}"]) == 1
    assert "train again with --until DAY" in capsys.readouterr().err
    (shop / "queries.jsonl").unlink(missing_ok=True)
    assert main(["evaluate", f"--data={shop}", f"--bundle={bundles}", "--split=val"]) == 1
    assert (
        "queries.jsonl, which shop.toml names under task.queries, does not exist" in capsys.readouterr().err
    )
    assert main(["evaluate", f"--data={shop}", f"--bundle={bundles}", "--split=test"]) == 1
    assert "leave out --split" in capsys.readouterr().err
    assert main(["evaluate", f"--data={tmp_path / 'none'}", f"--bundle={bundles}"]) == 1
    assert f"{tmp_path / 'none'} does not exist" in capsys.readouterr().err

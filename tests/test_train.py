"""From a shop directory to answered queries: train, import, evaluate, as a user runs them."""

import hashlib
import json
import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from services.bundle import MANIFEST, SCHEMA, Bundle, publish
from services.catalog import item_text
from services.cli import main
from services.embedding.encoders import TextEncoder
from services.errors import FailedPrecondition
from services.ranking.propensity import Propensity
from services.replay import Page, alike
from tests.models import make_text_encoder
from training import propensity, rankers, replay
from training.dataset import read_shop
from training.stages import Stages

WORLDS = ("garden", "kitchen")
TOML = """
[items]
text_attributes = ["world"]
filter_only = ["sold"]
[time]
granularity = "day"
[text]
mode = "frozen"
head_steps = 2
[ranking]
candidates = 30
judged = 5
trees = 40
ctr_epochs = 1
[task]
queries = { val = "queries.jsonl" }
filter = { _sold = "true" }
"""


@pytest.fixture(scope="module", autouse=True)
def head() -> Iterator[None]:
    """Every bundle here has a CTR head: so few baskets would not tell that it helps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rankers, "earns", lambda *lists, **more: True)
        yield


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two worlds of twelve items; on each of five days, ten people buy four things of one world."""
    directory = tmp_path_factory.mktemp("shop")
    generator = np.random.default_rng(0)
    items = [
        {
            "id": f"{w}-{n:02}",
            "title": f"{w} thing {n}",
            "world": w,
            "sold": n < 11,
            "family_id": f"{w}{n // 2}",
        }
        for w in WORLDS
        for n in range(12)
    ]
    events, queries = [], []
    for day in range(1, 7):
        for person in range(10):
            world = WORLDS[person % 2]
            bought = [f"{world}-{n:02}" for n in generator.permutation(11)[:4]]
            if day == 6:
                query = {"user_id": f"p{person}", "date": "2026-01-06", "session": bought[:2]}
                queries.append(query | {"targets": bought[2:]})
            for item in bought:
                events.append(
                    {"user_id": f"p{person}", "item_id": item, "time": f"2026-01-0{day}", "price": 2}
                )
    for name, rows in (("items", items), ("events", events), ("queries", queries)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "shop.toml").write_text(TOML)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_encoder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def bundles(shop: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("bundles")
    assert train(shop, base, out, "2026-01-06") == 0
    yield out


def train(shop: Path, base: Path, out: Path, until: str, *more: str) -> int:
    asked = [f"--data={shop}", f"--out={out}", f"--until={until}", f"--text-base={base}"]
    return main(["train", *asked, *more])


def evaluate(shop: Path, bundles: Path, out: Path, *more: str) -> int:
    return main(["evaluate", f"--data={shop}", f"--bundle={bundles}", "--split=val", f"--out={out}", *more])


def test_queries_are_answered_alike_in_any_order_and_by_three_processes(
    shop: Path, bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(shop, bundles, tmp_path / "run.jsonl", "--over-grpc=5") == 0
    printed = capsys.readouterr().out
    assert "5 queries over gRPC to three processes: 0 lists differ" in printed
    summary = json.loads(printed[: printed.index("}\n5") + 1])
    assert summary["degraded"] == 0
    assert summary["targets_among_candidates"] == 1
    assert {"graph", "popular", "family", "text"} <= summary["candidates_per_query"].keys()
    assert evaluate(shop, bundles, tmp_path / "reverse.jsonl", "--reverse", "--over-grpc=0") == 0
    assert (tmp_path / "run.jsonl").read_bytes() == (tmp_path / "reverse.jsonl").read_bytes()
    for line in (tmp_path / "run.jsonl").read_text().splitlines():
        answer = json.loads(line)
        world = WORLDS[int(answer["user_id"][1:]) % 2]
        assert len(answer["items"]) == 20
        assert all(item.startswith(world) for item in answer["items"][:9])
        assert not any(item.endswith("-11") for item in answer["items"])  # never sold: the filter holds


def test_without_a_judgement_the_same_is_learned_and_one_may_follow(
    shop: Path, base: Path, bundles: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundles / ".stages", tmp_path / ".stages")
    assert train(shop, base, tmp_path, "2026-01-06", "--unjudged") == 0
    judged, plain = (Bundle(directory).directory for directory in (bundles, tmp_path))
    for part in ("ctr", "reranker", "sequence", "graph"):
        mine, other = ({p.name: p.read_bytes() for p in (at / part).iterdir()} for at in (judged, plain))
        assert mine == other, part
    told = [json.loads((at / "report" / "report.json").read_text()) for at in (judged, plain)]
    assert [("ablation" in report) for report in told] == [True, False]
    assert told[1]["stages"].keys() == told[0]["stages"].keys()
    kept = told[0]["stages"].keys() - {"ranking"}
    assert all(told[1]["stages"][name] == told[0]["stages"][name] for name in kept)
    assert told[1]["made"]["settings"]["text.mode"] == "frozen"
    assert [report["made"]["settings"]["ranking.judged"] for report in told] == [5, 0]
    for more, expected in (((), True), (("--unjudged",), True)):  # none takes a judgement back
        assert train(shop, base, tmp_path, "2026-01-06", *more) == 0
        assert Bundle(tmp_path).directory == plain
        assert ("ablation" in json.loads((plain / "report" / "report.json").read_text())) is expected


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ([("a", 3.0), ("b", 2.0), ("c", 1.0)], True),
        ([("a", 3.0), ("c", 2.0), ("b", 1.0)], False),
        ([("a", 3.0), ("b", 2.0)], False),
        ([("a", 3.0), ("b", 2.0), ("d", 1.0005)], True),  # as good as the last
        ([("a", 3.0), ("d", 2.0), ("b", 1.9995)], False),  # moved down by one better than it
        ([("a", 3.0), ("b", 2.1), ("c", 1.0)], False),
        ([("d", 3.0), ("b", 2.0), ("c", 1.0)], False),
    ],
)
def test_lists_are_alike_but_for_what_is_as_good_as_equal(other: Page, same: bool) -> None:
    one = [("a", 3.0), ("b", 2.0), ("c", 1.0)]
    assert alike(one, other) is same
    assert alike(other, one) is same


def test_an_evaluation_that_is_told_to_stop_leaves_no_process(
    shop: Path, bundles: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "services.cli", "evaluate", f"--data={shop}", f"--bundle={bundles}"]
    with subprocess.Popen([*command, "--split=val", f"--out={tmp_path / 'run.jsonl'}"]) as process:
        waiting = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        started: list[str] = []
        while len(started) < 3 and process.poll() is None:
            started = waiting.read_text().split()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
    assert len(started) == 3
    assert not any(Path(f"/proc/{child}").exists() for child in started)


def test_a_bundle_that_saw_the_day_is_refused(shop: Path, base: Path, tmp_path: Path) -> None:
    assert train(shop, base, tmp_path / "late", "2026-01-07") == 0
    assert evaluate(shop, tmp_path / "late", tmp_path / "run.jsonl") == 1
    assert not (tmp_path / "run.jsonl").exists()


def test_a_second_run_takes_over_what_the_first_finished(
    shop: Path, base: Path, bundles: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = sorted(path.name for path in bundles.iterdir())
    with caplog.at_level(logging.INFO):
        assert train(shop, base, bundles, "2026-01-06") == 0
    kept = [r.getMessage() for r in caplog.records if "kept from an earlier run" in r.getMessage()]
    behaviour = ["text-head-before", "text-head", "text-encoder", "graph", "sequence"]
    behaviour += ["ranking", "propensity"]
    assert [message.split(":")[0] for message in kept] == ["text", "text-vectors", *behaviour]
    assert sorted(path.name for path in bundles.iterdir() if path.name != ".staged") == before
    with caplog.at_level(logging.INFO):
        caplog.clear()
        assert train(shop, base, bundles, "2026-01-05") == 0
    done = [r.getMessage().split(":")[0] for r in caplog.records if ": done in" in r.getMessage()]
    assert done == behaviour  # fewer events, the same texts


def test_the_report_takes_every_part_away_and_adds_it_again(bundles: Path) -> None:
    report = json.loads((Bundle(bundles).directory / "report" / "report.json").read_text())
    parts = ["graph", "words", "text", "sequence", "ctr", "trees"]
    assert sorted(report["ablation"]) == sorted([*parts, "reranker"])
    assert sorted(report["ladder"]) == sorted(["counts", *parts])
    whole, last = report["ranking"]["whole bundle"], report["ladder"]["trees"]
    assert last["recall"]["mean"] == whole["recall"]["mean"]
    assert last["milliseconds"] >= report["ladder"]["counts"]["milliseconds"] > 0
    lost = report["ablation"]["trees"]
    assert lost["ndcg"]["mean"] + lost["ndcg_difference"]["mean"] == pytest.approx(
        whole["ndcg"]["mean"], abs=2e-5
    )


def test_who_buys_soon_is_published_where_it_is_worth_it_and_read_when_served(
    shop: Path, base: Path, bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = json.loads((Bundle(bundles).directory / "report" / "report.json").read_text())
    assert report["propensity"]["7 days"] == {"kept": False, "why": "the events are of too few days"}
    assert Bundle(bundles).component("propensity") is None
    shutil.copytree(bundles / ".stages", tmp_path / ".stages")
    (tmp_path / "more.toml").write_text("[propensity]\ndays = [1]\n")
    # So few people, who all buy every day, would not tell that it helps.
    monkeypatch.setattr(propensity, "_LEAST", 0)
    monkeypatch.setattr(propensity, "judge", lambda *found: {"kept": True})
    assert train(shop, base, tmp_path, "2026-01-06", f"--training={tmp_path / 'more.toml'}") == 0
    bundle = Bundle(tmp_path)
    written = bundle.component("propensity")
    assert written is not None
    chances = Propensity(written, list(bundle.profile.event_types))
    state = replay.state_of(read_shop(shop))
    mine = state.everything("p3", "", 2**60, 1000)
    assert chances.of(mine, np.array([0]), int(mine.occurred[0]) + 1)[1] > 0.9
    assert "ranking" in json.loads((bundle.directory / "report" / "report.json").read_text())["stages"]


def test_the_same_content_in_another_schema_is_another_bundle(
    bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle(bundles)
    found = []
    for schema in (SCHEMA - 1, SCHEMA, SCHEMA):
        monkeypatch.setattr("services.bundle.SCHEMA", schema)
        shutil.copytree(bundle.directory, tmp_path / "staged")
        (tmp_path / "staged" / MANIFEST).unlink()
        found.append(publish(tmp_path / "staged", tmp_path / "bundles", bundle.profile, bundle.until))
        shutil.rmtree(tmp_path / "staged", ignore_errors=True)
    assert found[0] != found[1] == found[2]
    assert found[1].name == bundle.directory.name
    with pytest.raises(FailedPrecondition, match="schema"):
        Bundle(found[0])
    assert Bundle(found[1]).version == bundle.version


def test_a_later_report_replaces_one_that_an_older_manifest_lists(bundles: Path, tmp_path: Path) -> None:
    bundle = Bundle(bundles)
    target = tmp_path / "bundles" / bundle.version
    shutil.copytree(bundle.directory, target)
    manifest = json.loads((target / MANIFEST).read_text())
    page = target / "report" / "report.md"
    manifest["files"]["report/report.md"] = hashlib.sha256(page.read_bytes()).hexdigest()
    (target / MANIFEST).write_text(json.dumps(manifest))
    for report, expected in ((False, page.read_text()), (True, "later")):
        staged = tmp_path / "staged"
        shutil.copytree(bundle.directory, staged)
        (staged / MANIFEST).unlink()
        (staged / "report" / "report.md").write_text("later")
        assert publish(staged, target.parent, bundle.profile, bundle.until, report=report) == target
        assert Bundle(target).version == bundle.version
        assert page.read_text() == expected
        shutil.rmtree(staged)


def test_a_changed_file_is_found_out(bundles: Path) -> None:
    bundle = Bundle(bundles)
    victim = bundle.directory / "popular" / "numbers.npy"
    data = victim.read_bytes()
    victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        with pytest.raises(FailedPrecondition, match=r"popular/numbers.npy is not the file"):
            Bundle(bundles)
    finally:
        victim.write_bytes(data)


def test_events_are_imported_once(
    shop: Path, bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["import", f"--data={shop}", f"--bundle={bundles}", f"--state={tmp_path}"]
    assert [main(command), main(command)] == [0, 0]
    assert capsys.readouterr().out.splitlines() == ["240 events imported", "0 events imported"]


def test_a_stage_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    stages = Stages(tmp_path)

    def broken(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run("s", [1], [], broken)
    assert not any(path.is_dir() for path in tmp_path.iterdir())
    whole = stages.run("s", [1], [], lambda d: None)
    assert list(whole.iterdir()) == []
    assert stages.run("s", [1], [], broken) == whole
    assert not (whole / MANIFEST).exists()


def test_of_two_runs_that_need_a_stage_one_makes_it(tmp_path: Path) -> None:
    made, begun = [], threading.Event()

    def build(directory: Path) -> None:
        begun.set()
        time.sleep(0.2)  # the other has come to the lock meanwhile
        (directory / "whole").write_text("x")
        made.append(directory)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(Stages(tmp_path).run, "s", [1], [], build)
        begun.wait()
        other = pool.submit(Stages(tmp_path).run, "s", [1], [], build)
        assert one.result() == other.result()
    assert len(made) == 1
    shutil.rmtree(one.result())
    for again in (Stages(tmp_path), Stages(tmp_path)):  # made once more, and kept
        again.run("s", [1], [], build)
        assert again.seconds["s"] >= 0.2
    assert len(made) == 2
    assert (one.result() / "whole").read_text() == "x"


def test_a_shop_may_ask_for_texts_in_eight_bits(shop: Path, base: Path, tmp_path: Path) -> None:
    asked = tmp_path / "shop.toml"
    asked.write_text(TOML.replace("[text]", '[text]\nprecision = "int8"'))
    out = tmp_path / "bundles"
    command = [sys.executable, "-m", "services.cli", "train", f"--data={shop}", f"--out={out}", "--unjudged"]
    subprocess.run(
        [*command, "--until=2026-01-06", f"--text-base={base}", f"--shop={asked}"], check=True
    )  # in a process that has not loaded what only this setting needs
    bundle = Bundle(out)
    directory, catalogue = bundle.component("text"), bundle.catalogue()
    assert directory is not None
    encoder = TextEncoder(directory)
    assert encoder.settings.precision == "int8"
    vectors = encoder.encode([item_text(item) for item in catalogue.items]).vectors
    np.testing.assert_allclose(catalogue.vectors["text"], vectors, atol=1e-3)
    assert evaluate(shop, out, tmp_path / "answers", f"--shop={asked}") == 0


def test_two_trainings_into_one_directory_both_publish(shop: Path, base: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "services.cli", "train", f"--data={shop}", f"--out={tmp_path}"]
    days = ("2026-01-05", "2026-01-06", "2026-01-06")
    running = [
        subprocess.Popen(
            [*command, f"--text-base={base}", f"--until={day}"], stdout=subprocess.PIPE, text=True
        )
        for day in days
    ]
    answers = [process.communicate()[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert answers[1] == answers[2] != answers[0]
    for answer, day in zip(answers, days, strict=True):
        assert str(Bundle(Path(answer)).until).startswith(day)
    assert not list((tmp_path / ".stages").glob("*.part"))

"""Training, import and evaluation work from a shop directory to answered queries."""

import hashlib
import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cli.evaluate import equivalent
from cli.evaluation_report import Page
from cli.main import main
from services.catalog.bundle import MANIFEST, SCHEMA, Bundle, publish
from services.catalog.items import item_text
from services.core.errors import FailedPrecondition
from services.embedding.encoders.encoders import TextEncoder
from services.ranking.models.propensity import Propensity
from tests.support.models import make_text_encoder
from tests.support.shops import make_bundle
from training.core.decisions import Decision
from training.data.dataset import read_shop
from training.examples import shop_state
from training.ranking import fit_models, propensity

WORLDS = ("garden", "kitchen")
TOML = """
[items]
text_attributes = ["world"]
filter_only = ["sold"]
[time]
granularity = "day"
[text]
mode = "frozen"
projection_steps = 2
[ranking]
ranking_days = 2
candidates_per_query = 30
eval_queries = 5
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
        accepted = Decision("the head", "none", "of nDCG", accepted=True, queries=1000, gain=None)
        patch.setattr(fit_models, "head_decision", lambda *_: accepted)
        patch.setattr(fit_models, "thin_head", lambda *_: None)
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
        for user in range(10):
            world = WORLDS[user % 2]
            purchases = [f"{world}-{n:02}" for n in generator.permutation(11)[:4]]
            if day == 6:
                query = {"user_id": f"p{user}", "date": "2026-01-06", "session": purchases[:2]}
                queries.append(query | {"targets": purchases[2:]})
            for item in purchases:
                events.append({"user_id": f"p{user}", "item_id": item, "time": f"2026-01-0{day}", "price": 2})
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
    arguments = [f"--data={shop}", f"--out={out}", f"--until={until}", f"--text-base={base}"]
    return main(["train", *arguments, *more])


def evaluate(shop: Path, bundles: Path, out: Path, *more: str) -> int:
    return main(["evaluate", f"--data={shop}", f"--bundle={bundles}", "--split=val", f"--out={out}", *more])


def test_training_prints_only_lines_of_vitrine(shop: Path, base: Path, tmp_path: Path) -> None:
    flags = [
        f"--data={shop}",
        f"--out={tmp_path}",
        "--until=2026-01-06",
        f"--text-base={base}",
        "--skip-evaluation",
    ]
    program = (
        "import sys; from cli.main import main; code = main(sys.argv[1:]); "
        "sys.exit('a compiler was loaded' if sys.modules.get('triton') else code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "train", *flags], check=False, capture_output=True, text=True
    )
    lines = result.stderr.splitlines()
    assert result.returncode == 0, result.stderr
    assert lines
    *log, data, texts, ranking, quality, following = lines
    assert not [line for line in log if " training." not in line and " services." not in line]
    words = [line.split(maxsplit=1)[0] for line in (data, texts, ranking, quality, following)]
    assert words == ["Data:", "Texts", "Ranking:", "Quality:", "Next:"]
    assert result.stdout.splitlines() == [str(next(tmp_path.glob("2026*")))]


def test_answers_do_not_depend_on_order_or_layout(
    shop: Path, bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(shop, bundles, tmp_path / "run.jsonl", "--json", "--over-grpc=5") == 0
    output = capsys.readouterr()
    assert "5 queries over gRPC to three processes: 0 pages differ" in output.err
    summary = json.loads(output.out)
    assert summary["degraded"] == 0
    assert summary["targets_among_candidates"] == 1
    assert {"co_occurrence", "popular", "variants", "text"} <= summary["candidates_per_query"].keys()
    assert evaluate(shop, bundles, tmp_path / "reverse.jsonl", "--reverse", "--over-grpc=0") == 0
    assert (tmp_path / "run.jsonl").read_bytes() == (tmp_path / "reverse.jsonl").read_bytes()
    for line in (tmp_path / "run.jsonl").read_text().splitlines():
        answer = json.loads(line)
        world = WORLDS[int(answer["user_id"][1:]) % 2]
        assert len(answer["items"]) == 20
        assert all(item.startswith(world) for item in answer["items"][:9])
        assert not any(item.endswith("-11") for item in answer["items"])  # never sold: the filter holds


def test_training_without_evaluation_learns_the_same_models(
    shop: Path, base: Path, bundles: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundles / ".stages", tmp_path / ".stages")
    assert train(shop, base, tmp_path, "2026-01-06", "--skip-evaluation") == 0
    judged, plain = (Bundle(directory).directory for directory in (bundles, tmp_path))
    for part in ("ctr", "reranker", "sequence", "graph"):
        files, other_files = (
            {p.name: p.read_bytes() for p in (at / part).iterdir()} for at in (judged, plain)
        )
        assert files == other_files, part
    reports = [json.loads((at / "report" / "report.json").read_text()) for at in (judged, plain)]
    assert [("ablation" in report) for report in reports] == [True, False]
    assert reports[1]["stages"].keys() == reports[0]["stages"].keys()
    stages = reports[0]["stages"].keys() - {"ranking"}
    assert all(reports[1]["stages"][name] == reports[0]["stages"][name] for name in stages)
    assert reports[1]["provenance"]["settings"]["text.mode"] == "frozen"
    assert [report["provenance"]["settings"]["ranking.eval_queries"] for report in reports] == [5, 0]
    for more, expected in (((), True), (("--skip-evaluation",), True)):  # none takes a judgement back
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
def test_lists_are_equal_except_for_near_ties(other: Page, same: bool) -> None:
    one = [("a", 3.0), ("b", 2.0), ("c", 1.0)]
    assert equivalent(one, other) is same
    assert equivalent(other, one) is same


def test_a_stopped_evaluation_leaves_no_process(shop: Path, bundles: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli.main", "evaluate", f"--data={shop}", f"--bundle={bundles}"]
    with subprocess.Popen([*command, "--split=val", f"--out={tmp_path / 'run.jsonl'}"]) as process:
        waiting = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        starts: list[str] = []
        while len(starts) < 3 and process.poll() is None:
            starts = waiting.read_text().split()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
    assert len(starts) == 3
    assert not any(Path(f"/proc/{child}").exists() for child in starts)


def test_a_bundle_trained_on_the_evaluation_day_is_refused(shop: Path, base: Path, tmp_path: Path) -> None:
    assert train(shop, base, tmp_path / "late", "2026-01-07") == 0
    assert evaluate(shop, tmp_path / "late", tmp_path / "run.jsonl") == 1
    assert not (tmp_path / "run.jsonl").exists()


def test_a_second_run_reuses_the_finished_stages(
    shop: Path, base: Path, bundles: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = sorted(path.name for path in bundles.iterdir())
    with caplog.at_level(logging.INFO):
        assert train(shop, base, bundles, "2026-01-06") == 0
    reuse_lines = [r.getMessage() for r in caplog.records if "reused from an earlier run" in r.getMessage()]
    event_stages = [
        "text-head-before",
        "text-head",
        "text-encoder",
        "text-frozen-vectors",
        "graph",
        "sequence",
    ]
    event_stages += ["taste", "ranking", "propensity"]
    assert [message.split(":")[0] for message in reuse_lines] == [
        "text-frozen",
        "text-vectors",
        *event_stages,
    ]
    assert sorted(path.name for path in bundles.iterdir() if path.name != ".staged") == before
    with caplog.at_level(logging.INFO):
        caplog.clear()
        assert train(shop, base, bundles, "2026-01-05") == 0
    stages = [r.getMessage().split(":")[0] for r in caplog.records if ": done in" in r.getMessage()]
    assert stages == event_stages  # fewer events, the same texts


def test_the_report_ablates_every_part(bundles: Path) -> None:
    report = json.loads((Bundle(bundles).directory / "report" / "report.json").read_text())
    recalls = report["candidates"]["index_recall"]
    assert {name: recall["recall"] for name, recall in recalls.items()} == dict.fromkeys(recalls, 1.0)
    assert {"title_keywords", "sequence"} <= recalls.keys()
    parts = ["graph", "words", "text", "sequence", "ctr", "trees"]
    assert sorted(report["ablation"]) == sorted([*parts, "reranker"])
    assert sorted(report["cumulative_ablation"]) == sorted(["counts", *parts])
    whole, last = report["ranking"]["whole bundle"], report["cumulative_ablation"]["trees"]
    assert last["recall"]["mean"] == whole["recall"]["mean"]
    assert last["milliseconds"] >= report["cumulative_ablation"]["counts"]["milliseconds"] > 0
    lost = report["ablation"]["trees"]
    assert lost["ndcg"]["mean"] + lost["ndcg_difference"]["mean"] == pytest.approx(
        whole["ndcg"]["mean"], abs=2e-5
    )


def test_a_useful_propensity_model_is_published_and_served(
    shop: Path, base: Path, bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = json.loads((Bundle(bundles).directory / "report" / "report.json").read_text())
    assert report["propensity"]["7 days"] == {"published": False, "reason": "the events cover too few days"}
    assert Bundle(bundles).component("propensity") is None
    shutil.copytree(bundles / ".stages", tmp_path / ".stages")
    (tmp_path / "more.toml").write_text("[propensity]\ndays = [1]\n")
    # So few people, who all buy every day, would not tell that it helps.
    monkeypatch.setattr(propensity, "_MIN_PURCHASES", 0)
    monkeypatch.setattr(propensity, "evaluate", lambda *_: {"published": True})
    assert train(shop, base, tmp_path, "2026-01-06", f"--training-config={tmp_path / 'more.toml'}") == 0
    bundle = Bundle(tmp_path)
    directory = bundle.component("propensity")
    assert directory is not None
    chances = Propensity(directory, list(bundle.profile.event_types))
    state = shop_state.state_of(read_shop(shop))
    events = state.everything("p3", "", 2**60, 1000)
    assert chances.of(events, np.array([0]), int(events.occurred[0]) + 1)[1] > 0.9
    assert "ranking" in json.loads((bundle.directory / "report" / "report.json").read_text())["stages"]


def test_equal_content_in_another_schema_is_another_bundle(
    bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle(bundles)
    versions: list[Path] = []
    for schema in (SCHEMA - 1, SCHEMA, SCHEMA):
        monkeypatch.setattr("services.catalog.bundle.SCHEMA", schema)
        shutil.copytree(bundle.directory, tmp_path / "staged")
        (tmp_path / "staged" / MANIFEST).unlink()
        versions.append(publish(tmp_path / "staged", tmp_path / "bundles", bundle.profile, bundle.until))
        shutil.rmtree(tmp_path / "staged", ignore_errors=True)
    assert versions[0] != versions[1] == versions[2]
    assert versions[1].name.partition("-")[2] == bundle.directory.name.partition("-")[2]
    with pytest.raises(FailedPrecondition, match="schema"):
        Bundle(versions[0])
    assert Bundle(versions[1]).version == versions[1].name


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


def test_a_changed_bundle_file_is_detected(bundles: Path) -> None:
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
    output = capsys.readouterr()
    assert output.out.splitlines() == ["240 events imported", "0 events imported"]
    assert "240 events skipped: their ids exist already" in output.err


def test_an_import_reports_refused_events(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_bundle(tmp_path, event_types={"wishlist": 0.5})
    command = ["import", f"--data={shop}", f"--bundle={other}", f"--state={tmp_path / 'state'}"]
    assert main(command) == 1
    output = capsys.readouterr()
    assert output.out == "0 events imported\n"
    for text in ("240 events refused, such as:", "type: is none of wishlist", "no event could be imported"):
        assert text in output.err


def test_a_shop_can_use_an_int8_text_encoder(shop: Path, base: Path, tmp_path: Path) -> None:
    shop_file = tmp_path / "shop.toml"
    shop_file.write_text(TOML.replace("[text]", '[text]\nprecision = "int8"'))
    out = tmp_path / "bundles"
    command = [
        sys.executable,
        "-m",
        "cli.main",
        "train",
        f"--data={shop}",
        f"--out={out}",
        "--skip-evaluation",
    ]
    subprocess.run(
        [*command, "--until=2026-01-06", f"--text-base={base}", f"--shop={shop_file}"], check=True
    )  # in a process that has not loaded what only this setting needs
    bundle = Bundle(out)
    directory, catalog = bundle.component("text"), bundle.catalog()
    assert directory is not None
    encoder = TextEncoder(directory)
    assert encoder.settings.precision == "int8"
    vectors = encoder.encode([item_text(item) for item in catalog.items]).vectors
    np.testing.assert_allclose(catalog.vectors["text"], vectors, atol=1e-3)
    assert evaluate(shop, out, tmp_path / "answers", f"--shop={shop_file}") == 0


def test_two_trainings_into_one_directory_both_publish(shop: Path, base: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli.main", "train", f"--data={shop}", f"--out={tmp_path}"]
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


def test_the_newest_bundle_is_the_one_made_last(
    shop: Path, base: Path, bundles: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundles / ".stages", tmp_path / ".stages")
    bundle_of_run = []
    for until in ("2026-01-06", "2026-01-05", "2026-01-05"):
        assert train(shop, base, tmp_path, until, "--skip-evaluation") == 0
        bundle_of_run.append(Bundle(tmp_path))
    assert [bundle.until.day for bundle in bundle_of_run if bundle.until] == [6, 5, 5]
    assert bundle_of_run[1].version == bundle_of_run[2].version  # the same content as that of the newest
    assert train(shop, base, tmp_path, "2026-01-06", "--skip-evaluation") == 0
    last = Bundle(tmp_path)
    assert last.until == bundle_of_run[0].until
    assert last.version > bundle_of_run[2].version > bundle_of_run[0].version

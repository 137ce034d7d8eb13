"""A training report has a JSON file, a page and charts."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.core.metrics import (
    BANDS,
    classification_metrics,
    interval,
    paired_interval,
    ranking_metrics,
    recall_by_count,
)
from training.evaluation.report import write_report

CHARTS = {
    "ranking": "recall_by_band.png",
    "page_slices": "page_gain.png",
    "ablation": "ablation.png",
    "cold_start": "cold_start.png",
    "ctr": "reliability.png",
    "reranker": "importance.png",
}


def ranking_of(quality: float) -> dict[str, Any]:
    """A ranking whose targets, of four bands in turn, are found the more often the better it is."""
    generator = np.random.default_rng(4)
    targets = [np.array([query % 40]) for query in range(400)]
    pages = []
    for target in targets:
        page = 40 + generator.permutation(60)[:20]
        if generator.random() < quality / (1 + target[0] // 10):
            page[generator.integers(0, 20)] = target[0]
        pages.append(page)
    bands = {item: BANDS[item // 10] for item in range(40)}
    return ranking_metrics(pages, targets, bands=bands, warm=generator.random(400) < 0.2, universe=100)


def ablation(loss: float) -> dict[str, Any]:
    generator = np.random.default_rng(5)
    whole = generator.random(500)
    without = whole - loss + 0.1 * (generator.random(500) - 0.5)
    without_interval, difference = interval(without), paired_interval(whole, without)
    return {
        "recall": without_interval.to_dict(),
        "ndcg": without_interval.to_dict(),
        "recall_difference": difference.to_dict(),
        "ndcg_difference": difference.to_dict(),
    }


def page_gain(mean: float) -> dict[str, Any]:
    """The gain of a slice, measured to within .01."""
    return {"gained": {"mean": mean, "ci95": [mean - 0.01, mean + 0.01], "n": 40}, "rows": 1200}


def page_slices(returning: float, new: float) -> dict[str, Any]:
    return {
        "position": {name: page_gain(0.0) for name in ("1", "2", "3", "4-5", "6-10", "11+", "unknown")},
        "user": {"returning": page_gain(returning), "new": page_gain(new)},
        "item": {"head": page_gain(0.005), "strict_cold": {"gained": None, "rows": 3}},
    }


def click_metrics(rate: float) -> dict[str, Any]:
    generator = np.random.default_rng(6)
    p = generator.beta(2, 2 / rate, 5000)
    y = generator.random(5000) < p
    return {
        "rows": 5000,
        "head": classification_metrics(p, y),
        "plain": classification_metrics(p**0.7, y),
    }


def full() -> dict[str, Any]:
    recall = interval(np.arange(100) % 5 / 5.0).to_dict()
    encoder = {
        **{"frozen": recall, "body": recall, "tuned": recall, "chance": 0.001, "pairs": 100, "k": 20},
        **{"projection": "left out", "same_product": {"recall": recall, "k": 10}},
    }
    shares = np.linspace(1, 0.1, 24) / np.linspace(1, 0.1, 24).sum()
    return {
        "shop": {"items": 1200, "events": 34567, "users": 800, "images": 0, "until": "2026-01-02"},
        "input": {
            "events.csv": {
                "read": 9,
                "kept": 7,
                "reasons": {"no time": 2},
                "examples": {"no time": [1234, 4]},
            }
        },
        "provenance": {
            "device": "2 cores",
            "libraries": {"torch": "2.0"},
            "settings": {"text.steps": 5, "items.id": "article|id", "targets": ["Größe"]},
        },
        "split": {
            "learned_until": datetime(2026, 1, 1, tzinfo=UTC),
            "evaluated": ["2026-01-01", "2026-01-02"],
            "queries": np.int64(400),
            "note": "Baskets cut in half.",
        },
        "ranking": {
            "vitrine": ranking_of(0.9),
            "hand-set weights": ranking_of(0.7),
            "popular": ranking_of(0.2),
            "item graph": ranking_of(0.5),
        },
        "pages": {
            name: {"log_likelihood": recall, "gained": recall, "lost": recall}
            for name in ("position alone", "whole bundle")
        },
        "page_slices": page_slices(0.0625, -0.03),
        "ablation": {
            "text": ablation(0.05),
            "image": ablation(0),
            "graph": ablation(0.1),
            "ctr": ablation(-0.02),
        },
        "cumulative_ablation": {
            "counts": {"recall": recall, "ndcg": recall, "milliseconds": 12.5},
            "graph": {
                "recall": recall,
                "ndcg": recall,
                "recall_gained": ablation(0.1)["recall_difference"],
                "ndcg_gained": ablation(0.1)["ndcg_difference"],
                "milliseconds": 20.0,
            },
        },
        "cold_start": {
            name: recall_by_count([np.array([1, 2])], [np.array([2, 3])], {2: row}, 2)
            for row, name in enumerate(("whole bundle", "without text"))
        },
        "candidates": {
            "per_query": {"similar": 212.5, "popular": 50.0},
            "target_recall": 0.7,
            "target_recall_by_band": {"head": 0.9, "strict_cold": 0.4},
            "index_recall": {"title_keywords": {"recall": 0.96875, "queries": 77}},
        },
        "encoders": {"text": encoder, "image": encoder},
        "ctr": {"click": click_metrics(0.2), "cart": click_metrics(0.05), "purchase": click_metrics(0.02)},
        "propensity": {
            "7 days": {
                "rows": 5000,
                "model": classification_metrics(np.linspace(0.1, 0.3, 50), np.arange(50) % 5 == 0),
                "base rate": classification_metrics(np.full(50, 0.25), np.arange(50) % 5 == 0),
                "gained": recall,
                "published": True,
            },
            "30 days": {"published": False, "reason": "the events cover too few days"},
        },
        "reranker": {
            "importance": {f"feature_{n}": share for n, share in enumerate(shares)},
            "trees": 300,
        },
        "graph": {"people": {"ndcg": 0.125, "ndcg_as_cosine": 0.0625, "source": 0.75}},
        "stages": {"text": 61.25, "graph": 0.5},
    }


def write_files(directory: Path, report: dict[str, Any]) -> tuple[Any, str]:
    write_report(directory, report)
    page = (directory / "report.md").read_text(encoding="utf-8")
    return json.loads((directory / "report.json").read_text(encoding="utf-8")), page


def test_a_full_report_has_every_section_and_chart(tmp_path: Path) -> None:
    report = full()
    document, page = write_files(tmp_path / "report", report)
    assert page.count("\n## ") == len(report)
    for name in CHARTS.values():
        assert f"]({name})" in page
        with Image.open(tmp_path / "report" / name) as chart:
            chart.load()
            assert chart.width > chart.height / 2 > 100
            assert len(chart.convert("RGB").getcolors(1 << 20) or []) > 10
    report["split"] |= {"learned_until": "2026-01-01T00:00:00+00:00", "queries": 400}
    assert document == report | {
        "methods": ["vitrine", "hand-set weights", "popular", "item graph"],
        "not_finite": [],
    }
    keys = list(document)
    assert keys == sorted(keys)


def test_the_page_shows_metrics_with_intervals(tmp_path: Path) -> None:
    report = full()
    page = write_files(tmp_path, report)[1]
    low, high = report["ranking"]["vitrine"]["recall"]["ci95"]
    assert f"{report['ranking']['vitrine']['recall']['mean']:.3f} [{low:.3f}, {high:.3f}]" in page
    assert "| measure | vitrine | hand-set weights | popular | item graph |" in page
    assert "| events.csv: no time | 2 | 1234, 4 |" in page
    assert "| events | 34,567 |" in page
    assert "| text | 61.2 |" in page
    assert "| items.id | article\\|id |" in page
    assert '| targets | \\["Größe"\\] |' in page
    assert "| + graph | 0.400 [0.350, 0.456] | 0.100 [" in page
    assert "| counts | 0.400 [0.350, 0.456] | – |" in page
    assert "| title_keywords | 0.969 | 77 |" in page


def test_the_gain_on_logged_pages_is_shown_by_slice(tmp_path: Path) -> None:
    page = write_files(tmp_path, full())[1]
    rows = page.split("| slice | items shown |")[1].split("\n\n")[0].splitlines()[1:]
    assert len(rows) == 1 + 7 + 2 + 2
    assert rows[1] == "| position 1 | 1,200 | 0.0000 (-0.0100, 0.0100) |"
    assert rows[7:] == [
        "| position unknown | 1,200 | 0.0000 (-0.0100, 0.0100) |",
        "| returning users | 1,200 | 0.0625 (0.0525, 0.0725) |",
        "| new users | 1,200 | -0.0300 (-0.0400, -0.0200) |",
        "| head items | 1,200 | 0.0050 (-0.0050, 0.0150) |",
        "| strictly cold items | 3 | – |",
    ]
    without = full()
    del without["page_slices"]
    page = write_files(tmp_path / "without", without)[1]
    assert "## Logged pages" in page
    assert "| slice |" not in page
    assert "page_gain" not in page


@pytest.mark.parametrize(
    ("returning", "new", "is_blue"), [(0.005, -0.005, False), (0.02, 0.0, True), (0.0, -0.02, True)]
)
def test_a_gain_that_may_be_zero_is_drawn_in_gray(
    tmp_path: Path, returning: float, new: float, is_blue: bool
) -> None:
    write_report(tmp_path, {"page_slices": page_slices(returning, new)})
    with Image.open(tmp_path / "page_gain.png") as chart:
        colors = {color for _, color in chart.convert("RGB").getcolors(1 << 20) or []}
    assert ((0x00, 0x72, 0xB2) in colors) == is_blue


def test_parts_without_an_effect_are_named(tmp_path: Path) -> None:
    page = write_files(tmp_path, full())[1]
    assert "**no measurable contribution**: image, ctr.\n" in page
    page = write_files(tmp_path, {"ablation": {"graph": ablation(0.1)}})[1]
    assert "no measurable contribution" not in page
    assert "all of them contribute" in page


def test_propensity_is_reported_next_to_the_base_rate(tmp_path: Path) -> None:
    report = full()
    page = write_files(tmp_path, report)[1]
    for name in ("model", "base rate"):
        metrics = report["propensity"]["7 days"][name]
        assert f"| 7 days | {name} | 5,000 | {metrics['auc']:.3f} | {metrics['log_loss']:.3f} |" in page
    assert "Within 7 days the log loss is 0.400 [" in page
    assert "**Not published**, within 30 days: the events cover too few days.\n" in page
    assert "within 7 days:" not in page


@pytest.mark.parametrize("section", list(full()))
def test_a_section_can_stand_alone(tmp_path: Path, section: str) -> None:
    page = write_files(tmp_path, {"shop": {}, section: full()[section]})[1]
    assert page.count("\n## ") == 1
    charts = [CHARTS[section]] if section in CHARTS else []
    assert [path.name for path in tmp_path.glob("*.png")] == charts


def test_an_empty_report_has_only_a_title(tmp_path: Path) -> None:
    assert write_files(tmp_path, {}) == ({"methods": [], "not_finite": []}, "# Training report\n")


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize(
    "name",
    [
        "a|b",
        "a\nb",
        "`a`",
        "<script>alert(1)</script>",
        "$\\frac{$",
        "[x](y)",
        "_a_",
        "靴 👟",
        "\\",
        " ",
        "x" * 300,
    ],
)
def test_hostile_names_break_neither_tables_nor_charts(tmp_path: Path, name: str) -> None:
    report = full()
    report["reranker"] = {"importance": {name: 0.5, "plain": 0.25}, "trees": 1}
    for section in ("ranking", "ablation", "ctr", "encoders", "stages"):
        report[section] = {name: next(iter(report[section].values()))}
    report["input"] = {name: {"read": 1, "kept": 0, "reasons": {name: 1}, "examples": {name: [0]}}}
    document, page = write_files(tmp_path, report)
    assert document["reranker"]["importance"][name] == 0.5
    assert "<script" not in page
    columns = 0
    for line in page.splitlines():
        here = len(line.replace("\\\\", "").replace("\\|", "").split("|")) if line.startswith("|") else 0
        assert not here or not columns or here == columns, line
        columns = here


def test_a_metric_that_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    report = full()
    report["candidates"]["target_recall_by_band"]["tail"] = math.nan
    report["ranking"]["popular"]["target_recall"]["head"]["ci95"][0] = np.float32(np.inf)
    report["ranking"]["popular"]["target_recall"]["tail"] = None
    report["ablation"]["image"]["ndcg_difference"]["mean"] = -math.inf
    document, page = write_files(tmp_path, report)
    assert document["not_finite"] == [
        "ranking/popular/target_recall/head/ci95/0",
        "ablation/image/ndcg_difference/mean",
        "candidates/target_recall_by_band/tail",
    ]
    assert document["candidates"]["target_recall_by_band"]["tail"] is None
    assert "| tail | – |" in page
    assert "candidates/target_recall_by_band/tail" in page


def test_a_report_without_metrics_has_no_charts(tmp_path: Path) -> None:
    nothing = ranking_metrics([], [], bands={}, warm=np.zeros(0, bool), universe=3)
    empty = classification_metrics(np.zeros(0), np.zeros(0))
    report = {
        "ranking": {"vitrine": nothing},
        "ablation": {"text": dict.fromkeys(("recall", "ndcg", "recall_difference", "ndcg_difference"))},
        "page_slices": {"item": {"tail": {"gained": None, "rows": 2}}},
        "ctr": {"click": {"rows": 0, "head": empty, "plain": empty}},
        "reranker": {"importance": {}, "trees": 0},
    }
    page = write_files(tmp_path, report)[1]
    assert page.count("\n## ") == 5
    assert not list(tmp_path.glob("*.png"))


def test_a_mean_rounded_out_of_its_interval_is_drawn(tmp_path: Path) -> None:
    report = {"ablation": {"text": {"ndcg_difference": {"mean": 0.1, "ci95": [0.10001, 0.10001], "n": 3}}}}
    assert "](ablation.png)" in write_files(tmp_path, report)[1]


def test_an_invalid_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rankings"):
        write_report(tmp_path, {"rankings": {}})
    with pytest.raises(TypeError, match="shop/items is set"):
        write_report(tmp_path, {"shop": {"items": {1}}})
    assert not list(tmp_path.iterdir())

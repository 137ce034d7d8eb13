"""The five lines that a training run ends with fit what it found."""

from typing import Any

from training.core.decisions import Decision
from training.core.metrics import Interval
from training.evaluation.summary import summary_lines

SHOP = {"items": 2000, "events": 5000, "users": 1, "images": 0, "until": None}


def report_of(**sections: Any) -> dict[str, Any]:
    windows = {"days": 30, "baskets": 800, "earlier_baskets": 800}
    return {"shop": SHOP, "windows": windows, "decisions": [], **sections}


def decision(part: str, baseline: str, gain: float, queries: int = 400, accepted: bool | None = None) -> Any:
    is_accepted = gain > 0 if accepted is None else accepted
    interval = Interval(gain, gain - 0.01, gain + 0.01, queries)
    return Decision(part, baseline, "of nDCG@20", is_accepted, queries, interval).to_dict()


def recall(mean: float) -> dict[str, Any]:
    return {"recall": {"mean": mean, "ci95": [mean - 0.02, mean + 0.02], "n": 400}}


def test_a_shop_without_events_is_told_what_recommendations_follow_from() -> None:
    lines = summary_lines({"shop": SHOP | {"events": 0, "users": 0}, "decisions": []})
    assert len(lines) == 5
    assert lines[0] == "Data: 2,000 items and no events: recommendations follow from contents alone."
    assert lines[2] == "Ranking: hand-set weights, because there is no basket to learn from."
    assert lines[3].startswith("Quality: not measured")
    assert "(0 now)" in lines[4]


def test_what_is_learned_and_how_well_is_stated_with_its_interval() -> None:
    ranker = decision("the fitted ranker", "the column popular_7d alone", 0.05)
    trees = decision("trees", "the weighted sum alone", 0.02)
    ranking = {"whole bundle": recall(0.2), "popular": recall(0.1)}
    lines = summary_lines(report_of(decisions=[ranker, trees], ranking=ranking, split={"queries": 400}))
    assert lines == [
        "Data: 5,000 events of 1 user with 2,000 items; the ranking learns from 800 baskets of the last 30 "
        "days.",
        "Texts are read by the pretrained model as it is; no item has an image.",
        "Ranking: weights learned from this shop, and trees; better by 0.050 of nDCG@20 than the column "
        "popular_7d alone on 400 held-out baskets.",
        "Quality: of what users took next, 20.0% (18.0% to 22.0%) are among the first 20 recommendations, "
        "10.0% (8.0% to 12.0%) among the 20 most popular items (400 baskets).",
        "Next: nothing to do. Every part that was learned is in use.",
    ]


def test_a_page_that_holds_most_of_the_catalog_measures_nothing() -> None:
    ranking = {"whole bundle": recall(1.0), "popular": recall(1.0)}
    few = report_of(ranking=ranking, split={"queries": 400}) | {"shop": SHOP | {"items": 10}}
    assert summary_lines(few)[3] == "Quality: not measured; 20 recommendations are most of the 10 items."


def test_what_is_left_out_is_named() -> None:
    ranker = decision("the fitted ranker", "hand-set weights", -0.05)
    text = decision("the tuned text encoder", "the frozen one", -0.05)
    lines = summary_lines(report_of(decisions=[text, ranker]))
    assert "because tuning it did not help" in lines[1]
    assert lines[2] == (
        "Ranking: hand-set weights: no weights that were learned rank better on 400 held-out baskets."
    )
    assert lines[4].endswith("the tuned text encoder, the fitted ranker.")


def test_pages_and_trees_on_a_simple_score_are_named() -> None:
    pages = report_of() | {"shop": SHOP | {"logs_pages": True}}
    assert "what users were shown" in summary_lines(pages)[2]
    ranker = decision("the fitted ranker", "hand-set weights", -0.05)
    trees = decision("trees", "the weighted sum alone", 0.05)
    lines = summary_lines(report_of(decisions=[ranker, trees]))
    assert lines[2].startswith("Ranking: hand-set weights, with trees that correct it: no weights")


def test_few_baskets_say_when_there_are_enough() -> None:
    windows = {"days": 43, "baskets": 129, "earlier_baskets": 129}
    ranker = decision("the fitted ranker, drawn to hand-set weights", "hand-set weights", 0.002, 86, True)
    ranking = {"whole bundle": recall(0.2), "popular": recall(0.1)}
    lines = summary_lines(
        report_of(windows=windows, decisions=[ranker], ranking=ranking, split={"queries": 86})
    )
    assert "not proven better than hand-set weights" in lines[2]
    assert lines[3].endswith("Too few to be sure.")
    assert "about 1,000 baskets (258 now)" in lines[4]

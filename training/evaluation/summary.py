"""What a training run has to say to a shopkeeper, in five lines. Reads the sections of the report."""

from collections.abc import Mapping
from typing import Any

from training.core.decisions import MIN_QUERIES
from training.core.plural import plural
from training.evaluation.page_likelihood import BUNDLE

ENOUGH_BASKETS = 1000
"""Of so many baskets, half are in the ranking window, and its last fifth is enough to decide."""
_PAGE = 20
Report = Mapping[str, Any]


def summary_lines(report: Report) -> list[str]:
    """Five sentences: the data, how texts and images are read, the ranking, its quality, and what is next."""
    return [_data(report), _encoders(report), _ranking(report), _quality(report), _next(report)]


def _data(report: Report) -> str:
    shop = report["shop"]
    if not shop["events"]:
        items = plural(shop["items"], "item")
        return f"Data: {items} and no events: recommendations follow from contents alone."
    windows = report["windows"]
    return (
        f"Data: {plural(shop['events'], 'event')} of {plural(shop['users'], 'user')} with "
        f"{plural(shop['items'], 'item')}; the ranking learns from {plural(windows['baskets'], 'basket')} of "
        f"the last {plural(windows['days'], 'day')}."
    )


def _encoders(report: Report) -> str:
    decisions = {d["part"]: d for d in report.get("decisions", [])}
    tuned = decisions.get("the tuned text encoder")
    if tuned is None:
        texts = "Texts are read by the pretrained model as it is"
    elif tuned["accepted"]:
        texts = "Texts are read by a model that is tuned on this shop's baskets"
    else:
        texts = "Texts are read by the pretrained model, because tuning it did not help"
    images = report["shop"]["images"]
    with_image = f"{images:,} items have an image" if images > 1 else "one has an image" if images else ""
    return f"{texts}; {with_image or 'no item has an image'}."


def _ranking(report: Report) -> str:
    by_part = {d["part"]: d for d in report.get("decisions", [])}
    ranker = next((d for part, d in by_part.items() if part.startswith("the fitted ranker")), None)
    if ranker is None:
        if report.get("shop", {}).get("logs_pages"):
            return "Ranking: a model learned from what users were shown and what they took of it."
        return "Ranking: hand-set weights, because there is no basket to learn from."
    queries, trees = plural(ranker["queries"], "held-out basket"), by_part.get("trees", {}).get("accepted")
    if not ranker["accepted"]:
        more = ", with trees that correct it" if trees else ""
        return f"Ranking: {ranker['baseline']}{more}: no weights that were learned rank better on {queries}."
    return (
        f"Ranking: weights learned from this shop{', and trees' if trees else ''}; "
        f"{_of_gain(ranker)} than {ranker['baseline']} on {queries}."
    )


def _of_gain(decision: Mapping[str, Any]) -> str:
    gain = decision["gain"]
    if gain is None or gain["ci95"][0] <= 0:
        return "not proven better"
    return f"better by {gain['mean']:.3f} {decision['measure']}"


def _quality(report: Report) -> str:
    methods = report.get("ranking") or {}
    if BUNDLE not in methods:
        return "Quality: not measured; it needs baskets, and a run without --skip-evaluation."
    if report["shop"]["items"] <= 2 * _PAGE:
        return (
            f"Quality: not measured; {_PAGE} recommendations are most of the {report['shop']['items']} items."
        )
    whole, popular = (methods.get(name, {}).get("recall") for name in (BUNDLE, "popular"))
    queries = report["split"]["queries"]
    few = " Too few to be sure." if queries < MIN_QUERIES else ""
    return (
        f"Quality: of what users took next, {_share(whole)} are among the first {_PAGE} recommendations, "
        f"{_share(popular)} among the {_PAGE} most popular items ({queries:,} baskets).{few}"
    )


def _next(report: Report) -> str:
    windows = report.get("windows") or {}
    now = windows.get("baskets", 0) + windows.get("earlier_baskets", 0)
    rejected = [d["part"] for d in report.get("decisions", []) if not d["accepted"]]
    if now < ENOUGH_BASKETS:
        return (
            f"Next: train again when there are about {ENOUGH_BASKETS:,} baskets ({now:,} now): they can show "
            "that more of what is learned helps."
        )
    if rejected:
        return (
            "Next: nothing to do. Left out, because held-out baskets do not show a gain: "
            f"{', '.join(rejected)}."
        )
    return "Next: nothing to do. Every part that was learned is in use."


def _share(interval: Mapping[str, Any] | None) -> str:
    if not interval:
        return "–"
    low, high = interval["ci95"]
    return f"{interval['mean']:.1%} ({low:.1%} to {high:.1%})"

"""Decide from the reading reports whether training may use a shop's files (docs/decisions/0045).

Large losses are reasons to refuse, smaller ones are warnings. Reads only a sample of the image files.
"""

import logging
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa

from services.catalog.markup import plain_text
from services.core.errors import FailedPrecondition, InvalidArgument
from services.embedding.images.headers import format_of
from training.core.base_models import unknown_share
from training.data.config import MIN_RANKING_DAYS
from training.data.events_file import UNKNOWN_ITEM
from training.data.images import examples
from training.data.items_file import CONFLICTING
from training.data.shop import ShopData
from training.data.table_report import TableReport
from training.data.values.times import DAY_MICROS

# Shares; docs/decisions/0045 gives the reason for each.
_WARN_NOTES = 0.01
_REFUSE_ROWS = {"items": 0.4, "events": 0.5}
_REFUSE_VALUES = 0.5
_REFUSE_UNKNOWN_ITEMS = 0.9
_REFUSE_CONFLICTING = 0.4
_REFUSE_IMAGES = 0.5
_SAMPLED_IMAGES = 200
_SAMPLED_VALUES = 200
_WORD = re.compile(r"[^\W\d_]{2}")
_WARN_UNKNOWN_ITEMS = 0.1
_REFUSE_LAST_DAYS = 0.05
_WARN_LAST_DAYS = 0.25
_MIN_EXPECTED_EVENTS = 50  # with fewer expected events an empty last day may be chance
_MAX_USER_SHARE = 0.2
_MIN_USER_EVENTS = 100
_MAX_UNKNOWN_TOKENS = 0.2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """Sentences: `reasons` to refuse, and `warnings`."""

    reasons: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def require(self, *, allow_losses: bool) -> None:
        """Log the warnings; raise if there are reasons to refuse, or log these too with `allow_losses`.

        Raises:
            FailedPrecondition: names every reason.
        """
        for warning in self.warnings:
            _log.warning("%s", warning)
        if self.reasons and not allow_losses:
            lines = "".join(f"\n  * {reason}" for reason in self.reasons)
            raise FailedPrecondition(
                f"training refuses the shop's files:{lines}\nCorrect the files or shop.toml; `vitrine "
                "inspect` shows how they are read. --allow-losses trains on them anyway."
            )
        for reason in self.reasons:
            _log.warning("allowed: %s", reason)


def assess_shop(shop: ShopData) -> Verdict:
    """The verdict on a shop that `read_shop` or `survey_shop` returned."""
    verdict = assess_items(shop)
    if "events" in shop.reports:
        _assess_table("events", shop, verdict)
    if "events" not in shop.reports:
        verdict.warnings.append(
            "no events file: the bundle uses item contents alone. Recommendations follow texts and images, "
            "and later the events that the running services receive"
        )
    elif len(shop.events):
        report = shop.reports["events"]
        if shop.items:
            _assess_unknown_items(report, verdict)
        _assess_last_days(shop, report, verdict)
        _assess_users(shop, report, verdict)
        _assess_types(shop, report, verdict)
    return verdict


def assess_items(shop: ShopData) -> Verdict:
    """The verdict on the items alone."""
    verdict = Verdict()
    _assess_table("items", shop, verdict)
    _assess_ids(shop, verdict)
    _assess_titles(shop, verdict)
    _assess_images(shop, verdict)
    _assess_vocabulary(shop, verdict)
    return verdict


def _assess_table(name: str, shop: ShopData, verdict: Verdict) -> None:
    report = shop.reports[name]
    verdict.reasons.extend(report.problems)
    verdict.warnings.extend(f"{report.file}: {warning}" for warning in report.warnings)
    if not report.problems:
        _assess_rows(name, report, verdict)
        _assess_values(report, verdict)


def events_by_day(shop: ShopData) -> tuple[np.ndarray, np.ndarray]:
    """Days since 1970 from the first event's to the last one's, int64 (D,), and the events of each."""
    days = shop.events.time // DAY_MICROS
    if not len(days):
        return days, days
    return np.arange(days[0], days[-1] + 1), np.bincount(days - days[0])


def _assess_rows(name: str, report: TableReport, verdict: Verdict) -> None:
    losses = {reason: entry for reason, entry in report.entries.items() if entry.kind == "row"}
    share = report.rows_lost / max(report.rows_read, 1)
    if not report.rows_used or share > _REFUSE_ROWS[name]:
        details = "; ".join(entry.describe(reason) for reason, entry in losses.items())
        loss = f"{report.rows_lost:,} of {report.rows_read:,} rows are lost ({share:.0%})"
        verdict.reasons.append(f"{report.file}: {loss}: {details or 'no row is before --until'}")
        return
    for reason, entry in losses.items():
        verdict.warnings.append(
            f"{report.file}: {entry.count:,} of {report.rows_read:,} rows are lost: {entry.describe(reason)}"
        )


def _assess_values(report: TableReport, verdict: Verdict) -> None:
    for reason, entry in report.entries.items():
        count = report.value_counts.get(entry.field, report.rows_read)
        if entry.kind != "value":
            continue
        text = f"{report.file}: {entry.count:,} of {count:,} values: {entry.describe(reason)}"
        (verdict.reasons if entry.count > _REFUSE_VALUES * count else verdict.warnings).append(text)
    for reason, entry in report.entries.items():
        if entry.kind == "note" and reason != UNKNOWN_ITEM and entry.count >= _WARN_NOTES * report.rows_read:
            verdict.warnings.append(f"{report.file}: {entry.describe(reason.removeprefix('note: '))}")


def _assess_ids(shop: ShopData, verdict: Verdict) -> None:
    report, preset = shop.reports["items"], shop.settings.source.preset
    entry = report.entries.get(CONFLICTING)
    if entry is None or report.match is None or entry.count <= _REFUSE_CONFLICTING * report.rows_read:
        return
    remedy = f"is {report.match.fields['id']!r} the id column? Set id under [items] to the right column"
    if preset:
        remedy = f"give each product its own id in {preset}, and export again"
    verdict.reasons.append(
        f"{report.file}: {entry.count:,} of {report.rows_read:,} rows repeat an id with another title or "
        f"price ({', '.join(entry.samples)}): {remedy}"
    )


def _assess_titles(shop: ShopData, verdict: Verdict) -> None:
    """Warn if items have no title column, unless shop.toml sets title to ""."""
    report = shop.reports["items"]
    match, table = report.match, shop.tables.get("items")
    if match is None or table is None or "title" in match.fields or not shop.settings.items.title:
        return
    other_columns = {column for field, column in match.fields.items() if field != "description"}
    columns = [name for name in table.rows.column_names if name not in other_columns]
    texts = [name for name in columns if _holds_words(table.rows[name])]
    verdict.warnings.append(
        f"{report.file}: items have no title, which text vectors and searches need most; columns with words: "
        f'{", ".join(texts) or "none"}. Set title to one of them under [items], or to "" if there is no title'
    )


def _holds_words(column: pa.ChunkedArray) -> bool:
    """Whether most of the first values of a column hold a word of several letters."""
    if not pa.types.is_string(column.type):
        return False
    values = [str(value) for value in column.slice(0, _SAMPLED_VALUES).drop_null().to_pylist()]
    return sum(bool(_WORD.search(value)) for value in values) > len(values) / 2


def _assess_unknown_items(report: TableReport, verdict: Verdict) -> None:
    entry = report.entries.get(UNKNOWN_ITEM)
    if entry is None or not report.rows_used:
        return
    share = entry.count / report.rows_used
    text = (
        f"{report.file}: {entry.count:,} of {report.rows_used:,} events ({share:.0%}) name an item that "
        f"the items file does not have: {entry.describe('events')}"
    )
    if share > _REFUSE_UNKNOWN_ITEMS:
        verdict.reasons.append(
            f"{text}; both files must use the same ids: check id under [items] and item_id under [events]"
        )
    elif share > _WARN_UNKNOWN_ITEMS:
        verdict.warnings.append(text)


def _assess_images(shop: ShopData, verdict: Verdict) -> None:
    report = shop.images.report
    problems, matching = list(report.problems), report.matching
    is_loss = len(matching.unmatched) > _REFUSE_IMAGES * report.files
    if is_loss and len(matching.of_item) < _REFUSE_IMAGES * len(shop.items):
        verdict.reasons.append(f"{report.summary}; {problems.pop(0)}")
    verdict.warnings.extend(problems)
    sample = [item.id for item in shop.items if item.id in shop.images]
    sample = sample[:: max(1, len(sample) // _SAMPLED_IMAGES)]
    broken = [shop.images.name(item_id) for item_id in sample if not _is_image(shop, item_id)]
    if broken:
        text = f"{len(broken):,} of {len(sample):,} sampled image files are not images: {examples(broken)}"
        (verdict.reasons if len(broken) > _REFUSE_IMAGES * len(sample) else verdict.warnings).append(text)


def _is_image(shop: ShopData, item_id: str) -> bool:
    """Whether the file of an item starts with an image signature; nothing is decoded."""
    try:
        return format_of(shop.images.read(item_id)) is not None
    except InvalidArgument:
        return False


def _assess_last_days(shop: ShopData, report: TableReport, verdict: Verdict) -> None:
    """Check that the last days have a typical number of events: rankers are fitted and evaluated on them."""
    days, counts = events_by_day(shop)
    last = max(shop.settings.ranking.ranking_days or MIN_RANKING_DAYS, shop.settings.split.test_days or 1)
    if len(days) <= last:
        if len(days) == 1:
            verdict.warnings.append(f"{report.file}: all {len(shop.events):,} events lie on {_date(days[0])}")
        return
    typical = float(np.median(counts[counts > 0]))
    normal_days = np.flatnonzero(counts >= _WARN_LAST_DAYS * typical)
    # Where most days have no event, two such days are no gap.
    active = float((counts[: normal_days[-1] + 1] > 0).mean())
    count, expected = int(counts[-last:].sum()), typical * last * active
    if expected < _MIN_EXPECTED_EVENTS or count >= _WARN_LAST_DAYS * expected:
        return
    until = _date(days[normal_days[-1]] + 1)
    text = (
        f"{report.file}: the last {last} days, up to {_date(days[-1])}, have {count:,} events, but a typical "
        f"day has {typical:,.0f}. Recent events count most in training: --until {until} leaves them out"
    )
    (verdict.reasons if count < _REFUSE_LAST_DAYS * expected else verdict.warnings).append(text)


def _assess_users(shop: ShopData, report: TableReport, verdict: Verdict) -> None:
    counts = np.bincount(shop.events.user, minlength=len(shop.events.user_ids))
    top = int(counts.argmax())
    user, count = shop.events.user_ids[top], int(counts[top])
    if count >= _MIN_USER_EVENTS and count >= _MAX_USER_SHARE * len(shop.events) and (counts > 0).sum() > 1:
        verdict.warnings.append(
            f"{report.file}: user {user!r} has {count:,} of {len(shop.events):,} events: if this id stands "
            f'for guests, write guests = ["{user}"] under [events]'
        )


def _assess_types(shop: ShopData, report: TableReport, verdict: Verdict) -> None:
    types = list(shop.settings.event_types)
    counts = np.bincount(shop.events.kind, minlength=len(types))
    if missing := [name for name, count in zip(types, counts.tolist(), strict=True) if not count]:
        targets = [name for name in shop.settings.targets if name in missing]
        more = f"; {', '.join(targets)} is what recommendations predict" if targets else ""
        verdict.warnings.append(f"{report.file}: no event is of type {', '.join(missing)}{more}")


def _assess_vocabulary(shop: ShopData, verdict: Verdict) -> None:
    base = shop.settings.text.base
    share = unknown_share(base, [plain_text(item.title) for item in shop.items])
    if share is not None and share >= _MAX_UNKNOWN_TOKENS:
        verdict.warnings.append(
            f"the text base {base!r} does not know {share:.0%} of the tokens of the titles: it cannot tell "
            "such texts apart. Set base under [text] to a model for the shop's language"
        )


def _date(day: int) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=int(day))).date().isoformat()

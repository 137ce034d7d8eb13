"""Shops in the formats of real exports are read, or refused with advice that works."""

import json
import os
from pathlib import Path

import pytest

from cli.main import main
from services.core.errors import VitrineError
from tests.conftest import skip_without
from tests.support.field_cases import BUILDERS
from tests.support.field_outcomes import ADVICE, OUTCOMES, Outcome
from tests.support.field_shops import EVENTS, ITEMS, event_time, item_of_event
from training.data.dataset import ShopData, survey_shop
from training.data.inspection.verdict import Verdict, assess_shop

_MICROS = 10**6


def _assess(directory: Path) -> tuple[ShopData | None, Verdict]:
    try:
        shop = survey_shop(directory)
    except VitrineError as error:
        return None, Verdict(reasons=[str(error)])
    return shop, assess_shop(shop)


def _assert_outcome(directory: Path, outcome: Outcome) -> None:
    shop, verdict = _assess(directory)
    reasons, warnings = "\n".join(verdict.reasons), "\n".join(verdict.warnings)
    assert all(part in reasons for part in outcome.errors), reasons
    assert bool(reasons) == bool(outcome.errors), reasons
    assert all(part in warnings for part in outcome.warnings), warnings
    assert all(any(part in line for part in outcome.warnings) for line in verdict.warnings), warnings
    if shop is None:
        assert outcome.errors
        return
    notes = "\n".join(note for report in shop.reports.values() for note in (*report.notes, *report.reasons))
    assert all(part in notes for part in outcome.notes), notes
    assert (len(shop.items), len(shop.events)) == (outcome.items, outcome.events)
    assert outcome.check(shop)
    if outcome.prices is not None:
        of = {one.id: one.price for one in shop.items}
        assert list(of.values()) == [pytest.approx(outcome.prices(n)) for n in range(len(of))]
    if not outcome.errors:
        _assert_events(shop, outcome)


def _assert_events(shop: ShopData, outcome: Outcome) -> None:
    """Event times are those of the synthetic shop; if no row is lost, so are the items of the events."""
    micros, step = shop.events.time // _MICROS, outcome.step
    expected = [int(event_time(n).timestamp()) // step * step for n in range(EVENTS)]
    assert set(micros.tolist()) <= set(expected)
    if outcome.events == EVENTS and outcome.items == ITEMS:
        assert micros.tolist() == expected
        ids = sorted((one.id for one in shop.items), key=lambda name: int(name.strip("sku- ")))
        place = {item_id: n for n, item_id in enumerate(ids)}
        of = [place[shop.events.item_ids[code]] for code in shop.events.item]
        assert of == [item_of_event(n) for n in range(EVENTS)] or step > 1


def test_every_case_has_an_expected_outcome() -> None:
    assert OUTCOMES.keys() == BUILDERS.keys()


@pytest.mark.parametrize("case", BUILDERS)
def test_a_shop_has_its_expected_outcome(case: str, tmp_path: Path) -> None:
    BUILDERS[case](tmp_path)
    _assert_outcome(tmp_path, OUTCOMES[case])


@pytest.mark.parametrize("advice", ADVICE)
def test_following_the_advice_reads_the_whole_shop(advice: str, tmp_path: Path) -> None:
    case, change, outcome = ADVICE[advice]
    BUILDERS[case](tmp_path)
    file = tmp_path / "shop.toml"
    file.write_text(change(file.read_text() if file.exists() else ""))
    _assert_outcome(tmp_path, outcome)


@pytest.mark.parametrize("case", ["A32-one-bad-byte", "A46-no-shop-toml-types", "A86-images-all-broken"])
def test_inspect_agrees_with_training_in_verdict_and_status(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    BUILDERS[case](tmp_path)
    is_refused = bool(OUTCOMES[case].errors)
    assert main(["inspect", f"--data={tmp_path}", "--json"]) == int(is_refused)
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"]["refused"] == is_refused
    assert all(part in "\n".join(report["verdict"]["reasons"]) for part in OUTCOMES[case].errors)


@pytest.mark.parametrize("case", ["A04-rees46-utc-suffix", "A09-retailrocket-ms", "A24-taobao-no-header"])
def test_a_preset_that_cannot_read_the_items_is_not_suggested(case: str, tmp_path: Path) -> None:
    BUILDERS[case](tmp_path)
    shop, verdict = _assess(tmp_path)
    notes = [note for report in shop.reports.values() for note in report.notes] if shop else []
    assert "preset" not in "".join([*notes, *verdict.reasons])


def test_real_files_raise_only_domain_errors() -> None:
    root = Path(os.environ.get("VITRINE_FIELD", Path(__file__).parents[3] / "shared/field"))
    shops = sorted((root / "cases").glob("A*/shop"))
    if not shops:
        skip_without("field", f"{root / 'cases'} is not there")
    refusals = [shop.parent.name for shop in shops if _assess(shop)[1].reasons]
    assert len(refusals) < len(shops) // 2, refusals

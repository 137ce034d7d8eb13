"""Times are read from every format or not at all."""

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.values.time_formats import fitting_formats
from training.data.values.times import NO_TIME, Times, out_of_range, read_times

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SECONDS = st.integers(int(datetime(1990, 1, 1, tzinfo=UTC).timestamp()), 4_000_000_000)
MOMENTS = st.lists(SECONDS, min_size=1, max_size=30)


def parse(values: Sequence[object], time_format: str = "") -> Times:
    return read_times(pa.chunked_array([pa.array(values)]), time_format)


def micros(moment: datetime) -> int:
    return (moment - EPOCH) // timedelta(microseconds=1)


@given(MOMENTS, st.sampled_from([1, 10**3, 10**6, 10**9]), st.sampled_from([str, int, float]))
def test_numeric_times_are_read_by_their_magnitude(seconds: list[int], unit: int, kind: type) -> None:
    times = parse([kind(second * unit) for second in seconds])
    assert np.abs(times.micros - np.array(seconds) * 10**6).max() <= 1  # a float has 53 bits
    assert len(times.counts()) == 1


@given(MOMENTS, st.integers(-14, 14), st.sampled_from(["", "Z", " UTC", "zone", " zone"]), st.booleans())
def test_iso_times_are_read_with_and_without_zones(
    seconds: list[int], hours: int, suffix: str, with_separators: bool
) -> None:
    zone = timezone(timedelta(hours=hours)) if "zone" in suffix else UTC
    texts = []
    for second in seconds:
        moment = datetime.fromtimestamp(second, zone)
        text = moment.replace(tzinfo=None).isoformat("T" if with_separators else " ")
        texts.append(text + suffix.replace("zone", moment.strftime("%z")))
    np.testing.assert_array_equal(parse(texts).micros, np.array(seconds) * 10**6)


@pytest.mark.parametrize(
    ("cell", "time_format"),
    [
        ("%Y%m%d", ""),
        ("%Y%m%d%H%M%S", ""),
        ("%Y/%m/%d", ""),
        ("%d.%m.%Y %H:%M", "%d.%m.%Y %H:%M"),
        ("%m/%d/%Y %H:%M:%S", "%m/%d/%Y %H:%M:%S"),
        ("%d %b %Y %I:%M %p", "%d %b %Y %I:%M %p"),
        ("%d-%m-%y", "%d-%m-%y"),
    ],
)
def test_digit_dates_and_configured_formats_round_trip(cell: str, time_format: str) -> None:
    moments = [datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=day, seconds=day * 61) for day in range(300)]
    texts = [moment.strftime(cell) for moment in moments]
    expected = [micros(datetime.strptime(text, cell).replace(tzinfo=UTC)) for text in texts]
    assert parse(texts, time_format).micros.tolist() == expected
    if cell.startswith("%Y%m"):
        assert parse([int(text) for text in texts]).micros.tolist() == expected


@given(
    st.lists(st.dates(datetime(1990, 1, 1).date(), datetime(2099, 1, 1).date()), min_size=1), st.booleans()
)
def test_day_and_month_are_read_only_if_one_order_fits(dates: list[date], month_first: bool) -> None:
    texts = [day.strftime("%m/%d/%Y" if month_first else "%d/%m/%Y") for day in dates]
    times = parse(texts)
    if all(day.day <= 12 for day in dates):
        assert times.unordered.all()
        assert (times.micros == NO_TIME).all()
        return
    if sum(day.day > 12 for day in dates) >= len(dates) / 100:
        expected = [micros(datetime(day.year, day.month, day.day, tzinfo=UTC)) for day in dates]
        assert times.micros.tolist() == expected
        assert set(times.counts()) == {"month/day/year" if month_first else "day/month/year"}


def test_dates_that_contradict_each_other_are_not_read() -> None:
    assert parse(["28/11/2026", "11/28/2026"]).unordered.all()


@pytest.mark.parametrize(
    "value", ["", None, "yesterday", "2026-02-30", "30/02/2026", "2026-13-01", "1e400", "2026-11-28T25:00"]
)
def test_an_invalid_time_is_none(value: str | None) -> None:
    times = parse([value, "28/11/2026", "2026-11-28"])
    assert times.micros[0] == NO_TIME
    assert (times.micros[1:] == micros(datetime(2026, 11, 28, tzinfo=UTC))).all()


def test_a_configured_format_reads_nothing_else() -> None:
    times = parse(["28/11/2026", "2026-11-28", "31/02/2026", "1794010711"], "%d/%m/%Y")
    assert (times.micros != NO_TIME).tolist() == [True, False, False, False]


def test_mixed_units_are_read_and_counted() -> None:
    times = parse(["1794010711"] * 5 + ["1794010711000"])
    assert len(set(times.micros.tolist())) == 1
    assert times.counts() == {"seconds": 5, "milliseconds": 1}


def test_parquet_timestamps_keep_their_instants() -> None:
    moment = datetime(2026, 11, 28, 9, tzinfo=timezone(timedelta(hours=9)))
    assert parse([moment]).micros.tolist() == [micros(moment)]
    assert parse([moment.replace(tzinfo=None)]).micros.tolist() == [micros(moment.replace(tzinfo=UTC))]
    assert parse([moment.date()]).micros.tolist() == [micros(datetime(2026, 11, 28, tzinfo=UTC))]


def test_times_before_1990_or_after_tomorrow_are_out_of_range() -> None:
    now = datetime(2026, 11, 28, tzinfo=UTC)
    values = ["1989-12-31", "1990-01-01", "2026-11-29", "2026-11-29T00:00:01", "2037-01-01", "x"]
    assert out_of_range(parse(values).micros, now).tolist() == [True, False, False, True, True, False]


@given(MOMENTS, st.sampled_from("-/."), st.sampled_from(["", " UTC"]))
def test_single_digit_months_days_and_hours_are_read(seconds: list[int], mark: str, zone: str) -> None:
    moments = [datetime.fromtimestamp(second, UTC) for second in seconds]
    texts = [
        f"{m.year}{mark}{m.month}{mark}{m.day} {m.hour}:{m.minute:02}:{m.second:02}{zone}" for m in moments
    ]
    assert parse(texts).micros.tolist() == [micros(moment) for moment in moments]
    dates = [datetime(m.year, m.month, m.day, tzinfo=UTC) for m in moments]
    texts = [f"{m.year}{mark}{m.month}{mark}{m.day}" for m in moments]
    assert parse(texts).micros.tolist() == [micros(day) for day in dates]


@pytest.mark.parametrize("date_form", ["%d.%m.%Y", "%m/%d/%Y", "%d-%m-%y"])
@pytest.mark.parametrize("clock", ["", " %H:%M", ", %H:%M:%S", " %I:%M %p"])
def test_a_format_is_built_from_the_values_and_reads_them_all(date_form: str, clock: str) -> None:
    moments = [datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=day, seconds=day * 61) for day in range(300)]
    texts = [moment.strftime(date_form + clock) for moment in moments]
    cells = pa.chunked_array([pa.array([*texts, None])])
    formats = fitting_formats(cells, np.ones(len(cells), bool))
    whole = {name for name, share in formats.items() if share == 1}
    # A day in front may be a year of two digits as well.
    assert whole - {"%y-%m-%d" + clock} == {date_form + clock}
    assert (parse(texts, date_form + clock).micros != NO_TIME).all()

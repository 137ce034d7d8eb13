"""Amounts, placeholders and lists are read as people write them."""

import math
from collections.abc import Sequence

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.catalog.items import MAX_ATTRIBUTE_VALUES
from training.data.values.values import (
    NULL_WORDS,
    ParsedNumbers,
    cut_to_bytes,
    read_amounts,
    to_texts,
    without_null_words,
)

CENTS = st.lists(st.integers(0, 10**9), min_size=1, max_size=20)
FORMS = {
    "1234.5": lambda c: f"{c / 100:.2f}",
    "1,234.50": lambda c: f"{c / 100:,.2f}",
    "1.234,50": lambda c: f"{c / 100:,.2f}".translate({44: 46, 46: 44}),
    "1 234,50": lambda c: f"{c / 100:,.2f}".translate({44: 160, 46: 44}),
    "1'234.50": lambda c: f"{c / 100:,.2f}".replace(",", "'"),
    "1234,50": lambda c: f"{c / 100:.2f}".replace(".", ","),
}
UNITS = ("{}", "${}", "{} USD", "US$ {}", "{} €", "€{}", "CHF {}", "Rs. {}", "{} kr", "¥{}")


def amounts(values: Sequence[object], decimal: str = "") -> ParsedNumbers:
    return read_amounts(pa.chunked_array([pa.array(values)]), decimal)


@settings(deadline=None)
@given(CENTS, st.sampled_from(list(FORMS)), st.sampled_from(UNITS), st.booleans())
def test_amounts_in_every_notation_round_trip(cents: list[int], form: str, unit: str, negative: bool) -> None:
    sign = -1 if negative else 1
    texts = [("-" if negative else "") + unit.format(FORMS[form](cent)) for cent in cents]
    result = amounts(texts)
    assert result.values.tolist() == pytest.approx([sign * cent / 100 for cent in cents])
    assert not result.invalid.any()
    assert not result.ambiguous


def test_the_whole_column_decides_the_decimal_separator() -> None:
    assert amounts(["12,50", "1.234"]).values.tolist() == [12.5, 1234]
    assert amounts(["12.50", "1,234"]).values.tolist() == [12.5, 1234]
    assert amounts(["1.234", "2.000"]).ambiguous
    assert amounts(["1.234"], decimal=",").values.tolist() == [1234]
    assert amounts(["1.234.567"]).values.tolist() == [1234567]


@pytest.mark.parametrize("text", ["free", "12.99 - 15.99", "1.2.3", "inf", "12,34,5", "€", "12 12x34"])
def test_a_cell_without_a_number_is_lost_and_none_is_invented(text: str) -> None:
    result = amounts([text, "1.5"])
    assert math.isnan(result.values[0])
    assert result.invalid.tolist() == [True, False]


def test_machine_numbers_and_empty_cells_are_read() -> None:
    result = amounts(["1e3", "-2", " 7 ", None, ""])
    assert result.values[:3].tolist() == [1000, -2, 7]
    assert math.isnan(result.values[3])
    assert not result.invalid.any()
    assert amounts([1, 2, None]).values[:2].tolist() == [1, 2]


def test_currencies_are_counted() -> None:
    assert amounts(["$1", "$2", "3 EUR"]).units == {"$": 2, "EUR": 1}


def test_placeholders_are_empty_cells() -> None:
    column = pa.chunked_array([pa.array([*NULL_WORDS, " NULL ", "Nan", "x", None])])
    cells, where = without_null_words(column)
    assert cells.to_pylist() == [None] * (len(NULL_WORDS) + 1) + ["Nan", "x", None]
    assert where.sum() == len(NULL_WORDS) + 1
    assert without_null_words(pa.chunked_array([pa.array([1.0, math.nan])]))[0].to_pylist() == [1.0, None]


def test_lists_and_separated_texts_are_split() -> None:
    assert to_texts('["a", "b", "a"]') == ("a", "b")
    assert to_texts("[sic") == ("[sic",)
    assert to_texts("a, b ,,a", ",") == ("a", "b")
    assert to_texts("a, b") == ("a, b",)
    assert len(to_texts(list(range(MAX_ATTRIBUTE_VALUES + 5)))) == MAX_ATTRIBUTE_VALUES + 5


@given(st.text(), st.integers(0, 50))
def test_a_truncated_text_is_a_prefix_within_the_limit(text: str, limit: int) -> None:
    cut = cut_to_bytes(text, limit)
    assert text.startswith(cut)
    assert len(cut.encode()) <= limit


@pytest.mark.parametrize(
    "text", ["(12.50)", "12.50-", "12.50−", "($12.50)", "$(12.50)", "12.50- €", "-12.50"]
)
def test_every_minus_sign_is_read(text: str) -> None:
    assert amounts([text]).values.tolist() == [-12.5]


def test_a_dash_for_cents_is_no_minus_and_a_single_parenthesis_no_number() -> None:
    assert amounts(["12,-", "12.- CHF", "12.--"]).values.tolist() == [12, 12, 12]
    assert amounts(["(1)", "1-"]).values.tolist() == [-1, -1]
    assert amounts(["(12.50", "12.50)", "(2) 12"]).invalid.all()


def test_indian_digit_groups_and_magnitude_words_are_read() -> None:
    assert amounts(["₹1,10,000.00", "1,10,000", "12,34,56,789"]).values.tolist() == [
        110000,
        110000,
        123456789,
    ]
    result = amounts(["1.2万", "1.1万元", "4.35億", "3만원", "12,5 тыс."])
    assert result.values.tolist() == [12000, 11000, 435000000, 30000, 12500]
    assert result.units == {"": 3, "元": 1, "원": 1}
    assert amounts(["1,10,00", "1.10.000,00"]).invalid.all()


def test_objects_in_lists_become_their_name_or_json() -> None:
    assert to_texts('[{"id": 1, "name": "Shoes"}, {"id": 2, "title": "Hats"}]') == ("Shoes", "Hats")
    assert to_texts([{"src": "a.jpg"}, {"id": 1, "new": True}]) == ("a.jpg", '{"id": 1, "new": true}')
    assert to_texts('[["a", null], true]') == ('["a", null]', "true")

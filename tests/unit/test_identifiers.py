"""Ids can contain spaces inside."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.catalog.items import Item, identifier_problem, validate


@given(st.text("ABC 123-_/äß茶", min_size=1, max_size=40))
def test_an_id_can_contain_spaces_but_not_start_or_end_with_one(value: str) -> None:
    assert bool(identifier_problem(value)) == (value != value.strip())


@pytest.mark.parametrize("value", ["", "a\tb", "a\nb", "a\u00a0b", "a\u2028b", "a\0b", " a", "a ", "x" * 129])
def test_an_id_cannot_contain_other_white_space_or_control_characters(value: str) -> None:
    assert identifier_problem(value)


def test_an_item_whose_id_contains_spaces_is_valid() -> None:
    validate(Item("AB 12", "Hat", family_id="AB 1"))

"""A dialogue keeps its latest constraints, and an invalid interpretation is refused."""

import math
from typing import Any

import pytest

from services.gateway.conversation.language.dialogue_state import (
    MAX_CONSTRAINTS,
    MAX_DISLIKED,
    MAX_WORDS,
    AttributeConstraint,
    DialogueState,
    Forget,
    ItemPreference,
    PriceConstraint,
    Reset,
    SearchWords,
)
from services.gateway.conversation.language.interpreter import Interpretation, InterpreterInput
from services.gateway.conversation.language.interpreter_runner import check
from services.gateway.conversation.language.vocabulary import Vocabulary
from tests.support.phrases import SHOWN, WORDS, brand, colour


def test_a_later_constraint_replaces_a_contradicting_one() -> None:
    def constraints_after(*changes: Any) -> tuple[Any, ...]:
        return DialogueState().apply(changes).constraints

    assert constraints_after(colour("Red"), colour("blue")) == (colour("blue"),)
    assert constraints_after(colour("Red", "blue"), colour("Red", positive=False)) == (
        colour("blue"),
        colour("Red", positive=False),
    )
    assert constraints_after(colour("Red", positive=False), colour("Red")) == (colour("Red"),)
    assert constraints_after(colour("Red"), brand("Nike")) == (colour("Red"), brand("Nike"))
    assert constraints_after(PriceConstraint(high=30), PriceConstraint(low=10)) == (PriceConstraint(10, 30),)
    assert constraints_after(PriceConstraint(high=30), PriceConstraint(low=40)) == (PriceConstraint(low=40),)
    assert constraints_after(PriceConstraint(low=40), PriceConstraint(high=30)) == (PriceConstraint(high=30),)
    assert constraints_after(PriceConstraint(10, 30), PriceConstraint(low=20, replaces=True)) == (
        PriceConstraint(low=20),
    )
    assert constraints_after(PriceConstraint(high=30), colour("Red"), Forget("price")) == (colour("Red"),)
    both = DialogueState().apply(
        [
            ItemPreference("a"),
            ItemPreference("b"),
            ItemPreference("a", positive=False),
            SearchWords(("x", "y")),
        ]
    )
    assert (both.liked_ids, both.disliked_ids, both.words) == (("b",), ("a",), ("x", "y"))
    assert both.apply([SearchWords(("x",), positive=False)]).words == ("y",)
    assert both.apply([Reset()]) == DialogueState(disliked_ids=("a",))


def test_a_dialogue_keeps_the_latest_constraints_and_reports_the_dropped() -> None:
    many = [AttributeConstraint(f"a{n}", ("x",)) for n in range(MAX_CONSTRAINTS + 2)]
    dislikes = [ItemPreference(f"d{n}", positive=False) for n in range(MAX_DISLIKED + 1)]
    words = SearchWords(tuple(f"w{n}" for n in range(MAX_WORDS + 1)))
    state, dropped_changes = DialogueState().apply([*many, *dislikes, words]).truncate()
    assert dropped_changes == (*many[:2], dislikes[0])
    assert state.constraints == tuple(many[2:])
    assert (len(state.disliked_ids), state.words[0]) == (MAX_DISLIKED, "w1")
    assert state.truncate() == (state, ())
    wide = [AttributeConstraint(f"a{n}", ("x" * 256,) * 10) for n in range(4)]
    state, dropped_changes = DialogueState().apply(wide).truncate()
    assert (len(state.constraints), dropped_changes) == (1, tuple(wide[:3]))


def test_relative_prices_use_the_prices_of_the_shop() -> None:
    words = Vocabulary(prices=[0.5, 10.0, 29.9, 30.0])
    assert (words.price_below(30.0), words.price_below(25.0), words.price_above(10.0)) == (29.9, 10.0, 29.9)
    assert words.price_below(0.5) < 0.5
    assert words.price_above(30.0) > 30.0
    assert words.price_below(0.0) == 0.0


@pytest.mark.parametrize(
    "reading",
    [
        Interpretation((AttributeConstraint("colour", ("plaid",)),)),
        Interpretation((AttributeConstraint("colour", ()),)),
        Interpretation((AttributeConstraint("flavour", ("Red",)),)),
        Interpretation((PriceConstraint(),)),
        Interpretation((PriceConstraint(high=-1.0),)),
        Interpretation((PriceConstraint(high=math.inf),)),
        Interpretation((PriceConstraint(low=math.nan),)),
        Interpretation((PriceConstraint(9.0, 1.0),)),
        Interpretation((ItemPreference("i19"),)),
        Interpretation((SearchWords(()),)),
        Interpretation((SearchWords(("a\nb",)),)),
        Interpretation((SearchWords(("a" * 201,)),)),
        Interpretation((Forget("flavour"),)),
        Interpretation((Reset(),) * 65),
        Interpretation((), ("",)),
        Interpretation(("cheaper",)),  # type: ignore[arg-type]
        None,
    ],
)
def test_an_invalid_interpretation_is_refused(reading: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        check(reading, InterpreterInput("x", "en", WORDS, SHOWN))

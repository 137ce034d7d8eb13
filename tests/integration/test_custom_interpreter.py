"""A shop can use an interpreter of its own, and a failing one changes nothing."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.core.errors import FailedPrecondition
from services.gateway.conversation.language.dialogue_state import (
    AttributeConstraint,
    ItemPreference,
    PriceConstraint,
    SearchWords,
)
from services.gateway.conversation.language.interpreter import (
    Interpretation,
    InterpreterInput,
    PhraseInterpreter,
)
from services.gateway.conversation.language.interpreter_runner import load
from tests.support.dialogues import Talk
from tests.support.shop_server import Shop, ids
from tests.support.shops import is_red, price


class Fixed:
    """An interpreter that says the same of everything."""

    def __init__(self, reading: Callable[[InterpreterInput], Any]) -> None:
        self._reading = reading

    def read(self, turn: InterpreterInput) -> Interpretation:
        reading: Interpretation = self._reading(turn)
        return reading


RELEASE = threading.Event()


def obliging() -> Fixed:
    return Fixed(lambda turn: Interpretation((PriceConstraint(high=5.0), SearchWords((turn.message[:3],)))))


def raising() -> Fixed:
    return Fixed(lambda turn: 1 / 0)


def hanging() -> Fixed:
    return Fixed(lambda turn: RELEASE.wait(60))


def lying() -> Fixed:
    return Fixed(lambda turn: Interpretation((AttributeConstraint("colour", ("plaid",)),)))


def babbling() -> Fixed:
    return Fixed(lambda turn: "cheaper")


def inverted() -> Fixed:
    return Fixed(lambda turn: Interpretation((PriceConstraint(9.0, 1.0),)))


def pointing() -> Fixed:
    return Fixed(lambda turn: Interpretation((ItemPreference("not shown"),)))


async def test_a_shop_can_use_its_own_interpreter(shop: Shop) -> None:
    async with shop.serve(interpreter="tests.integration.test_custom_interpreter:obliging") as stub:
        answer = await Talk(stub).say("whatever is said")
        assert max(map(price, ids(answer))) == 5
        assert ([u.words for u in answer.active_constraints][1], list(answer.degraded)) == ("wha", [])


@pytest.mark.parametrize("name", ["raising", "hanging", "lying", "babbling", "inverted", "pointing"])
async def test_a_failing_interpreter_falls_back_to_the_built_in_one(all_in_one: Shop, name: str) -> None:
    RELEASE.clear()
    late = name == "hanging"

    try:
        async with all_in_one.serve(interpreter=f"tests.integration.test_custom_interpreter:{name}") as stub:
            for _ in range(2):
                answer = await asyncio.wait_for(Talk(stub).say("in red"), 30)
                assert [(d.stage, d.code) for d in answer.degraded] == [
                    ("interpret", pb.DEGRADATION_CODE_TIMEOUT if late else pb.DEGRADATION_CODE_FAILED)
                ]
                assert all(is_red(i) for i in ids(answer))
                assert len(answer.items) == 10
    finally:
        RELEASE.set()


@pytest.mark.parametrize(
    "name",
    [
        "nowhere:it",
        "tests.integration.test_custom_interpreter:nothing",
        "tests.integration.test_custom_interpreter:price",
        "json",
    ],
)
async def test_an_interpreter_that_does_not_load_stops_the_start(all_in_one: Shop, name: str) -> None:
    with pytest.raises(FailedPrecondition, match=f"interpreter '{name}'"):
        async with all_in_one.serve(interpreter=name):
            raise AssertionError("it started")


def test_the_built_in_interpreter_has_a_name() -> None:
    assert isinstance(
        load("services.gateway.conversation.language.interpreter:PhraseInterpreter"), PhraseInterpreter
    )

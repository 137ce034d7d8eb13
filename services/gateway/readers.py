"""Who reads messages: the built-in interpreter, or the shop's own, for which that stands in on bad days."""

import asyncio
import importlib
import logging
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from services import deadline
from services.errors import DeadlineExceeded, FailedPrecondition
from services.gateway.dialogue import (
    MAX_TEXTS,
    MAX_WORDS,
    PRICE,
    Change,
    Forget,
    Liking,
    Price,
    Reset,
    Values,
    Words,
)
from services.gateway.interpreter import MAX_CHANGES, MAX_STRANGE, Heard, Interpreter, Phrases, Reading

_THREADS = 8
_SHARE = 0.4
_LONGEST_WORD = 200
_log = logging.getLogger(__name__)


class Reader:
    """Reads by an interpreter of the shop's own, if there is one, and by the built-in one where that fails.

    The own one has `_SHARE` of the caller's deadline, or of `budget` seconds where there is none, and threads
    of its own, so that one that hangs holds up nothing else.
    """

    def __init__(self, own: Interpreter | None = None, budget: float = 2.0) -> None:
        self._own, self._phrases, self._budget = own, Phrases(), budget
        self._threads = ThreadPoolExecutor(_THREADS, "interpreter") if own is not None else None

    async def read(self, heard: Heard) -> tuple[Reading, Exception | None]:
        """What a message means, and what kept the own interpreter from saying so."""
        if self._own is None or self._threads is None:
            return await asyncio.to_thread(self._phrases.read, heard), None
        left = deadline.remaining()
        seconds = _SHARE * (self._budget if left is None else left)
        asked = replace(heard, seconds=seconds)
        reading = asyncio.get_running_loop().run_in_executor(self._threads, self._own.read, asked)
        try:
            found = await asyncio.wait_for(reading, seconds)
            check(found, heard)
        except TimeoutError:
            problem: Exception = DeadlineExceeded(f"no reading within {seconds:.2f} s")
        except Exception as error:  # whatever it raises
            _log.warning("the interpreter failed", exc_info=error)
            problem = error
        else:
            return found, None
        return await asyncio.to_thread(self._phrases.read, heard), problem

    def close(self) -> None:
        """Start no more readings."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


def load(named: str) -> Interpreter | None:
    """What MODULE:NAME gives when called; None for an empty name.

    Raises:
        FailedPrecondition: there is no such thing, or it gives no interpreter.
    """
    if not named:
        return None
    module, _, name = named.partition(":")
    try:
        made = getattr(importlib.import_module(module), name)()
    except Exception as error:
        raise FailedPrecondition(f"the interpreter {named!r} cannot be loaded: {error!r}") from error
    if not callable(getattr(made, "read", None)):
        raise FailedPrecondition(f"the interpreter {named!r} has no method read")
    loaded: Interpreter = made
    return loaded


def check(reading: Reading, heard: Heard) -> None:
    """Refuse a reading that says what cannot be; ValueError or TypeError tells what."""
    if not isinstance(reading, Reading):
        raise TypeError(f"is a {type(reading).__name__}, no Reading")
    if len(reading.changes) > MAX_CHANGES or len(reading.not_understood) > MAX_STRANGE:
        raise ValueError("says too much")
    _check_texts(reading.not_understood)
    known = {item.item_id for item in (*heard.shown, *([heard.focus] if heard.focus else []))}
    for change in reading.changes:
        if problem := _problem(change, heard, known):
            raise ValueError(problem)


def _problem(change: Change, heard: Heard, items: set[str]) -> str:
    """What is wrong with a change, or an empty string."""
    attributes = heard.vocabulary.known
    match change:
        case Values(attribute, texts, _):
            strange = set(texts) - attributes.get(attribute, frozenset())
            wrong = bool(strange) or not 0 < len(texts) <= MAX_TEXTS
            return f"{attribute!r} has no such values as {sorted(strange)}" if wrong else ""
        case Price(low, high, _):
            given = [bound for bound in (low, high) if bound is not None]
            fine = given and all(0 <= bound < math.inf for bound in given) and given == sorted(given)
            return "" if fine else f"{low} to {high} are no prices"
        case Liking(item_id, _):
            return "" if item_id in items else f"{item_id!r} is not shown"
        case Words(words, _):
            _check_texts(words)
            return "" if 0 < len(words) <= MAX_WORDS else f"has {len(words)} words"
        case Forget(attribute):
            return "" if attribute == PRICE or attribute in attributes else f"{attribute!r} is unknown"
        case Reset():
            return ""
    raise TypeError(f"{change!r} is no change")


def _check_texts(texts: Iterable[str]) -> None:
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text) <= _LONGEST_WORD or not text.isprintable():
            raise ValueError(f"{text!r} is no word")

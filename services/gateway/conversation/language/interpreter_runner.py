"""Runs the shop's own interpreter, if there is one, and falls back to the built-in interpreter."""

import asyncio
import importlib
import logging
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from services.core import deadline
from services.core.errors import DeadlineExceeded, FailedPrecondition
from services.core.executors import BoundedPool
from services.gateway.conversation.language.dialogue_state import (
    MAX_TEXTS,
    MAX_WORDS,
    PRICE,
    AttributeConstraint,
    Change,
    Forget,
    ItemPreference,
    PriceConstraint,
    Reset,
    SearchWords,
)
from services.gateway.conversation.language.interpreter import (
    MAX_CHANGES,
    MAX_UNRECOGNIZED,
    Interpretation,
    Interpreter,
    InterpreterInput,
    PhraseInterpreter,
)

_THREADS = 8
_DEADLINE_SHARE = 0.4
_MAX_WORD_LENGTH = 200
_log = logging.getLogger(__name__)


class InterpreterRunner:
    """Reads messages with the shop's own interpreter, and with the built-in one if that fails.

    The shop's interpreter has `_DEADLINE_SHARE` of the caller's deadline, or of `budget` seconds if there is
    none. It has its own threads, so a blocked one delays nothing else.
    """

    def __init__(self, pool: BoundedPool, custom: Interpreter | None = None, budget: float = 2.0) -> None:
        self._custom, self._builtin, self._budget, self._pool = custom, PhraseInterpreter(), budget, pool
        self._threads = ThreadPoolExecutor(_THREADS, "interpreter") if custom is not None else None

    async def read(self, request: InterpreterInput) -> tuple[Interpretation, Exception | None]:
        """The interpretation, and the error of the shop's interpreter if that failed."""
        if self._custom is None or self._threads is None:
            return await self._pool.run(partial(self._builtin.read, request)), None
        remaining = deadline.remaining()
        seconds = _DEADLINE_SHARE * (self._budget if remaining is None else remaining)
        read = partial(self._custom.read, replace(request, seconds=seconds))
        running = asyncio.get_running_loop().run_in_executor(self._threads, read)
        try:
            interpretation = await asyncio.wait_for(running, seconds)
            check(interpretation, request)
        except TimeoutError:
            problem: Exception = DeadlineExceeded(f"no interpretation within {seconds:.2f} s")
        except Exception as error:  # whatever it raises
            _log.warning("the interpreter failed", exc_info=error)
            problem = error
        else:
            return interpretation, None
        return await self._pool.run(partial(self._builtin.read, request)), problem

    def close(self) -> None:
        """Start no new calls."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


def load(spec: str) -> Interpreter | None:
    """The interpreter that MODULE:NAME returns when called; None for an empty `spec`.

    Raises:
        FailedPrecondition: the call fails, or its result is not an interpreter.
    """
    if not spec:
        return None
    module, _, name = spec.partition(":")
    try:
        interpreter: Interpreter = getattr(importlib.import_module(module), name)()
    except Exception as error:
        raise FailedPrecondition(f"the interpreter {spec!r} cannot be loaded: {error!r}") from error
    if not callable(getattr(interpreter, "read", None)):
        raise FailedPrecondition(f"the interpreter {spec!r} has no method read")
    return interpreter


def check(interpretation: Interpretation, request: InterpreterInput) -> None:
    """Validate an interpretation; raises ValueError or TypeError with the problem."""
    if not isinstance(interpretation, Interpretation):
        raise TypeError(f"the interpreter returned a {type(interpretation).__name__}, not an Interpretation")
    changes, unrecognized = interpretation.changes, interpretation.unrecognized
    if len(changes) > MAX_CHANGES or len(unrecognized) > MAX_UNRECOGNIZED:
        raise ValueError(
            f"the interpretation has {len(changes)} changes and {len(unrecognized)} unrecognized words, "
            f"at most {MAX_CHANGES} and {MAX_UNRECOGNIZED} are allowed"
        )
    _check_texts(unrecognized)
    item_ids = {item.item_id for item in (*request.shown, *([request.focus] if request.focus else []))}
    for change in changes:
        if problem := _problem(change, request, item_ids):
            raise ValueError(problem)


def _problem(change: Change, request: InterpreterInput, item_ids: set[str]) -> str:
    """The problem of a change, or an empty string."""
    attributes = request.vocabulary.attribute_texts
    match change:
        case AttributeConstraint(attribute, texts, _):
            unknown = set(texts) - attributes.get(attribute, frozenset())
            valid = not unknown and 0 < len(texts) <= MAX_TEXTS
            return "" if valid else f"attribute {attribute!r} has no such values as {sorted(unknown)}"
        case PriceConstraint(low, high, _):
            bounds = [bound for bound in (low, high) if bound is not None]
            finite = bounds and all(0 <= bound < math.inf for bound in bounds)
            return "" if finite and bounds == sorted(bounds) else f"{low} to {high} is not a price range"
        case ItemPreference(item_id, _):
            return "" if item_id in item_ids else f"item {item_id!r} is not shown"
        case SearchWords(words, _):
            _check_texts(words)
            valid = 0 < len(words) <= MAX_WORDS
            return "" if valid else f"there are {len(words)} search words, 1 to {MAX_WORDS} are allowed"
        case Forget(attribute):
            return "" if attribute == PRICE or attribute in attributes else f"{attribute!r} is unknown"
        case Reset():
            return ""
    raise TypeError(f"{change!r} is not a change")


def _check_texts(texts: Iterable[str]) -> None:
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text) <= _MAX_WORD_LENGTH or not text.isprintable():
            raise ValueError(f"{text!r} is not a word")

"""Runs long loops on the event loop in time slices, so that other calls run in between."""

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")
_SLICE_SECONDS = 0.005


async def convert(convert_one: Callable[[S], T], elements: Iterable[S]) -> list[T]:
    """Convert each element, in order; yields to other tasks every 5 milliseconds."""
    converted, end = list[T](), time.monotonic() + _SLICE_SECONDS
    for element in elements:
        converted.append(convert_one(element))
        if time.monotonic() >= end:
            await asyncio.sleep(0)
            end = time.monotonic() + _SLICE_SECONDS
    return converted

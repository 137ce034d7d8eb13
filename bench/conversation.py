"""The cost of a dialogue turn before its page is built: building a shop's vocabulary and reading a message.

Run `python -m bench.conversation --items 100000`.
"""

import argparse
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

from services.catalog.item_table import ItemTable
from services.catalog.items import Attribute, Item
from services.gateway.conversation.language.interpreter import InterpreterInput, PhraseInterpreter
from services.gateway.conversation.language.vocabulary import vocabulary_of

VALUES = {"brand": 5000, "category": 300, "colour": 50, "fabric": 20, "fit": 10, "line": 1000, "season": 5}
MESSAGES = {
    "a sentence": "cheaper, in red and not this brand, under 30 euros",
    "2,000 characters": "red or not " * 181,
    "2,000 characters that set no spaces": "不要这个" * 500,
}


def seconds(work: Callable[[], object]) -> float:
    """The shortest of three runs."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def sample_table(count: int) -> ItemTable:
    """A table of random items, each with a value of every attribute."""
    generator = random.Random(0)  # noqa: S311 - reproducible
    items = [
        Item(
            f"i{n}",
            attributes=tuple(Attribute(a, (f"{a} v{generator.randrange(m)}",)) for a, m in VALUES.items()),
            price=round(generator.uniform(1, 100), 2),
        )
        for n in range(count)
    ]
    return ItemTable.of(items, {}, {}, [datetime.now(UTC)] * count)


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=100_000)
    table = sample_table(parser.parse_args().items)
    keys: dict[str, tuple[str, ...]] = {}
    first, later = seconds(lambda: vocabulary_of(table, {})), seconds(lambda: vocabulary_of(table, keys))
    vocabulary = vocabulary_of(table, keys)
    print(f"a first vocabulary, {len(vocabulary.values):,} values: {first:.3f} s")  # noqa: T201 - the answer
    print(f"another, after a change: {later:.3f} s")  # noqa: T201
    for name, message in MESSAGES.items():
        interpreter_input = InterpreterInput(message, "en", vocabulary)
        duration = seconds(partial(PhraseInterpreter().read, interpreter_input))
        print(f"{name}: {1000 * duration:.2f} ms")  # noqa: T201


if __name__ == "__main__":
    main()

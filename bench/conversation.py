"""What a turn of a dialogue costs before its page is made: a shop's vocabulary, and the reading of a message.

Run `python -m bench.conversation --items 100000`.
"""

import argparse
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

from services.catalog import Attribute, Item
from services.gateway.interpreter import Heard, Phrases
from services.gateway.vocabulary import vocabulary_of
from services.item_table import ItemTable

VALUES = {"brand": 5000, "category": 300, "colour": 50, "fabric": 20, "fit": 10, "line": 1000, "season": 5}
MESSAGES = {
    "a sentence": "cheaper, in red and not this brand, under 30 euros",
    "2,000 characters": "red or not " * 181,
    "2,000 characters that set no spaces": "不要这个" * 500,
}


def seconds(work: Callable[[], object]) -> float:
    """The least time of three."""
    took = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)


def drawn(count: int) -> ItemTable:
    """A table of drawn items, each with a value of every attribute."""
    draw = random.Random(0)  # noqa: S311 - drawn again the same
    items = [
        Item(
            f"i{n}",
            attributes=tuple(Attribute(a, (f"{a} v{draw.randrange(m)}",)) for a, m in VALUES.items()),
            price=round(draw.uniform(1, 100), 2),
        )
        for n in range(count)
    ]
    return ItemTable.of(items, {}, {}, [datetime.now(UTC)] * count)


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=100_000)
    table = drawn(parser.parse_args().items)
    keys: dict[str, tuple[str, ...]] = {}
    first, later = seconds(lambda: vocabulary_of(table, {})), seconds(lambda: vocabulary_of(table, keys))
    vocabulary = vocabulary_of(table, keys)
    print(f"a first vocabulary, {len(vocabulary.values):,} values: {first:.3f} s")  # noqa: T201 - the answer
    print(f"another, after a change: {later:.3f} s")  # noqa: T201
    for name, message in MESSAGES.items():
        heard = Heard(message, "en", vocabulary)
        took = seconds(partial(Phrases().read, heard))
        print(f"{name}: {1000 * took:.2f} ms")  # noqa: T201


if __name__ == "__main__":
    main()

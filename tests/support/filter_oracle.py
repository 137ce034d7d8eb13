"""An oracle of filters: each item by itself, by the words of the contract."""

from services.catalog.filters import AllOf, AnyOf, Equals, Filter, In, NoneOf, Range
from services.catalog.items import Item


def matches(condition: Filter, item: Item) -> bool:
    """The oracle: what the contract's comments say, read literally."""
    texts = {a.name: set(a.texts) for a in item.attributes} | {
        "id": {item.id},
        "family_id": {item.family_id} - {""},
    }
    numbers = {a.name: set(a.numbers) for a in item.attributes} | {"price": {item.price} - {None}}
    match condition:
        case AllOf(parts):
            return all(matches(part, item) for part in parts)
        case AnyOf(parts):
            return any(matches(part, item) for part in parts)
        case NoneOf(part):
            return not matches(part, item)
        case Equals(name, str() as text):
            return text in texts.get(name, ())
        case Equals(name, number):
            return number in numbers.get(name, ())
        case In(name, of_these):
            return bool(texts.get(name, set()) & of_these)
        case Range(name, low, high):
            return any(
                (low is None or n >= low) and (high is None or n <= high)
                for n in numbers.get(name, ())
                if n is not None
            )
    raise AssertionError(condition)

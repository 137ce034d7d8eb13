"""Numbers with their nouns, for sentences."""


def plural(number: int, noun: str) -> str:
    """The number with the noun, which takes an s: 1 day, 2,000 days."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"

"""Checks by the items in common whether a catalog and a state belong to the same shop."""

_MIN_COMMON_SHARE = 0.01


def another_shop(common: int, incoming: int, present: int) -> str:
    """Why a catalog of `incoming` items is not of the shop whose `present` items are served, or "".

    `common` items have the same id and the same title in both. Small numeric ids occur in every shop, so the
    title counts too. A shop that replaces all its items at once needs --allow-other-shop.
    """
    if not incoming or not present or common >= _MIN_COMMON_SHARE * min(incoming, present):
        return ""
    return (
        f"{present} items are served, {incoming} come in, and {common} have the same id and title in both: "
        "is this the catalog of another shop?"
    )

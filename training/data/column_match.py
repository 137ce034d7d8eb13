"""Match the columns of a table with the fields of shop.toml, and suggest columns for missing ones.

Compares names alone, not the content of columns.
"""

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from training.data.config import EventColumns, ItemColumns

FIELDS = {
    "items": (
        "id",
        "title",
        "description",
        "family_id",
        "price",
        "available_from",
        "available_until",
        "image",
        "image_url",
    ),
    "events": (
        "event_id",
        "user_id",
        "item_id",
        "session_id",
        "type",
        "time",
        "price",
        "quantity",
        "position",
        "channel",
    ),
}
LISTS = ("text_attributes", "number_attributes", "filter_only")
_REQUIRED = {"items": ("id",), "events": ("user_id", "item_id", "time")}
_SYNONYMS = {
    "id": ("item_id", "product_id", "sku", "stock_code", "variant_sku", "article_id", "asin", "handle"),
    "title": ("name", "product_name", "product_title", "item_name", "product_display_name", "label"),
    "description": ("body", "body_html", "text", "long_description", "details", "summary"),
    "family_id": ("item_group_id", "parent_id", "parent_asin", "handle", "product_group", "group_id"),
    "price": ("unit_price", "sale_price", "variant_price", "regular_price", "amount", "value"),
    "event_id": ("id", "uuid", "insert_id", "message_id"),
    "user_id": ("user", "customer_id", "visitor_id", "client_id", "person", "user_pseudo_id", "uid"),
    "item_id": ("item", "product_id", "sku", "stock_code", "article_id", "asin", "parent_asin", "movie_id"),
    "session_id": (
        "session",
        "user_session",
        "invoice_no",
        "order_id",
        "visit_id",
        "ga_session_id",
        "basket",
    ),
    "type": ("event_type", "event", "event_name", "action", "behavior", "behavior_type", "kind"),
    "time": (
        *("timestamp", "event_time", "date", "datetime", "invoice_date", "created_at", "event_timestamp"),
        *("ts", "unix_time"),
    ),
    "quantity": ("qty", "count", "units"),
    "position": ("rank", "slot"),
    "channel": ("source", "platform", "device"),
}
_CUTOFF = 0.75
# For these fields suggest columns with a suffix too: name_en, price_eur.
_WITH_ENDING = ("id", "user_id", "item_id", "time", "title", "description", "price")


@dataclass(frozen=True)
class Match:
    """The columns of a table by field; `attributes` by name in shop.toml; `unused` are the others.

    A table with `problems` is not used; `warnings` are about empty fields for which a similar column exists;
    `notes` are about the others.
    """

    fields: dict[str, str]
    attributes: dict[str, str]
    unused: tuple[str, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def match_columns(
    file: str,
    names: Sequence[str],
    section: str,
    columns: ItemColumns | EventColumns,
    types: Collection[str] = (),
) -> Match:
    """The match of a file's column `names` with a section of shop.toml, "items" or "events".

    A column whose name differs only in case or surrounding spaces is used, with a note; any other similar
    name is only suggested. `types` are the event types of shop.toml, the default one first.
    """
    explicit = columns.model_fields_set
    matched, problems, warnings, notes = dict[str, str](), list[str](), list[str](), list[str]()
    attributes, absent = dict[str, str](), list[str]()
    settings = [(field, getattr(columns, field), field in explicit) for field in FIELDS[section]]
    settings += [(name, name, True) for part in LISTS for name in getattr(columns, part, ())]
    exact = {name for _, name, _ in settings} & set(names)
    for index, (field, name, is_explicit) in enumerate(settings):
        if not name:
            continue
        target = matched if index < len(FIELDS[section]) else attributes
        column = _find_column(name, names, exact)
        if column:
            target[field] = column
            if column != name:
                notes.append(f"column {column!r} is read as {name!r}, which differs only in case or spaces")
            continue
        candidates = similar_columns(
            field if target is matched else name, name, [n for n in names if n not in exact]
        )
        advice = _advice(section, field if target is matched else "", candidates)
        if is_explicit or field in _REQUIRED[section]:
            has = ", ".join(names)
            problems.append(f"{file} has no column {name!r}{advice}; it has {has}")
        elif field == "type" and (len(types) > 1 or candidates):
            problems.append(
                f"{file} has no column {name!r}{advice}; without it the type of every event is "
                f'{next(iter(types), "")!r}: if that is correct, write type = "" under [events]'
            )
        elif candidates:
            warnings.append(f"no column {name!r}{advice}")
        else:
            absent.append(name)
    if absent:
        notes.append(f"no column {', '.join(absent)}: optional, left empty")
    used_columns = {*matched.values(), *attributes.values()}
    unused = tuple(name for name in names if name not in used_columns)
    return Match(matched, attributes, unused, tuple(problems), tuple(warnings), tuple(notes))


def similar_columns(field: str, name: str, names: Sequence[str]) -> list[str]:
    """At most three columns that `name` may mean for a field, most similar first."""
    plain = {other: re.sub(r"[\W_]", "", other).casefold() for other in names}
    target = re.sub(r"[\W_]", "", name).casefold()
    synonyms = [re.sub(r"[\W_]", "", other) for other in (field, *_SYNONYMS.get(field, ()))]
    matches = [other for synonym in (target, *synonyms) for other in names if plain[other] == synonym]
    if field in _WITH_ENDING:
        words = {other: _words(other) for other in names if re.fullmatch(r"[\w .:-]+", other)}
        beginnings = [_words(synonym) for synonym in (field, *_SYNONYMS.get(field, ()))]
        matches += [other for start in beginnings for other in words if words[other][: len(start)] == start]
    close = difflib.get_close_matches(target, list(plain.values()), n=3, cutoff=_CUTOFF)
    matches += [other for word in close for other in names if plain[other] == word]
    return list(dict.fromkeys(matches))[:3]


def _words(name: str) -> list[str]:
    """The words of a column's name: "name_en", "name-en" and "nameEn" have two."""
    return re.findall(r"[^\W_]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).casefold())


def _find_column(name: str, names: Sequence[str], exact: Collection[str]) -> str:
    if name in names:
        return name
    matches = [n for n in names if n.strip().casefold() == name.strip().casefold() and n not in exact]
    return matches[0] if len(matches) == 1 else ""


def _advice(section: str, field: str, candidates: Sequence[str]) -> str:
    if not candidates:
        return ""
    names = " or ".join(repr(name) for name in candidates)
    return f": did you mean {names}?" + (
        f' Write {field} = "{candidates[0]}" under [{section}]' if field else ""
    )

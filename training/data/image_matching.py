"""Which image file belongs to which item: by columns of the items file, else by the file's name.

Knows names alone, neither files nor images.
"""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

_NUMBERED = re.compile(r"(.+?)[_\-. ]+\(?(\d{1,4})\)?")
_SEPARATORS = re.compile(r"[,|;\n]")
_LAST_NUMBER = 10_000
# What names the folders of uploads in place of items: 2024/11, and 1/2/3, the digits of a number.
_DATE_FOLDERS = re.compile(r"(.*/)?(19|20)\d\d/\d{1,2}(/\d{1,2})?")
_DIGIT_FOLDERS = re.compile(r"(.*/)?\w/\w")
_EXACT, _WITH_NUMBER, _FOLDER, _FOLDED = range(4)


@dataclass
class ImageMatch:
    """`of_item` is the file of each item, `further` are more files of such items, `unmatched` those of none.

    `by_folder` counts the items whose file is theirs by the name of its folder alone.
    `missing` and `addresses` hold an item whose columns name no file that is there, with the first name or
    address in them.
    """

    of_item: dict[str, str] = field(default_factory=dict)
    further: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)
    by_folder: int = 0


def match(files: Sequence[str], cells: Mapping[str, Sequence[object]]) -> ImageMatch:
    """Match files, by their paths, with items; `cells` are the values of each item's image columns.

    A column's value comes first: names or addresses, of which the first that is there counts. Then a file
    belongs to the item of its name (`ID.jpg`), of its name without a number (`ID_1.jpg`, `ID-2.jpg`,
    `ID (3).jpg`), or of the folder it lies in (`ID/1.jpg`); where none has that id exactly, to one whose id
    differs in case alone. A folder that stands for a date (`2024/11`) or for a character of a name (`1/2`,
    `m/b`, or where every folder is a digit) is no item's. Of several files of an item the first by number,
    then by name, counts.
    """
    result = ImageMatch()
    _by_columns(files, cells, result)
    ids = _Ids(cells, folders=not _spread_by_digit(files))
    candidates: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    used = set(result.of_item.values())
    for name in sorted(files):
        owner = ids.owner(name)
        if owner is not None:
            candidates[owner[0]].append((*owner[1:], name))
        elif name not in used:
            result.unmatched.append(name)
    for item_id, names in candidates.items():
        tier, _, name = min(names)
        if item_id not in result.of_item:
            result.of_item[item_id] = name
            result.by_folder += tier in (_FOLDER, _FOLDED + _FOLDER)
    used = set(result.of_item.values())
    result.further = sorted(name for names in candidates.values() for *_, name in names if name not in used)
    for unresolved in (result.missing, result.addresses):
        for item_id in unresolved.keys() & result.of_item.keys():
            del unresolved[item_id]
    return result


def references(cell: object) -> list[str]:
    """The names or addresses in a value: a list, JSON of one, or a text of several between , | or ;."""
    if cell is None:
        return []
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = json.loads(cell)
        except ValueError:
            cell = str(cell)
    if isinstance(cell, list):
        return [text for value in cell if (text := str(value or "").strip())]
    text = str(cell).strip()
    parts = [part.strip() for part in _SEPARATORS.split(text)]
    # A name may hold a separator: it is tried as it stands first.
    return list(dict.fromkeys(part for part in [text, *parts] if part))


def _by_columns(files: Sequence[str], cells: Mapping[str, Sequence[object]], result: ImageMatch) -> None:
    if not any(cells.values()):
        return
    file_of_key: dict[str, str] = {}
    for name in sorted(files):
        path = PurePosixPath(name)
        for key in (name, path.name):
            file_of_key.setdefault(_fold(key), name)
    for item_id, values in cells.items():
        names = [reference for value in values for reference in references(value)]
        for reference in names:
            file = next((file_of_key[key] for key in _keys(reference) if key in file_of_key), None)
            if file is not None:
                result.of_item[item_id] = file
                break
        else:
            if names:
                target = result.addresses if _is_address(names[-1]) else result.missing
                target[item_id] = names[-1]


def _is_address(reference: str) -> bool:
    return "://" in reference or reference.startswith("//")


def _keys(reference: str) -> list[str]:
    """The paths that a name or an address may stand for, the longest first."""
    path = unquote(urlsplit(reference).path) if _is_address(reference) else reference.replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if _is_address(reference):
        parts = parts[-1:]
    return [_fold("/".join(parts[start:])) for start in range(len(parts))]


class _Ids:
    """The ids of a shop, exact and by what is left of them without case."""

    def __init__(self, ids: Mapping[str, object], *, folders: bool) -> None:
        self._folders = folders
        self._exact = set(ids)
        self._folded: dict[str, str] = {}
        ambiguous = set()
        for item_id in ids:
            if self._folded.setdefault(_fold(item_id), item_id) != item_id:
                ambiguous.add(_fold(item_id))
        for key in ambiguous:
            del self._folded[key]

    def owner(self, name: str) -> tuple[str, int, int] | None:
        """The item of a file, how it was matched, and the number of the file among those of the item."""
        path = PurePosixPath(name)
        keys = [(path.stem, _EXACT, 0)]
        if suffix := _NUMBERED.fullmatch(path.stem):
            keys.append((suffix[1], _WITH_NUMBER, int(suffix[2])))
        number = re.search(r"\d{1,4}", path.stem)
        if self._folders and _may_be_item(path.parent):
            keys.append((path.parent.name, _FOLDER, int(number[0]) if number else _LAST_NUMBER))
        for key, tier, order in keys:
            if key in self._exact:
                return key, tier, order
        for key, tier, order in keys:
            if (item_id := self._folded.get(_fold(key))) is not None:
                return item_id, _FOLDED + tier, order
        return None


def _spread_by_digit(files: Sequence[str]) -> bool:
    """Whether every folder is named by one digit, by which files are spread."""
    folders = {PurePosixPath(name).parent.name for name in files} - {""}
    return bool(folders) and all(re.fullmatch(r"\d", folder) for folder in folders)


def _may_be_item(folder: PurePosixPath) -> bool:
    path = folder.as_posix()
    return bool(folder.name) and not _DATE_FOLDERS.fullmatch(path) and not _DIGIT_FOLDERS.fullmatch(path)


def _fold(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()

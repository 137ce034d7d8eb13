"""The images of a shop: files and archives, matched with items and read on demand."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from services.core.errors import InvalidArgument
from services.embedding.images.headers import NAMES
from training.data.image_files import StoredFile, files_below
from training.data.image_matching import ImageMatch, match

HASHES = "hashes.json"
_EXAMPLES = 5


@dataclass(frozen=True)
class ImageReport:
    """The files of the image directory, by count and name; no image is decoded.

    `other` are files without an image extension; `matching` covers the others.
    """

    files: int
    items: int
    matching: ImageMatch
    other: Sequence[str]

    @property
    def summary(self) -> str:
        """The counts in a sentence."""
        matches = self.files - len(self.matching.unmatched)
        extra = len(self.matching.further)
        by_folder = self.matching.by_folder
        folders = f" ({by_folder} of them by the name of its folder alone)" if by_folder else ""
        return (
            f"images: {self.files} files, {matches} match an item; {len(self.matching.of_item)} of "
            f"{self.items} items have an image{folders}, {extra} files are additional images and are "
            "not used"
        )

    @property
    def problems(self) -> list[str]:
        """One sentence per kind of unused file, with examples and advice."""
        matching, sentences = self.matching, []
        if matching.unmatched:
            sentences.append(
                f"{len(matching.unmatched)} image files match no item ({examples(matching.unmatched)}): "
                "name a file ID.jpg, ID_1.jpg or ID-2.jpg, put it into a folder named ID, or name the "
                "column that holds file names as image under [items] in shop.toml"
            )
        if self.other:
            suffixes = Counter(PurePosixPath(name).suffix.lower() or "no extension" for name in self.other)
            counts = ", ".join(f"{suffix} {count}" for suffix, count in suffixes.most_common(_EXAMPLES))
            sentences.append(
                f"{len(self.other)} files have no image extension ({counts}; {examples(self.other)}): "
                f"{NAMES} are read, also in .zip, .tar and .tar.gz; convert others"
            )
        if matching.missing:
            sentences.append(
                f"{len(matching.missing)} items name an image file that does not exist "
                f"({examples(_pairs(matching.missing))}): copy it into images/"
            )
        if matching.addresses:
            sentences.append(
                f"{len(matching.addresses)} items name their image only by a URL "
                f"({examples(_pairs(matching.addresses))}): training downloads nothing; "
                "copy the images into images/, named as the last part of the URL or as the item's id"
            )
        return sentences


class ShopImages:
    """The images in a directory, which may be missing.

    Until `assign` matches the files with items, each file belongs to the item of its file name.

    Raises:
        FailedPrecondition: an archive is damaged or encrypted.
    """

    def __init__(self, directory: Path) -> None:
        files = list(files_below(directory))
        self._files = {file.name: file for file in files if file.is_image}
        self._other = [file.name for file in files if not file.is_image]
        self._of_item: dict[str, StoredFile] = {}
        for file in self._files.values():
            self._of_item.setdefault(PurePosixPath(file.name).stem, file)
        self._report = ImageReport(len(self._files), 0, ImageMatch(), self._other)

    def assign(self, ids: Sequence[str], *columns: Sequence[object]) -> None:
        """Match the files with the items `ids`; `columns` hold file names or addresses, a value per item."""
        cells = {item_id: tuple(values) for item_id, *values in zip(ids, *columns, strict=True) if item_id}
        matching = match(list(self._files), cells)
        self._of_item = {item_id: self._files[name] for item_id, name in matching.of_item.items()}
        self._report = ImageReport(len(self._files), len(cells), matching, self._other)

    @property
    def report(self) -> ImageReport:
        """The report of the last `assign`."""
        return self._report

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._of_item

    def __len__(self) -> int:
        return len(self._of_item)

    def name(self, item_id: str) -> str:
        """The path of an item's file below the directory; KeyError when it has none."""
        return self._of_item[item_id].name

    def stamp(self, item_id: str) -> str:
        """A text that changes with the item's file: its path, size and modification time."""
        file = self._of_item[item_id]
        return f"{file.name} {file.stamp}"

    def read(self, item_id: str) -> bytes:
        """The file of an item; KeyError when it has none.

        Raises:
            InvalidArgument: the file cannot be read.
        """
        file = self._of_item[item_id]
        try:
            return file.read()
        except Exception as error:  # a zip of an unknown compression, a file that is gone or not ours
            raise InvalidArgument.of(file.name, f"cannot be read: {error}") from None


def write_hashes(directory: Path, images: ShopImages, ids: Sequence[str]) -> None:
    """Write the BLAKE2b of each item's file; one that cannot be read is reported when it is decoded."""
    hashes = {}
    for item_id in ids:
        if item_id in images:
            with suppress(InvalidArgument):
                hashes[item_id] = hashlib.blake2b(images.read(item_id), digest_size=32).hexdigest()
    (directory / HASHES).write_text(json.dumps(hashes))


def examples(names: Sequence[str]) -> str:
    """The first few of some names."""
    return ", ".join(names[:_EXAMPLES]) + (", ..." if len(names) > _EXAMPLES else "")


def _pairs(names: Mapping[str, str]) -> list[str]:
    return [f"{item_id}: {name}" for item_id, name in names.items()]

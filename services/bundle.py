"""A bundle: everything the services load, in a directory per version that never changes.

    manifest.json     version, the shop's profile, and of every file its SHA-256
    catalogue/        the items trained on, with their vectors
    text/ image/      the encoders
    graph/ …          one directory per further component
    report/           what training found it to be worth

Written aside and renamed, so that a directory with a manifest is whole. Knows nothing of
what the components mean.
"""

import gzip
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from services.catalog import Attribute, Item
from services.errors import FailedPrecondition

SCHEMA = 4
MANIFEST = "manifest.json"
REPORT = "report"
_ITEMS = "items.jsonl.gz"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Profile:
    """What the services must know of a shop.

    `event_types` maps a type to its weight as an interest, `targets` are those that count as
    bought, `granularity` is "hour" or "day", `attributes` and `numbers` are the text and number
    attributes that features look at.
    """

    event_types: Mapping[str, float] = field(default_factory=lambda: {"purchase": 1.0})
    targets: Sequence[str] = ("purchase",)
    granularity: str = "hour"
    attributes: Sequence[str] = ()
    numbers: Sequence[str] = ()


@dataclass(frozen=True)
class Catalogue:
    """The items of a bundle; of each space `vectors` float16 (N, D) and `present` bool (N,)."""

    items: Sequence[Item]
    vectors: Mapping[str, np.ndarray]
    present: Mapping[str, np.ndarray]


class Bundle:
    """A published bundle.

    Raises:
        FailedPrecondition: there is none, it is of another schema, or a file is not the one
            that was published.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = newest(directory)
        manifest = json.loads((self.directory / MANIFEST).read_text())
        if manifest["schema"] != SCHEMA:
            raise FailedPrecondition(
                f"{self.directory} has schema {manifest['schema']}, this version reads {SCHEMA}"
            )
        for name, expected in manifest["files"].items():
            if _sha256(self.directory / name) != expected:
                raise FailedPrecondition(f"{self.directory / name} is not the file that was published")
        self.version: str = manifest["version"]
        self.until = datetime.fromisoformat(manifest["until"]) if manifest["until"] else None
        self.profile = Profile(**manifest["profile"])

    def component(self, name: str) -> Path | None:
        """The directory of a component, None when the bundle has none of it."""
        path = self.directory / name
        return path if path.is_dir() else None

    def catalogue(self) -> Catalogue:
        """Read the items and their vectors."""
        directory = self.directory / "catalogue"
        with gzip.open(directory / _ITEMS, "rt", encoding="utf-8") as lines:
            items = [_item(json.loads(line)) for line in lines]
        spaces = sorted(path.name.removesuffix(".present.npy") for path in directory.glob("*.present.npy"))
        return Catalogue(
            items,
            {space: np.load(directory / f"{space}.npy") for space in spaces},
            {space: np.load(directory / f"{space}.present.npy") for space in spaces},
        )


def write_catalogue(directory: Path, catalogue: Catalogue) -> None:
    """Write the catalogue component."""
    directory.mkdir(parents=True)
    with gzip.GzipFile(directory / _ITEMS, "wb", mtime=0) as out:
        for item in catalogue.items:
            out.write(json.dumps(_document(item), ensure_ascii=False).encode() + b"\n")
    for space, vectors in catalogue.vectors.items():
        np.save(directory / f"{space}.npy", vectors.astype(np.float16))
        np.save(directory / f"{space}.present.npy", catalogue.present[space])


def publish(
    staged: Path, bundles: Path, profile: Profile, until: datetime | None, *, report: bool = True
) -> Path:
    """Turn a directory of components into a bundle under `bundles`; its path.

    `staged` must be on the same file system and is moved. The version begins with the time
    of `until`, or of publishing, and ends in a digest of the content and its schema. A bundle of this
    version that is there already gets the new `report`, or keeps its own.
    """
    # The report tells of the run, how long it took among other things: it does not make a version.
    files = {
        path.relative_to(staged).as_posix(): _sha256(path)
        for path in sorted(staged.rglob("*"))
        if path.is_file() and staged / REPORT not in path.parents
    }
    content = json.dumps([SCHEMA, files, asdict(profile)], sort_keys=True).encode()
    digest = hashlib.blake2b(content, digest_size=6).hexdigest()
    version = f"{(until or datetime.now(UTC)):%Y%m%dT%H%M%S}-{digest}"
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "version": version,
        "until": until.isoformat() if until else None,
        "profile": asdict(profile),
        "files": files,
    }
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    bundles.mkdir(parents=True, exist_ok=True)
    target = bundles / version
    if not target.exists():
        staged.rename(target)
    elif report and (staged / REPORT).is_dir():
        # First what lists the files: earlier ones listed the report's too, and would not know the new one.
        (staged / MANIFEST).replace(target / MANIFEST)
        shutil.rmtree(target / REPORT, ignore_errors=True)
        (staged / REPORT).rename(target / REPORT)
    return target


def published(directory: Path) -> list[Path]:
    """Bundles' directories, itself or those in it, the newest last; FailedPrecondition when there is none."""
    if (directory / MANIFEST).is_file():
        return [directory]
    found = sorted(path.parent for path in directory.glob(f"[!.]*/{MANIFEST}"))
    if not found:
        raise FailedPrecondition(f"{directory} holds no bundle; `vitrine train` makes one")
    return found


def newest(directory: Path) -> Path:
    """The last of them."""
    return published(directory)[-1]


def manifest_of(directory: Path) -> Mapping[str, Any]:
    """What a bundle says of itself, without a look at its files; nothing if it cannot be read."""
    try:
        read = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def version_of(directory: Path) -> str:
    """The version of the bundle in a directory; "" if it cannot be read."""
    return str(manifest_of(directory).get("version", ""))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _document(item: Item) -> dict[str, Any]:
    document = {
        "id": item.id,
        "title": item.title,
        "description": item.description,
        "attributes": [[a.name, a.texts, a.numbers] for a in item.attributes],
        "family_id": item.family_id,
        "price": item.price,
        "image_hash": item.image_hash.hex(),
        "available_from": item.available_from and item.available_from.isoformat(),
        "available_until": item.available_until and item.available_until.isoformat(),
    }
    return {name: value for name, value in document.items() if value}


def _item(document: dict[str, Any]) -> Item:
    attributes = tuple(Attribute(n, tuple(t), tuple(v)) for n, t, v in document.pop("attributes", ()))
    parsed: dict[str, Any] = {
        "attributes": attributes,
        "image_hash": bytes.fromhex(document.pop("image_hash", "")),
    }
    for name in ("available_from", "available_until"):
        if name in document:
            parsed[name] = datetime.fromisoformat(document.pop(name))
    return Item(**parsed, **document)


def created(item: Item) -> datetime:
    """When an item of a bundle came to the shop: when it became available, else long ago."""
    return item.available_from or _EPOCH

"""A bundle: everything that the services load, in a directory per version that never changes.

    manifest.json     the version, the shop's schema, and the SHA-256 of every file
    catalog/          the items trained on, with their vectors
    text/ image/      the encoders
    graph/ …          one directory per further component
    report/           the results of the evaluation

A bundle is written to another directory and renamed, so a directory with a manifest is complete. This
module does not interpret the components.
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

from services.catalog.items import Attribute, Item
from services.core.errors import FailedPrecondition

SCHEMA = 5
MANIFEST = "manifest.json"
REPORT = "report"
_ITEMS = "items.jsonl.gz"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class ShopSchema:
    """The shop's settings that the services need.

    `event_types` maps an event type to its weight in a user's history. `targets` are the types that count as
    purchases. `granularity` is "10min", "hour" or "day". `attributes` and `numbers` are the text and number
    attributes that features use.
    """

    event_types: Mapping[str, float] = field(default_factory=lambda: {"purchase": 1.0})
    targets: Sequence[str] = ("purchase",)
    granularity: str = "hour"
    attributes: Sequence[str] = ()
    numbers: Sequence[str] = ()


@dataclass(frozen=True)
class BundleCatalog:
    """The items of a bundle; for each space `vectors` float16 (N, D) and `present` bool (N,)."""

    items: Sequence[Item]
    vectors: Mapping[str, np.ndarray]
    present: Mapping[str, np.ndarray]


class Bundle:
    """A published bundle.

    Raises:
        FailedPrecondition: there is no bundle, it has another schema version, or a file differs from the
            published one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = newest(directory)
        manifest = _verified_manifest(self.directory)
        self.version: str = manifest["version"]
        self.until = datetime.fromisoformat(manifest["until"]) if manifest["until"] else None
        self.profile = ShopSchema(**manifest["profile"])

    def component(self, name: str) -> Path | None:
        """The directory of a component, None when the bundle does not have it."""
        path = self.directory / name
        return path if path.is_dir() else None

    def catalog(self) -> BundleCatalog:
        """Read the items and their vectors."""
        directory = self.directory / "catalog"
        with gzip.open(directory / _ITEMS, "rt", encoding="utf-8") as lines:
            items = [_item(json.loads(line)) for line in lines]
        spaces = sorted(path.name.removesuffix(".present.npy") for path in directory.glob("*.present.npy"))
        return BundleCatalog(
            items,
            {space: np.load(directory / f"{space}.npy") for space in spaces},
            {space: np.load(directory / f"{space}.present.npy") for space in spaces},
        )


def write_catalog(directory: Path, catalog: BundleCatalog) -> None:
    """Write the catalog component."""
    directory.mkdir(parents=True)
    with gzip.GzipFile(directory / _ITEMS, "wb", mtime=0) as file:
        for item in catalog.items:
            file.write(json.dumps(_document(item), ensure_ascii=False).encode() + b"\n")
    for space, vectors in catalog.vectors.items():
        np.save(directory / f"{space}.npy", vectors.astype(np.float16))
        np.save(directory / f"{space}.present.npy", catalog.present[space])


def publish(
    staged: Path, bundles: Path, profile: ShopSchema, until: datetime | None, *, report: bool = True
) -> Path:
    """Turn a directory of components into a bundle under `bundles`; returns its path.

    `staged` must be on the same file system and is moved. The version starts with the time of publishing, so
    that the newest bundle is the one that was made last, and ends with a digest of the content and its
    schema. If the newest bundle has the same content and `until`, it gets the new report where `report` is
    true, and else keeps its own.
    """
    # The report describes the run, for example its duration, so it does not change the version.
    files = {
        path.relative_to(staged).as_posix(): _sha256(path)
        for path in sorted(staged.rglob("*"))
        if path.is_file() and staged / REPORT not in path.parents
    }
    content = json.dumps([SCHEMA, files, asdict(profile)], sort_keys=True).encode()
    digest = hashlib.blake2b(content, digest_size=6).hexdigest()
    end = until.isoformat() if until else None
    bundles.mkdir(parents=True, exist_ok=True)
    latest = max((path.parent.name for path in bundles.glob(f"[!.]*/{MANIFEST}")), default="")
    is_same = latest.endswith(f"-{digest}") and manifest_of(bundles / latest).get("until") == end
    version = latest if is_same else f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{digest}"
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "version": version,
        "until": end,
        "profile": asdict(profile),
        "files": files,
    }
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    target = bundles / version
    if not target.exists():
        staged.rename(target)
    elif report and (staged / REPORT).is_dir():
        # First the manifest: older ones list the files of the report too, and do not match the new report.
        (staged / MANIFEST).replace(target / MANIFEST)
        shutil.rmtree(target / REPORT, ignore_errors=True)
        (staged / REPORT).rename(target / REPORT)
    return target


def published(directory: Path) -> list[Path]:
    """The bundle in `directory`, or those under it, newest last; FailedPrecondition if there is none."""
    if (directory / MANIFEST).is_file():
        return [directory]
    directories = sorted(path.parent for path in directory.glob(f"[!.]*/{MANIFEST}"))
    if not directories:
        raise FailedPrecondition(f"{directory} contains no bundle; `vitrine train` creates one")
    return directories


def newest(directory: Path) -> Path:
    """The directory of the newest bundle."""
    return published(directory)[-1]


def manifest_of(directory: Path) -> Mapping[str, Any]:
    """The manifest of a bundle, without a check of its files; empty if it cannot be read."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def version_of(directory: Path) -> str:
    """The version of the bundle in a directory; empty if it cannot be read."""
    return str(manifest_of(directory).get("version", ""))


def _verified_manifest(directory: Path) -> Mapping[str, Any]:
    """The manifest of a bundle, after a check that its files are the published ones."""
    advice = "copy the bundle here again, or train again"
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        schema, files = manifest["schema"], dict(manifest["files"])
        if schema == SCHEMA:
            ShopSchema(**manifest["profile"])
            str(manifest["version"]), manifest["until"] and datetime.fromisoformat(manifest["until"])
    except (ValueError, TypeError, KeyError) as error:
        raise FailedPrecondition(f"{directory / MANIFEST} is damaged ({error!r}): {advice}") from None
    if schema != SCHEMA:
        raise FailedPrecondition(
            f"{directory} has schema {schema}, this version of Vitrine reads {SCHEMA}: train again"
        )
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            raise FailedPrecondition(f"{path} is missing from the bundle: {advice}")
        if _sha256(path) != expected:
            raise FailedPrecondition(f"{path} is not the file that was published: {advice}")
    return manifest  # type: ignore[no-any-return]  # an object, as its keys show


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


def creation_time(item: Item) -> datetime:
    """The creation time of an item of a bundle: the start of its availability, or 1970 if it has none."""
    return item.available_from or _EPOCH

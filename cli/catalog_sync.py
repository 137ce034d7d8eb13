"""`vitrine sync`: finds the difference between a catalog file and the served items, and writes it.

The file wins, whoever wrote an item last. Only fields that the file has are compared: a price that comes only
through the API stays. Everything goes through the public API, from any machine.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
from vitrine.catalog.v1 import item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as pb_grpc

from services.catalog.items import Attribute, Item
from services.catalog.shop_identity import another_shop
from services.core.errors import FailedPrecondition, ResourceExhausted, Unavailable
from services.rpc import proto_conversions, status
from services.rpc.server import CHANNEL_OPTIONS

FIELDS = ("title", "description", "family_id", "price", "available_from", "available_until")
"""Fields of an item that are compared by value; attributes are compared by name, the image by its hash."""
_PAGE = 500
_BATCH_ITEMS = 500
_BATCH_BYTES = 16 << 20
_SECONDS = 300.0
_EXAMPLES = 5

ReadImage = Callable[[str], bytes | None]
"""Returns the image file of an item id, or None."""


@dataclass(frozen=True)
class ServedItem:
    """An item as a service has it; `image_hash` is empty if it has no image."""

    item: Item
    image_hash: bytes = b""


@dataclass(frozen=True)
class ItemUpdate:
    """An item to write: its new content, and the names of the fields to change; empty means all."""

    item: Item
    fields: tuple[str, ...] = ()


@dataclass
class CatalogDiff:
    """The writes after which a service serves the items of a catalog file."""

    added: list[ItemUpdate] = field(default_factory=list)
    changed: list[ItemUpdate] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unchanged: int = 0

    @property
    def changes(self) -> int:
        """The number of items that differ."""
        return len(self.added) + len(self.changed) + len(self.removed)

    def lines(self) -> Iterator[str]:
        """A line for each kind of difference, with examples."""
        fields = Counter(name for update in self.changed for name in update.fields)
        detail = ", ".join(f"{name} {count}" for name, count in fields.most_common())
        yield _line("new", [update.item.id for update in self.added])
        yield _line("changed", [update.item.id for update in self.changed], detail)
        yield _line("gone", self.removed)
        yield f"{'unchanged':10} {self.unchanged:7}"


def _line(kind: str, ids: Sequence[str], detail: str = "") -> str:
    examples = ", ".join(ids[:_EXAMPLES]) + (", …" if len(ids) > _EXAMPLES else "")
    return f"{kind:10} {len(ids):7}  {'; '.join(filter(None, (detail, examples)))}".rstrip()


def compare(
    items: Iterable[Item],
    served: Mapping[str, ServedItem],
    fields: Collection[str],
    attributes: Collection[str],
    read_image: ReadImage,
) -> CatalogDiff:
    """The difference between the items of a file and the served ones.

    `fields` of Item and `attributes` are those with columns in the file. Others are not compared.

    Raises:
        FailedPrecondition: the items belong to another shop.
    """
    by_id = {item.id: item for item in items}
    common = sum(i in served and served[i].item.title == item.title for i, item in by_id.items())
    if reason := another_shop(common, len(by_id), len(served)):
        raise FailedPrecondition(reason)
    names = [name for name in FIELDS if name in fields]
    difference, file_attributes = CatalogDiff(), frozenset(attributes)
    for item_id, item in by_id.items():
        image = read_image(item_id) or b""
        if item_id not in served:
            difference.added.append(ItemUpdate(replace(item, image=image, image_hash=b"")))
            continue
        update = _update(item, served[item_id], names, file_attributes, image)
        if update.fields:
            difference.changed.append(update)
        else:
            difference.unchanged += 1
    difference.removed = [item_id for item_id in served if item_id not in by_id]
    return difference


def _update(
    item: Item, old: ServedItem, names: Sequence[str], file_attributes: frozenset[str], image: bytes
) -> ItemUpdate:
    fields = [name for name in names if getattr(item, name) != getattr(old.item, name)]
    attributes = item.attributes
    if _by_name(item, file_attributes) != _by_name(old.item, file_attributes):
        fields.append("attributes")
        others = (a for a in old.item.attributes if a.name not in file_attributes)
        attributes = (*others, *item.attributes)
    if image and hashlib.blake2b(image, digest_size=32).digest() != old.image_hash:
        fields.append("image")
    content = replace(item, attributes=attributes, image=image if "image" in fields else b"", image_hash=b"")
    return ItemUpdate(content, tuple(fields))


def _by_name(item: Item, names: frozenset[str]) -> dict[str, Attribute]:
    return {a.name: a for a in item.attributes if a.name in names}


class RemoteCatalog:
    """The catalog that a service at host:port serves, over its public API."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub: Any = pb_grpc.RecommendationServiceStub(self._channel)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def read(self) -> dict[str, ServedItem]:
        """Read all served items.

        Raises:
            VitrineError: the service cannot be reached, or refuses.
        """
        items, token, size = dict[str, ServedItem](), "", _PAGE
        while True:
            try:
                page = self._call("ListItems", pb.ListItemsRequest(page_size=size, page_token=token))
            except ResourceExhausted:  # a page of long descriptions can exceed the message size
                if size == 1:
                    raise
                size = max(1, size // 4)
                continue
            for record in page.items:
                item = proto_conversions.item_from(record.item)
                items[item.id] = ServedItem(item, record.image_hash)
            token = page.next_page_token
            if not token:
                return items

    def apply(self, difference: CatalogDiff) -> dict[str, str]:
        """Write the difference; the reasons for items that were not written, by id."""
        failures: dict[str, str] = {}
        by_mask: dict[tuple[str, ...], list[ItemUpdate]] = defaultdict(list)
        for update in (*difference.added, *difference.changed):
            by_mask[update.fields].append(update)
        for fields, updates in by_mask.items():
            for batch in _batches([proto_conversions.item_with_image(update.item) for update in updates]):
                request = pb.BatchUpsertItemsRequest(items=batch)
                request.update_mask.paths.extend(fields)
                failures |= _failures(self._call("BatchUpsertItems", request).outcomes)
        for start in range(0, len(difference.removed), _BATCH_ITEMS):
            ids = difference.removed[start : start + _BATCH_ITEMS]
            outcomes = self._call("DeleteItems", pb.DeleteItemsRequest(item_ids=ids)).outcomes
            failures |= _failures(outcomes)
        return failures

    def _call(self, name: str, request: Any) -> Any:
        try:
            return getattr(self._stub, name)(request, timeout=_SECONDS)
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)  # noqa: S101 - as grpc documents
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise Unavailable(f"{self.address} does not answer {name}: is it running?") from None
            raise status.from_call(error, "recommendation") from None


def _failures(outcomes: Iterable[item_pb2.ItemOutcome]) -> dict[str, str]:
    failed = item_pb2.ITEM_OUTCOME_CODE_FAILED
    return {outcome.item_id: outcome.error.message for outcome in outcomes if outcome.code == failed}


def _batches(messages: Iterable[item_pb2.Item]) -> Iterator[list[item_pb2.Item]]:
    batch, size = list[item_pb2.Item](), 0
    for message in messages:
        if batch and (len(batch) == _BATCH_ITEMS or size + message.ByteSize() > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(message)
        size += message.ByteSize()
    if batch:
        yield batch


def synchronize(
    catalog: RemoteCatalog,
    items: Sequence[Item],
    fields: Collection[str],
    attributes: Collection[str],
    read_image: ReadImage,
    *,
    apply: bool,
    max_deletions: float,
    lost_rows: int = 0,
) -> Iterator[str]:
    """Write the difference if `apply` is set; yields lines that describe it.

    `lost_rows` rows of the file could not be read. Any served item may belong to one of them, so with such
    rows no item is deleted.

    Raises:
        FailedPrecondition: the file belongs to another shop, more than the share `max_deletions` of the
        served
            items would be deleted, or items were not written.
    """
    served = catalog.read()
    difference = compare(items, served, fields, attributes, read_image)
    yield f"the file has {len(items)} items, {catalog.address} serves {len(served)}"
    not_deleted = difference.removed if lost_rows else []
    if not_deleted:
        difference.removed = []
    yield from difference.lines()
    if not_deleted:
        yield (
            f"{len(not_deleted)} served items are not in the file, such as "
            f"{', '.join(not_deleted[:_EXAMPLES])}. They are not deleted, because {lost_rows} rows of the "
            "file could not be read and may be theirs. Correct these rows, which `vitrine inspect` lists, "
            "and sync again"
        )
    if not difference.changes:
        yield "nothing to write"
        return
    if len(difference.removed) > max_deletions * len(served):
        raise FailedPrecondition(
            f"{len(difference.removed)} of {len(served)} served items are not in the file, more than the "
            f"share {max_deletions:g} that may be deleted at once: check the file, or raise --max-deletions"
        )
    if not apply:
        yield "nothing was written: add --apply to write this"
        return
    failures = catalog.apply(difference)
    yield f"{difference.changes - len(failures)} items written"
    if failures:
        examples = "; ".join(f"{i}: {reason}" for i, reason in list(failures.items())[:_EXAMPLES])
        raise FailedPrecondition(f"{len(failures)} items were not written: {examples}")

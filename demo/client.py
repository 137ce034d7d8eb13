"""Call a running gateway and return sections to show: the request as a grpcurl call, the response as cards.

Independent of terminals and HTML.
"""

import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message
from vitrine.catalog.v1 import event_pb2, item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as pb_grpc

from services.catalog.items import Item
from services.rpc.server import CHANNEL_OPTIONS
from training.data.images import ShopImages

SERVICE = "vitrine.gateway.v1.RecommendationService"
_SECONDS = 20.0
_IMAGE_PLACEHOLDER = "PHOTOGRAPH"


@dataclass(frozen=True)
class Card:
    """An item to show; `image` is a file's bytes, empty when it has none."""

    item_id: str
    title: str
    price: float | None
    image: bytes = field(repr=False)
    sources: tuple[str, ...] = ()
    is_the_new_one: bool = False


@dataclass(frozen=True)
class Strip:
    """Cards in a row under a label."""

    label: str
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Section:
    """One thing shown: a title, prose, the call as a shell line, cards, and remarks."""

    title: str
    prose: str
    call: str
    strips: tuple[Strip, ...] = ()
    remarks: tuple[str, ...] = ()


class Gateway:
    """Calls to one gateway, with the titles and images of the shop's items."""

    def __init__(self, address: str, items: Sequence[Item], images: ShopImages) -> None:
        self.address = address
        self._images = images
        self._cards: dict[str, Card] = {item.id: self._card(item) for item in items}
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub: Any = pb_grpc.RecommendationServiceStub(self._channel)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def card(self, item_id: str, sources: Sequence[str] = ()) -> Card:
        """An item as a card; one that the shop does not know is shown by its id."""
        return replace(self._cards.get(item_id) or Card(item_id, item_id, None, b""), sources=tuple(sources))

    def recommend(self, request: pb.RecommendRequest) -> tuple[pb.RecommendResponse, float]:
        """The response and its latency in milliseconds."""
        return self._timed(self._stub.Recommend, request)

    def search(self, request: pb.SearchItemsRequest) -> tuple[pb.SearchItemsResponse, float]:
        """The response and its latency in milliseconds."""
        return self._timed(self._stub.SearchItems, request)

    def renew(self, item: item_pb2.Item) -> tuple[item_pb2.ItemOutcome, float]:
        """Delete and write an item again, and store its card."""
        self._stub.DeleteItems(pb.DeleteItemsRequest(item_ids=[item.id]), timeout=_SECONDS)
        response, milliseconds = self._timed(
            self._stub.BatchUpsertItems, pb.BatchUpsertItemsRequest(items=[item])
        )
        self._cards[item.id] = Card(item.id, item.title, item.price, item.image.data, is_the_new_one=True)
        return response.outcomes[0], milliseconds

    def cards(self, response: pb.RecommendResponse | pb.SearchItemsResponse) -> tuple[Card, ...]:
        """The items of a response in its order."""
        return tuple(self.card(i.item_id, [s.source for s in i.sources]) for i in response.items)

    def call(self, method: str, request: Message, image: Path | None = None) -> str:
        """The request as a grpcurl line that a shell can run; an image is read from `image`."""
        document = json_format.MessageToDict(request, preserving_proto_field_name=True)
        if image is not None:
            _set_image(document)
        body = shlex.quote(json.dumps(document, ensure_ascii=False))
        if image is not None:
            body = body.replace(_IMAGE_PLACEHOLDER, f"'\"$(base64 -w0 {shlex.quote(str(image))})\"'")
        return f"grpcurl -plaintext -d {body} {self.address} {SERVICE}/{method}"

    def _card(self, item: Item) -> Card:
        image = self._images.read(item.id) if item.id in self._images else b""
        return Card(item.id, item.title, item.price, image)

    @staticmethod
    def _timed(method: Callable[..., Any], request: Message) -> tuple[Any, float]:
        start = time.perf_counter()
        response = method(request, timeout=_SECONDS)
        return response, 1e3 * (time.perf_counter() - start)


def session_of(item_ids: Sequence[str]) -> list[event_pb2.SessionItem]:
    """A session with these items, oldest first."""
    return [event_pb2.SessionItem(item_id=item_id) for item_id in item_ids]


def degraded(response: pb.RecommendResponse) -> tuple[str, ...]:
    """A remark for each degraded stage."""
    return tuple(f"degraded stage {d.stage}: {d.message}" for d in response.degraded)


def _set_image(document: Mapping[str, Any]) -> None:
    """Put a placeholder in place of the bytes of an image, wherever the request has them."""
    if "image" in document:
        document["image"] = _IMAGE_PLACEHOLDER  # type: ignore[index]
    for item in document.get("items", ()):
        item["image"]["data"] = _IMAGE_PLACEHOLDER

"""`SearchItems`: items that match a text, an image, or both."""

from collections.abc import Sequence
from datetime import datetime

import numpy as np
from vitrine.catalog.v1 import item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.core.errors import InvalidArgument
from services.gateway.clients.backends import EmbeddingBackend
from services.gateway.recommend.handler import DEFAULT_PAGE, MAX_PAGE
from services.gateway.recommend.pipeline import Pipeline
from services.gateway.recommend.response_builder import build_sources
from services.gateway.rules.rank_fusion import CROSS_MODAL_WEIGHT, fuse
from services.rpc import proto_conversions

_SEARCH_DEPTH = 2000
_DEFAULT_IMAGE_WEIGHT = 0.5


class SearchHandler:
    """Searches the vector spaces of the embedding service; the orders in each of them are fused."""

    def __init__(self, pipeline: Pipeline, embedding: EmbeddingBackend) -> None:
        self._pipeline, self._embedding = pipeline, embedding

    async def search(self, request: pb.SearchItemsRequest, now: datetime) -> list[pb.Recommendation]:
        """The best available items; InvalidArgument names the first wrong field."""
        size = proto_conversions.check_limit(request.page_size, MAX_PAGE, "page_size", DEFAULT_PAGE)
        if not (request.text.strip() or request.image):
            raise InvalidArgument.of("text", "or image is required")
        image_weight = request.image_weight if request.HasField("image_weight") else _DEFAULT_IMAGE_WEIGHT
        if not 0 <= image_weight <= 1:
            raise InvalidArgument.of("image_weight", "must be between 0 and 1")
        response = await self._embedding.search(
            embedding_pb.SearchRequest(
                text=request.text,
                image=request.image,
                limit=_SEARCH_DEPTH,
                filter=request.filter if request.HasField("filter") else None,
                min_sequence=request.min_sequence,
                bundle=self._pipeline.bundle,
                as_of=proto_conversions.time_to(now),
            )
        )
        orders: list[tuple[float, Sequence[int]]] = []
        sources: dict[int, dict[str, float]] = {}
        for hits in response.results:
            space = "image" if hits.space == item_pb2.SPACE_IMAGE else "text"
            weight = _weight(request, image_weight, hits.query, space)
            orders.append((weight, hits.item_hashes))
            for item, score in zip(hits.item_hashes, hits.scores, strict=True):
                sources.setdefault(item, {})[space] = score
        scores = fuse(orders)
        table = self._pipeline.table
        available = table.available(now)
        order = sorted(scores, key=lambda item: (-scores[item], item))
        rows = table.rows(order)
        live = (rows >= 0) & (rows < len(available)) & available[np.minimum(rows, len(available) - 1)]
        shown = np.flatnonzero(live)[:size]
        item_ids = table.ids(rows[shown])
        return [
            pb.Recommendation(
                item_id=item_id,
                score=scores[order[index]],
                sources=build_sources(sources[order[index]]),
                propensity=1.0,
            )
            for index, item_id in zip(shown.tolist(), item_ids, strict=True)
        ]


def _weight(request: pb.SearchItemsRequest, image_weight: float, query: int, space: str) -> float:
    """The weight of an order: of the text's or the image's query, in one of the spaces."""
    has_text = bool(request.text.strip())
    by_image = bool(request.image) and (query == 1 or not request.text)
    weight = 1.0
    if has_text and request.image:
        weight = image_weight if by_image else 1 - image_weight
    if space == "image" and not by_image:
        weight *= CROSS_MODAL_WEIGHT
    return weight

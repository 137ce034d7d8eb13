"""The services that other processes run: a connection to each, and which bundles they serve.

Knows nothing of what is asked of them otherwise.
"""

import asyncio
import logging
from collections.abc import Collection
from typing import Any

import grpc
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.embedding.v1 import embedding_service_pb2_grpc as embedding_grpc
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb
from vitrine.ranking.v1 import ranking_service_pb2_grpc as ranking_grpc

from services.errors import FailedPrecondition
from services.server import CHANNEL_OPTIONS

_PATIENCE = 2.0
_log = logging.getLogger(__name__)


class Neighbours:
    """Connections to the services at these addresses, host:port, empty where there is none.

    They are made on first use and made again when they break. To be opened within an event loop.
    """

    def __init__(self, embedding: str = "", ranking: str = "") -> None:
        addresses = {"embedding": embedding, "ranking": ranking}
        self._connections = {
            name: grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            for name, address in addresses.items()
            if address
        }
        self._asked: dict[str, tuple[Any, Any]] = {}
        if embedding:
            stub: Any = embedding_grpc.EmbeddingServiceStub(self.to("embedding"))
            self._asked["embedding"] = stub.ListBundles, embedding_pb.ListBundlesRequest
        if ranking:
            stub = ranking_grpc.RankingServiceStub(self.to("ranking"))
            self._asked["ranking"] = stub.ListBundles, ranking_pb.ListBundlesRequest
        self._bundles: dict[str, list[str] | None] = dict.fromkeys(self._asked)

    def to(self, name: str) -> grpc.aio.Channel:
        """The connection to a service; FailedPrecondition where it has no address."""
        if name not in self._connections:
            raise FailedPrecondition(f"where is the {name} service? Say so by --{name} HOST:PORT")
        return self._connections[name]

    @property
    def names(self) -> list[str]:
        """Which services there are."""
        return list(self._asked)

    async def ask(self, serving: Collection[str] = ("",)) -> None:
        """Learn which bundles they serve, and let them serve on the ones that are served by here."""
        await asyncio.gather(*(self._ask(name, serving) for name in self._asked))

    @property
    def silent(self) -> bool:
        """Whether one of them did not answer when they were last asked."""
        return None in self._bundles.values()

    def serve(self, bundle: str) -> bool:
        """Whether all of them said, when they were last asked, that they serve a bundle of this version."""
        return all(there is not None and bundle in there for there in self._bundles.values())

    def lack(self, bundle: str) -> bool:
        """Whether one of them said that it serves others only."""
        return any(there and bundle not in there for there in self._bundles.values())

    async def close(self) -> None:
        """Break the connections."""
        for connection in self._connections.values():
            await connection.close()

    async def _ask(self, name: str, serving: Collection[str]) -> None:
        list_bundles, request = self._asked[name]
        try:
            for bundle in serving:
                answer = await list_bundles(request(bundle=bundle), timeout=_PATIENCE)
                self._bundles[name] = list(answer.bundles)
        except grpc.aio.AioRpcError as error:
            if self._bundles[name] is not None:
                _log.warning("the %s service does not say which bundles it serves: %s", name, error.details())
            self._bundles[name] = None

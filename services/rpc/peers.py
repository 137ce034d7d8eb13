"""The services of other processes: a connection to each, and the bundles that each serves."""

import asyncio
import logging
from collections.abc import Collection
from typing import Any

import grpc
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.embedding.v1 import embedding_service_pb2_grpc as embedding_grpc
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb
from vitrine.ranking.v1 import ranking_service_pb2_grpc as ranking_grpc

from services.core.errors import FailedPrecondition
from services.rpc.server import CHANNEL_OPTIONS

_TIMEOUT = 2.0
_log = logging.getLogger(__name__)


class Peers:
    """Connections to the services at these addresses, host:port; empty for none.

    gRPC connects on first use and reconnects. Create it within an event loop.
    """

    def __init__(self, embedding: str = "", ranking: str = "") -> None:
        addresses = {"embedding": embedding, "ranking": ranking}
        self._channels = {
            name: grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            for name, address in addresses.items()
            if address
        }
        self._list_bundles: dict[str, tuple[Any, Any]] = {}
        if embedding:
            stub: Any = embedding_grpc.EmbeddingServiceStub(self.channel("embedding"))
            self._list_bundles["embedding"] = stub.ListBundles, embedding_pb.ListBundlesRequest
        if ranking:
            stub = ranking_grpc.RankingServiceStub(self.channel("ranking"))
            self._list_bundles["ranking"] = stub.ListBundles, ranking_pb.ListBundlesRequest
        self._versions: dict[str, list[str] | None] = dict.fromkeys(self._list_bundles)

    def channel(self, name: str) -> grpc.aio.Channel:
        """The connection to a service; FailedPrecondition if it has no address."""
        if name not in self._channels:
            raise FailedPrecondition(
                f"the address of the {name} service is missing: set it by --{name} HOST:PORT"
            )
        return self._channels[name]

    @property
    def names(self) -> list[str]:
        """The services that have an address."""
        return list(self._list_bundles)

    async def update(self, serving: Collection[str] = ("",)) -> None:
        """Read which bundles they serve, and let them keep the versions in `serving` loaded."""
        await asyncio.gather(*(self._update(name, serving) for name in self._list_bundles))

    @property
    def unanswered(self) -> bool:
        """Whether a service did not answer the last update."""
        return None in self._versions.values()

    def all_serve(self, version: str) -> bool:
        """Whether all of them served a bundle of this version at the last update."""
        return all(versions is not None and version in versions for versions in self._versions.values())

    def any_lacks(self, version: str) -> bool:
        """Whether one of them served only other versions at the last update."""
        return any(versions and version not in versions for versions in self._versions.values())

    async def close(self) -> None:
        """Close the connections."""
        for channel in self._channels.values():
            await channel.close()

    async def _update(self, name: str, serving: Collection[str]) -> None:
        list_bundles, request = self._list_bundles[name]
        try:
            for version in serving:
                response = await list_bundles(request(bundle=version), timeout=_TIMEOUT)
                self._versions[name] = list(response.bundles)
        except grpc.aio.AioRpcError as error:
            if self._versions[name] is not None:
                _log.warning(
                    "the %s service does not answer which bundles it serves: %s", name, error.details()
                )
            self._versions[name] = None

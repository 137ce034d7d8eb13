"""Where the time of a page goes, as the service itself says: the stages of a response with `debug`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as pb_grpc

_SECONDS = 10.0


@dataclass(frozen=True)
class StageTime:
    """A stage: the median of its wall time in ms, and of the items that it returned."""

    milliseconds: float
    items: float


def stage_times(address: str, requests: Sequence[bytes]) -> dict[str, StageTime]:
    """The stages of pages, in their order, from requests that are sent one after the other."""
    stages: dict[str, list[tuple[float, int]]] = {}
    with grpc.insecure_channel(address) as channel:
        stub: Any = pb_grpc.RecommendationServiceStub(channel)
        for serialized in requests:
            request = pb.RecommendRequest.FromString(serialized)
            request.debug = True
            for stage in stub.Recommend(request, timeout=_SECONDS).stages:
                stages.setdefault(stage.name, []).append((stage.milliseconds, stage.items))
    return {name: StageTime(*map(float, np.median(rows, axis=0))) for name, rows in stages.items()}

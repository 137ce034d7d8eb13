"""Who is served by which arm of an experiment, and pages that two arms share.

An assignment is a hash of the experiment's name and a person's id: it needs no memory, and is the same in
every gateway of a shop.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.errors import InvalidArgument
from services.gateway.rules import Rules
from services.gateway.wish import Candidates, Ordered

_Scores = Mapping[str, Mapping[int, float]]
SPLIT, INTERLEAVE, SHADOW = "split", "interleave", "shadow"
_KINDS = {
    pb.EXPERIMENT_KIND_UNSPECIFIED: SPLIT,
    pb.EXPERIMENT_KIND_SPLIT: SPLIT,
    pb.EXPERIMENT_KIND_INTERLEAVE: INTERLEAVE,
    pb.EXPERIMENT_KIND_SHADOW: SHADOW,
}
_MOST_ARMS = 8
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Arm:
    """A way to serve: by a scenario and a bundle, empty for the newest, for its part of the people."""

    name: str
    scenario: str
    weight: float = 1.0
    bundle: str = ""


@dataclass(frozen=True)
class Experiment:
    """Arms that serve a scenario's requests; `share` of the people take part."""

    name: str
    scenario: str
    arms: tuple[Arm, ...]
    kind: str = SPLIT
    share: float = 1.0


@dataclass(frozen=True)
class Assigned:
    """By which scenario a request is served, as whose arm, and what is made beside it and not shown.

    `rival` is the other arm of an interleaved page, and `arm` the first; `place` is that of `arm` among all.
    """

    scenario: str
    experiment: str = ""
    arm: Arm | None = None
    rival: Arm | None = None
    shadows: tuple[Arm, ...] = ()
    place: int = 0

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Every arm that has to do with the request."""
        return tuple(arm for arm in (self.arm, self.rival, *self.shadows) if arm)

    @property
    def alone(self) -> str:
        """The name of the arm; empty where there is none, and where two share the page."""
        return self.arm.name if self.arm and not self.rival else ""

    @property
    def mark(self) -> str:
        """The experiment and arm, as tokens hold them; empty where there is none."""
        return f"{self.experiment}/{self.alone}" if self.experiment else ""


def assigned(experiment: Experiment | None, scenario: str, person: str) -> Assigned:
    """How somebody is served, `person` being whatever tells people apart."""
    if experiment is None or unit(f"{experiment.name} takes part", person) >= experiment.share:
        return Assigned(scenario)
    arms = experiment.arms
    if experiment.kind == INTERLEAVE:
        return Assigned(arms[0].scenario, experiment.name, arms[0], rival=arms[1])
    if experiment.kind == SHADOW:
        return Assigned(arms[0].scenario, experiment.name, arms[0], shadows=arms[1:])
    chosen = unit(experiment.name, person) * sum(arm.weight for arm in arms)
    for arm in arms:
        chosen -= arm.weight
        if chosen < 0:
            break
    return Assigned(arm.scenario, experiment.name, arm, place=arms.index(arm))


def unit(salt: str, text: str) -> float:
    """A number from 0 to 1, exclusive, that depends on nothing else and is evenly spread."""
    digest = hashlib.blake2b(f"{salt}\0{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def interleaved(both: tuple[Ordered, Ordered], names: tuple[str, str], depth: int, seed: int) -> Ordered:
    """One page of two orders by team draft (Radlinski et al., 2008).

    In each round a coin says whose turn is first; either takes its best item that is not on the page.
    """
    coins = np.random.default_rng(seed).random(depth) < 0.5  # noqa: PLR2004 - a fair one
    places, chosen = [0, 0], dict[int, str]()
    for coin in coins.tolist():
        for team in (coin, not coin):
            own = both[team].numbers
            while places[team] < len(own) and own[places[team]] in chosen:
                places[team] += 1
            if places[team] < len(own):
                chosen[own[places[team]]] = names[team]
    numbers = list(chosen)[:depth]
    first, second = both
    candidates = Candidates({**second.candidates.sources, **first.candidates.sources})
    return replace(
        first,
        numbers=numbers,
        scores=[1.0 / place for place in range(1, len(numbers) + 1)],
        components=_both(first.components, second.components),
        probabilities=_both(first.probabilities, second.probabilities),
        candidates=candidates,
        degraded=[*first.degraded, *(line for line in second.degraded if line not in first.degraded)],
        moved={**second.moved, **first.moved},
        left_out=sorted(set(first.left_out) & set(second.left_out)),
        arms=[chosen[number] for number in numbers],
    )


def _both(first: _Scores, second: _Scores) -> _Scores:
    return {name: {**second.get(name, {}), **first.get(name, {})} for name in {**first, **second}}


def experiment_from(name: str, message: pb.Experiment, known: Mapping[str, Rules]) -> Experiment:
    """The experiment, checked against the rules of the `known` scenarios; InvalidArgument names the field."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument.of("name", "must be 1 to 64 letters, digits, - and _")
    if message.scenario not in known:
        raise InvalidArgument.of("scenario", f"{message.scenario!r} is no scenario of this server")
    arms = tuple(_arm(arm, message.scenario, at, known) for at, arm in enumerate(message.arms))
    least, most = (2, 2) if message.kind == pb.EXPERIMENT_KIND_INTERLEAVE else (2, _MOST_ARMS)
    if not least <= len(arms) <= most:
        raise InvalidArgument.of("arms", f"has {len(arms)}, {least} to {most} are allowed")
    if len({arm.name for arm in arms}) < len(arms):
        raise InvalidArgument.of("arms", "has a name twice")
    share = message.share if message.HasField("share") else 1.0
    if not 0 <= share <= 1:
        raise InvalidArgument.of("share", "must be between 0 and 1")
    if message.kind == pb.EXPERIMENT_KIND_INTERLEAVE:
        for at, arm in enumerate(arms):
            rules = known[arm.scenario]
            if rules.caps or rules.quotas or rules.exploration.share:
                why = "has caps, quotas or exploration: of two interleaved pages none would hold"
                raise InvalidArgument.of(f"arms[{at}].scenario", f"{arm.scenario!r} {why}")
    return Experiment(name, message.scenario, arms, _KINDS[message.kind], share)


def _arm(message: pb.Arm, own: str, at: int, known: Mapping[str, Rules]) -> Arm:
    if not _NAME.fullmatch(message.name):
        raise InvalidArgument.of(f"arms[{at}].name", "must be 1 to 64 letters, digits, - and _")
    scenario = message.scenario or own
    if scenario not in known:
        raise InvalidArgument.of(f"arms[{at}].scenario", f"{scenario!r} is no scenario of this server")
    weight = message.weight if message.HasField("weight") else 1.0
    if not 0 < weight < math.inf:
        raise InvalidArgument.of(f"arms[{at}].weight", "must be above 0 and finite")
    return Arm(message.name, scenario, weight, message.bundle)

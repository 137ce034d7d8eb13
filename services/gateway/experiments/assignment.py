"""Which arm of an experiment serves a user, and pages that two arms share.

An assignment is a hash of the experiment's name and the user's id: it needs no memory, and is the same in
every gateway of a shop.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.core.errors import InvalidArgument
from services.gateway.query import RankedPage
from services.gateway.rules.page_builder import Rules

_Scores = Mapping[str, Mapping[int, float]]
SPLIT, INTERLEAVE, SHADOW = "split", "interleave", "shadow"
_KINDS = {
    pb.EXPERIMENT_KIND_UNSPECIFIED: SPLIT,
    pb.EXPERIMENT_KIND_SPLIT: SPLIT,
    pb.EXPERIMENT_KIND_INTERLEAVE: INTERLEAVE,
    pb.EXPERIMENT_KIND_SHADOW: SHADOW,
}
_MAX_ARMS = 8
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Arm:
    """A scenario and a bundle, empty for the newest, that serve users in proportion to `weight`."""

    name: str
    scenario: str
    weight: float = 1.0
    bundle: str = ""


@dataclass(frozen=True)
class Experiment:
    """Arms that serve a scenario's requests; `share` of the users take part."""

    name: str
    scenario: str
    arms: tuple[Arm, ...]
    kind: str = SPLIT
    share: float = 1.0


@dataclass(frozen=True)
class Assignment:
    """The scenario and the arm that serve a request, and the arms whose pages are only logged.

    `arm` is the first arm of an interleaved page and `rival` the other one. `arm_index` is the index of
    `arm` in the experiment.
    """

    scenario: str
    experiment: str = ""
    arm: Arm | None = None
    rival: Arm | None = None
    shadows: tuple[Arm, ...] = ()
    arm_index: int = 0

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Every arm of the request."""
        return tuple(arm for arm in (self.arm, self.rival, *self.shadows) if arm)

    @property
    def single_arm(self) -> str:
        """The name of the arm; empty without an experiment, and if two arms share the page."""
        return self.arm.name if self.arm and not self.rival else ""

    @property
    def label(self) -> str:
        """The experiment and its arm as tokens hold them; empty without an experiment."""
        return f"{self.experiment}/{self.single_arm}" if self.experiment else ""


def assign(experiment: Experiment | None, scenario: str, user: str) -> Assignment:
    """The assignment of a user, by any key that identifies the user."""
    if experiment is None or unit(f"{experiment.name} takes part", user) >= experiment.share:
        return Assignment(scenario)
    arms = experiment.arms
    if experiment.kind == INTERLEAVE:
        return Assignment(arms[0].scenario, experiment.name, arms[0], rival=arms[1])
    if experiment.kind == SHADOW:
        return Assignment(arms[0].scenario, experiment.name, arms[0], shadows=arms[1:])
    remaining = unit(experiment.name, user) * sum(arm.weight for arm in arms)
    for arm in arms:
        remaining -= arm.weight
        if remaining < 0:
            break
    return Assignment(arm.scenario, experiment.name, arm, arm_index=arms.index(arm))


def unit(salt: str, text: str) -> float:
    """A hash of both texts, evenly spread from 0 to 1, exclusive."""
    digest = hashlib.blake2b(f"{salt}\0{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def interleave(
    both: tuple[RankedPage, RankedPage], names: tuple[str, str], depth: int, seed: int
) -> RankedPage:
    """One page of two arms by team draft (Radlinski et al., 2008).

    In each round a coin decides which arm is first; each adds its best item that is not on the page.
    """
    coins = np.random.default_rng(seed).random(depth) < 0.5  # noqa: PLR2004 - a fair coin
    positions, arm_of = [0, 0], dict[int, str]()
    for coin in coins.tolist():
        for team in (coin, not coin):
            order = both[team].item_hashes
            while positions[team] < len(order) and order[positions[team]] in arm_of:
                positions[team] += 1
            if positions[team] < len(order):
                arm_of[order[positions[team]]] = names[team]
    item_hashes = list(arm_of)[:depth]
    first, second = both
    return replace(
        first,
        item_hashes=item_hashes,
        scores=[1.0 / rank for rank in range(1, len(item_hashes) + 1)],
        components=_merge(first.components, second.components),
        probabilities=_merge(first.probabilities, second.probabilities),
        candidates=first.candidates.merged(second.candidates),
        degraded=[*first.degraded, *(line for line in second.degraded if line not in first.degraded)],
        applied_rules={**second.applied_rules, **first.applied_rules},
        ineligible=sorted(set(first.ineligible) & set(second.ineligible)),
        arms=[arm_of[item] for item in item_hashes],
    )


def _merge(first: _Scores, second: _Scores) -> _Scores:
    return {name: {**second.get(name, {}), **first.get(name, {})} for name in {**first, **second}}


def experiment_from(name: str, message: pb.Experiment, rules_of: Mapping[str, Rules]) -> Experiment:
    """The experiment, checked against the rules of each scenario; InvalidArgument names the wrong field."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument.of("name", "must be 1 to 64 letters, digits, - and _")
    if message.scenario not in rules_of:
        raise InvalidArgument.of("scenario", f"{message.scenario!r} is no scenario of this server")
    arms = tuple(_arm(arm, message.scenario, index, rules_of) for index, arm in enumerate(message.arms))
    low, high = (2, 2) if message.kind == pb.EXPERIMENT_KIND_INTERLEAVE else (2, _MAX_ARMS)
    if not low <= len(arms) <= high:
        raise InvalidArgument.of("arms", f"has {len(arms)}, {low} to {high} are allowed")
    if len({arm.name for arm in arms}) < len(arms):
        raise InvalidArgument.of("arms", "has a name twice")
    share = message.share if message.HasField("share") else 1.0
    if not 0 <= share <= 1:
        raise InvalidArgument.of("share", "must be between 0 and 1")
    if message.kind == pb.EXPERIMENT_KIND_INTERLEAVE:
        for index, arm in enumerate(arms):
            rules = rules_of[arm.scenario]
            if rules.caps or rules.quotas or rules.exploration.share:
                problem = "has caps, quotas or exploration, which an interleaved page cannot keep"
                raise InvalidArgument.of(f"arms[{index}].scenario", f"{arm.scenario!r} {problem}")
    return Experiment(name, message.scenario, arms, _KINDS[message.kind], share)


def _arm(message: pb.Arm, default_scenario: str, index: int, rules_of: Mapping[str, Rules]) -> Arm:
    if not _NAME.fullmatch(message.name):
        raise InvalidArgument.of(f"arms[{index}].name", "must be 1 to 64 letters, digits, - and _")
    scenario = message.scenario or default_scenario
    if scenario not in rules_of:
        raise InvalidArgument.of(f"arms[{index}].scenario", f"{scenario!r} is no scenario of this server")
    weight = message.weight if message.HasField("weight") else 1.0
    if not 0 < weight < math.inf:
        raise InvalidArgument.of(f"arms[{index}].weight", "must be above 0 and finite")
    return Arm(message.name, scenario, weight, message.bundle)

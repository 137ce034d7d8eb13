"""Scenarios: what a server does in each place of a site, from a TOML file that may change while it is served.

A table per scenario, with the fields of the message `Scenario` by their names. Without a file, or beside it,
there are those of `BUILT_IN`. The table "experiments" has one `Experiment` per name.
"""

import asyncio
import logging
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message
from vitrine.catalog.v1 import filter_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services import filters, wire
from services.errors import InvalidArgument, NotFound
from services.gateway.experiments import Assigned, Experiment, assigned, experiment_from
from services.gateway.rules import RELAXABLE, Boost, Cap, Exploration, Quota, Rules
from services.gateway.wish import SOURCES

HOME, SIMILAR = "home", "similar"
BUILT_IN: Mapping[str, dict[str, Any]] = {
    HOME: {},
    SIMILAR: {},
    "together": {"sources": ["graph"]},
    "basket": {"rules": {"caps": [{"attribute": "family_id", "most": 1}]}},
    "new": {"sources": ["new"]},
    "popular": {
        "sources": ["popular"],
        "ordering": "ORDERING_SOURCES",
        "bought_policy": "BOUGHT_POLICY_KEEP",
    },
}
_AMONG, _MOST_AMONG = 20, 500
_MOST = {"caps": 16, "boosts": 32, "quotas": 8}
_MOST_BYTES = 64 * 1024
_LOOK_EVERY = 1.0
_EXPERIMENTS = "experiments"
_Message = TypeVar("_Message", bound=Message)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scenario:
    """A validated scenario; `filter` is `condition` as a message."""

    sources: tuple[str, ...] = ()
    by_source: bool = False
    exclude_bought: bool = True
    exclude_seen: bool = False
    filter: filter_pb2.Filter | None = None
    condition: filters.Filter | None = None
    rules: Rules = field(default_factory=Rules)
    locked: bool = False


@dataclass(frozen=True)
class Known:
    """Scenarios and experiments of one moment."""

    scenarios: Mapping[str, Scenario]
    experiments: Sequence[Experiment]

    def find(self, name: str) -> Scenario:
        """The scenario of that name, "home" for none; NotFound."""
        found = self.scenarios.get(name or HOME)
        if found is None:
            raise NotFound("scenario", name)
        return found

    def assigned(self, name: str, person: str) -> Assigned:
        """By which scenario and arm a request is served, `person` being whatever tells people apart."""
        scenario = name or HOME
        experiment = next((e for e in self.experiments if e.scenario == scenario), None)
        return assigned(experiment, scenario, person)


class Scenarios:
    """The scenarios of a server, those of `path` in place of built-in ones of the same name.

    Raises:
        InvalidArgument: the file cannot be read, or says something wrong; it names scenario and field.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._seen, self._wrong = path, b"", ""
        self._known = _read(self._look())

    @property
    def known(self) -> "Known":
        """Those of this moment, whatever is taken up meanwhile."""
        return self._known

    def find(self, name: str) -> Scenario:
        """The scenario of that name, "home" for none; NotFound."""
        return self._known.find(name)

    def reload(self) -> bool:
        """Take up the file where it has changed; whether it has. One that is wrong changes nothing."""
        before = self._seen
        try:
            content = self._look()
            if content == before:
                return False
            self._known = _read(content)
        except InvalidArgument as error:
            if str(error) != self._wrong:  # told once
                _log.error("%s; the scenarios stay as they were", error)
            self._wrong = str(error)
            return False
        self._wrong = ""
        known = self._known
        _log.info(
            "%s: %d scenarios, %d experiments", self._path, len(known.scenarios), len(known.experiments)
        )
        return True

    async def follow(self) -> None:
        """Look for changes without end."""
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            await asyncio.to_thread(self.reload)

    def _look(self) -> bytes:
        if self._path is None:
            return b""
        try:
            self._seen = self._path.read_bytes()
        except OSError as error:
            raise InvalidArgument.of("scenarios", f"cannot be read: {error}") from None
        return self._seen


def _read(content: bytes) -> Known:
    try:
        stated = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # of the encoding or of TOML
        raise InvalidArgument.of("scenarios", f"is no TOML: {error}") from None
    tables = stated.pop(_EXPERIMENTS, {})
    found = {}
    for name, table in {**BUILT_IN, **stated}.items():
        scenario = _message(table, pb.Scenario(), f"scenarios.{name}")
        try:
            found[name] = scenario_from(scenario)
        except InvalidArgument as error:
            raise error.under(f"scenarios.{name}") from None
    rules = {name: scenario.rules for name, scenario in found.items()}
    experiments: list[Experiment] = []
    if not isinstance(tables, dict):
        raise InvalidArgument.of(_EXPERIMENTS, f"is {tables!r}, no table")
    for name, table in tables.items():
        where = f"{_EXPERIMENTS}.{name}"
        message = _message(table, pb.Experiment(), where)
        try:
            one = experiment_from(name, message, rules)
        except InvalidArgument as error:
            raise error.under(where) from None
        if twice := next((e.name for e in experiments if e.scenario == one.scenario), ""):
            raise InvalidArgument.of(f"{where}.scenario", f"is that of {twice!r} already")
        experiments.append(one)
    return Known(found, experiments)


def _message(table: object, message: _Message, where: str) -> _Message:
    if not isinstance(table, dict):
        raise InvalidArgument.of(where, f"is {table!r}, no table")
    try:
        return json_format.ParseDict(table, message)
    except (json_format.ParseError, RecursionError) as error:
        raise InvalidArgument.of(where, str(error)) from None


def scenario_from(message: pb.Scenario) -> Scenario:
    """The scenario, validated; InvalidArgument names the field."""
    for name in message.sources:
        if name not in SOURCES:
            raise InvalidArgument.of("sources", f"{name!r} is none of {', '.join(sorted(SOURCES))}")
    has_filter = message.HasField("filter")
    rules = replace(
        rules_from(message.rules, Rules()),
        diversity=_share(message.diversity, "diversity"),
        rotation=message.rotation,
        exploration=_exploration(message.exploration),
        variety=_share(message.variety, "variety"),
    )
    return Scenario(
        sources=tuple(message.sources),
        by_source=message.ordering == pb.ORDERING_SOURCES,
        exclude_bought=message.bought_policy != pb.BOUGHT_POLICY_KEEP,
        exclude_seen=message.seen_policy == pb.SEEN_POLICY_EXCLUDE,
        filter=message.filter if has_filter else None,
        condition=wire.filter_from(message.filter) if has_filter else None,
        rules=rules,
        locked=message.locked,
    )


def rules_from(message: pb.Rules, otherwise: Rules, field: str = "rules") -> Rules:
    """The rules of a message, those that it does not state as in `otherwise`."""
    for name, most in _MOST.items():
        if len(getattr(message, name)) > most:
            many = len(getattr(message, name))
            raise InvalidArgument.of(f"{field}.{name}", f"has {many}, at most {most} are allowed")
    quotas = tuple(_quota(q, f"{field}.quotas[{at}]") for at, q in enumerate(message.quotas))
    if sum(quota.share for quota in quotas) > 1 + 1e-6:
        raise InvalidArgument.of(f"{field}.quotas", "have shares of more than 1 in all")
    parts = [b.filter for b in message.boosts] + [q.filter for q in message.quotas]
    if sum(part.ByteSize() for part in parts) > _MOST_BYTES:
        raise InvalidArgument.of(field, f"have conditions of more than {_MOST_BYTES} bytes in all")
    for at, name in enumerate(message.relax):
        if name not in RELAXABLE:
            raise InvalidArgument.of(f"{field}.relax[{at}]", f"is {name!r}, none of {', '.join(RELAXABLE)}")
    if len(set(message.relax)) < len(message.relax):
        raise InvalidArgument.of(f"{field}.relax", "names a rule twice")
    return replace(
        otherwise,
        caps=tuple(_cap(c, f"{field}.caps[{at}]") for at, c in enumerate(message.caps)) or otherwise.caps,
        boosts=tuple(_boost(b, f"{field}.boosts[{at}]") for at, b in enumerate(message.boosts))
        or otherwise.boosts,
        quotas=quotas or otherwise.quotas,
        min_relevance=(
            _share(message.min_relevance, f"{field}.min_relevance")
            if message.HasField("min_relevance")
            else otherwise.min_relevance
        ),
        relax=tuple(message.relax) or otherwise.relax,
    )


def _cap(message: pb.Cap, field: str) -> Cap:
    if not message.attribute:
        raise InvalidArgument.of(f"{field}.attribute", "is required")
    if not 1 <= message.most <= _MOST_AMONG:
        raise InvalidArgument.of(f"{field}.most", f"is {message.most}, 1 to {_MOST_AMONG} are allowed")
    among = message.among or _AMONG
    if not 2 <= among <= _MOST_AMONG:  # noqa: PLR2004 - of one item there is nothing to cap
        raise InvalidArgument.of(f"{field}.among", f"is {among}, 2 to {_MOST_AMONG} are allowed")
    return Cap(message.attribute, message.most, among)


def _boost(message: pb.Boost, field: str) -> Boost:
    if not (-1 <= message.amount <= 1) or not message.amount:
        raise InvalidArgument.of(f"{field}.amount", "must be between -1 and 1, and not 0")
    return Boost(wire.filter_from(message.filter, f"{field}.filter"), message.amount)


def _quota(message: pb.Quota, field: str) -> Quota:
    if not 0 < message.share <= 1:
        raise InvalidArgument.of(f"{field}.share", "must be above 0 and at most 1")
    match message.WhichOneof("items"):
        case "source":
            if message.source not in SOURCES:
                known = ", ".join(sorted(SOURCES))
                raise InvalidArgument.of(f"{field}.source", f"is {message.source!r}, none of {known}")
            return Quota(message.share, source=message.source)
        case "filter":
            return Quota(message.share, condition=wire.filter_from(message.filter, f"{field}.filter"))
        case _:
            raise InvalidArgument.of(field, "has neither source nor filter")


def _exploration(message: pb.Exploration) -> Exploration:
    found = Exploration(share=_share(message.share, "exploration.share"))
    for name in ("max_age_days", "showings", "per_day", "max_engagements"):
        if message.HasField(name):
            value = getattr(message, name)
            if not 0 <= value < math.inf:
                raise InvalidArgument.of(f"exploration.{name}", "must be finite and not negative")
            found = replace(found, **{name: value})
    return found


def _share(value: float, field: str) -> float:
    if not 0 <= value <= 1:
        raise InvalidArgument.of(field, "must be between 0 and 1")
    return value

"""Scenarios: how a server answers in each place of a site, from a TOML file that may change while it serves.

The file has a table per scenario, with the fields of the message `Scenario`. The scenarios of `BUILT_IN`
exist without a file; the file overrides them by name. The table "experiments" has one `Experiment` per name.
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

from services.catalog import filters
from services.core.errors import InvalidArgument, NotFound, quoted
from services.gateway.candidates import SOURCES
from services.gateway.experiments.assignment import Assignment, Experiment, assign, experiment_from
from services.gateway.rules.page_builder import RELAXABLE, Boost, Cap, Exploration, Quota, Rules
from services.rpc import proto_conversions

HOME, SIMILAR = "home", "similar"
BUILT_IN: Mapping[str, dict[str, Any]] = {
    HOME: {},
    SIMILAR: {},
    "together": {"sources": ["co_occurrence"]},
    "basket": {"rules": {"caps": [{"attribute": "family_id", "max_count": 1}]}},
    "new": {"sources": ["new_arrivals"]},
    "popular": {
        "sources": ["popular"],
        "ordering": "ORDERING_SOURCES",
        "purchased_items_policy": "PURCHASED_ITEMS_POLICY_KEEP",
    },
}
_WINDOW, _MAX_WINDOW = 20, 500
_MAX_COUNTS = {"caps": 16, "boosts": 32, "quotas": 8}
_MAX_CONDITION_BYTES = 64 * 1024
_RELOAD_SECONDS = 1.0
_EXPERIMENTS = "experiments"
_Message = TypeVar("_Message", bound=Message)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scenario:
    """A validated scenario; `filter` is the message of `condition`."""

    sources: tuple[str, ...] = ()
    by_source: bool = False
    exclude_purchased: bool = True
    exclude_viewed: bool = False
    filter: filter_pb2.Filter | None = None
    condition: filters.Filter | None = None
    rules: Rules = field(default_factory=Rules)
    allow_overrides: bool = True


@dataclass(frozen=True)
class ScenarioSet:
    """The scenarios and experiments of one version of the file."""

    scenarios: Mapping[str, Scenario]
    experiments: Sequence[Experiment]

    def find(self, name: str) -> Scenario:
        """The scenario of that name, "home" for none; NotFound."""
        scenario = self.scenarios.get(name or HOME)
        if scenario is None:
            raise NotFound("scenario", name)
        return scenario

    def assign(self, name: str, user: str) -> Assignment:
        """The scenario and arm that serve a request of a user, by any key that identifies the user."""
        scenario = name or HOME
        experiment = next((e for e in self.experiments if e.scenario == scenario), None)
        return assign(experiment, scenario, user)


class Scenarios:
    """The scenarios of a server: the built-in ones, and those of the file `path`, which win.

    Raises:
        InvalidArgument: the file cannot be read or is wrong; names the scenario and the field.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._content, self._error = path, b"", ""
        self._current = _parse(self._read())

    @property
    def current(self) -> ScenarioSet:
        """The scenarios and experiments now; a later reload does not change them."""
        return self._current

    def find(self, name: str) -> Scenario:
        """The scenario of that name, "home" for none; NotFound."""
        return self._current.find(name)

    def reload(self) -> bool:
        """Load the file if it has changed, and say whether it was loaded. A wrong file changes nothing."""
        previous = self._content
        try:
            content = self._read()
            if content == previous:
                return False
            self._current = _parse(content)
        except InvalidArgument as error:
            if str(error) != self._error:  # logged once
                _log.error("%s; the scenarios stay as they were", error)
            self._error = str(error)
            return False
        self._error = ""
        scenarios, experiments = self._current.scenarios, self._current.experiments
        _log.info("%s: %d scenarios, %d experiments", self._path, len(scenarios), len(experiments))
        return True

    async def follow(self) -> None:
        """Reload the file again and again, until canceled."""
        while True:
            await asyncio.sleep(_RELOAD_SECONDS)
            await asyncio.to_thread(self.reload)

    def _read(self) -> bytes:
        if self._path is None:
            return b""
        try:
            self._content = self._path.read_bytes()
        except OSError as error:
            raise InvalidArgument.of("scenarios", f"cannot be read: {error}") from None
        return self._content


def _parse(content: bytes) -> ScenarioSet:
    try:
        of_file = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # wrong encoding or wrong TOML
        raise InvalidArgument.of("scenarios", f"is no TOML: {error}") from None
    tables = of_file.pop(_EXPERIMENTS, {})
    scenarios = {}
    for name, table in {**BUILT_IN, **of_file}.items():
        message = _message(table, pb.Scenario(), f"scenarios.{name}")
        try:
            scenarios[name] = scenario_from(message)
        except InvalidArgument as error:
            raise error.under(f"scenarios.{name}") from None
    rules = {name: scenario.rules for name, scenario in scenarios.items()}
    experiments: list[Experiment] = []
    if not isinstance(tables, dict):
        raise InvalidArgument.of(_EXPERIMENTS, f"is {tables!r}, no table")
    for name, table in tables.items():
        path = f"{_EXPERIMENTS}.{name}"
        try:
            experiment = experiment_from(name, _message(table, pb.Experiment(), path), rules)
        except InvalidArgument as error:
            raise error.under(path) from None
        if other := next((e.name for e in experiments if e.scenario == experiment.scenario), ""):
            raise InvalidArgument.of(f"{path}.scenario", f"is that of {other!r} already")
        experiments.append(experiment)
    return ScenarioSet(scenarios, experiments)


def _message(table: object, message: _Message, path: str) -> _Message:
    if not isinstance(table, dict):
        raise InvalidArgument.of(path, f"is {table!r}, no table")
    try:
        return json_format.ParseDict(table, message)
    except (json_format.ParseError, RecursionError) as error:
        raise InvalidArgument.of(path, str(error)) from None


def scenario_from(message: pb.Scenario) -> Scenario:
    """The scenario, validated; InvalidArgument names the field."""
    for name in message.sources:
        if name not in SOURCES:
            raise InvalidArgument.of("sources", f"{quoted(name)} is none of {', '.join(sorted(SOURCES))}")
    has_filter = message.HasField("filter")
    rules = replace(
        rules_from(message.rules, Rules()),
        diversity=_share(message.diversity, "diversity"),
        rotation=message.rotation,
        exploration=_exploration(message.exploration),
        anonymous_jitter=_share(message.anonymous_jitter, "anonymous_jitter"),
    )
    return Scenario(
        sources=tuple(message.sources),
        by_source=message.ordering == pb.ORDERING_SOURCES,
        exclude_purchased=message.purchased_items_policy != pb.PURCHASED_ITEMS_POLICY_KEEP,
        exclude_viewed=message.viewed_items_policy == pb.VIEWED_ITEMS_POLICY_EXCLUDE,
        filter=message.filter if has_filter else None,
        condition=proto_conversions.filter_from(message.filter) if has_filter else None,
        rules=rules,
        allow_overrides=message.allow_overrides if message.HasField("allow_overrides") else True,
    )


def rules_from(message: pb.Rules, defaults: Rules, field: str = "rules") -> Rules:
    """The rules of a message; `defaults` has those that the message does not set."""
    for name, max_count in _MAX_COUNTS.items():
        if (count := len(getattr(message, name))) > max_count:
            raise InvalidArgument.of(f"{field}.{name}", f"has {count}, at most {max_count} are allowed")
    conditions = [b.filter for b in message.boosts] + [q.filter for q in message.quotas]
    if sum(condition.ByteSize() for condition in conditions) > _MAX_CONDITION_BYTES:
        raise InvalidArgument.of(field, f"have conditions of more than {_MAX_CONDITION_BYTES} bytes in all")
    quotas = tuple(_quota(q, f"{field}.quotas[{index}]") for index, q in enumerate(message.quotas))
    if sum(quota.share for quota in quotas) > 1 + 1e-6:
        raise InvalidArgument.of(f"{field}.quotas", "have shares of more than 1 in all")
    for index, name in enumerate(message.relax):
        if name not in RELAXABLE:
            raise InvalidArgument.of(
                f"{field}.relax[{index}]", f"is {quoted(name)}, none of {', '.join(RELAXABLE)}"
            )
    if len(set(message.relax)) < len(message.relax):
        raise InvalidArgument.of(f"{field}.relax", "names a rule twice")
    return replace(
        defaults,
        caps=tuple(_cap(c, f"{field}.caps[{index}]") for index, c in enumerate(message.caps))
        or defaults.caps,
        boosts=tuple(_boost(b, f"{field}.boosts[{index}]") for index, b in enumerate(message.boosts))
        or defaults.boosts,
        quotas=quotas or defaults.quotas,
        min_relevance=(
            _share(message.min_relevance, f"{field}.min_relevance")
            if message.HasField("min_relevance")
            else defaults.min_relevance
        ),
        relax=tuple(message.relax) or defaults.relax,
    )


def _cap(message: pb.Cap, field: str) -> Cap:
    if not message.attribute:
        raise InvalidArgument.of(f"{field}.attribute", "is required")
    if not 1 <= message.max_count <= _MAX_WINDOW:
        raise InvalidArgument.of(
            f"{field}.max_count", f"is {message.max_count}, 1 to {_MAX_WINDOW} are allowed"
        )
    window = message.window or _WINDOW
    if not 2 <= window <= _MAX_WINDOW:  # noqa: PLR2004 - a window of one item caps nothing
        raise InvalidArgument.of(f"{field}.window", f"is {window}, 2 to {_MAX_WINDOW} are allowed")
    return Cap(message.attribute, message.max_count, window)


def _boost(message: pb.Boost, field: str) -> Boost:
    if not (-1 <= message.amount <= 1) or not message.amount:
        raise InvalidArgument.of(f"{field}.amount", "must be between -1 and 1, and not 0")
    return Boost(proto_conversions.filter_from(message.filter, f"{field}.filter"), message.amount)


def _quota(message: pb.Quota, field: str) -> Quota:
    if not 0 < message.share <= 1:
        raise InvalidArgument.of(f"{field}.share", "must be above 0 and at most 1")
    match message.WhichOneof("items"):
        case "source":
            if message.source not in SOURCES:
                names = ", ".join(sorted(SOURCES))
                raise InvalidArgument.of(f"{field}.source", f"is {quoted(message.source)}, none of {names}")
            return Quota(message.share, source=message.source)
        case "filter":
            return Quota(
                message.share, condition=proto_conversions.filter_from(message.filter, f"{field}.filter")
            )
        case _:
            raise InvalidArgument.of(field, "has neither source nor filter")


def _exploration(message: pb.Exploration) -> Exploration:
    exploration = Exploration(share=_share(message.share, "exploration.share"))
    for name in ("max_age_days", "max_impressions", "max_slots_per_day", "max_interactions"):
        if message.HasField(name):
            value = getattr(message, name)
            if not 0 <= value < math.inf:
                raise InvalidArgument.of(f"exploration.{name}", "must be finite and not negative")
            exploration = replace(exploration, **{name: value})
    return exploration


def _share(value: float, field: str) -> float:
    if not 0 <= value <= 1:
        raise InvalidArgument.of(field, "must be between 0 and 1")
    return value

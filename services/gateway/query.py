"""The values that travel through a Recommend: the query, the request's context, the candidates, the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum

import numpy as np

from services.catalog import filters
from services.catalog.items import item_hash
from services.gateway.candidates import CandidateSet
from services.gateway.rules.exploration import ExplorationDraw
from services.gateway.rules.page_builder import Rules

BLEND_WEIGHT = 3.0
"""The weight of the order of `items` in a blend; the order of the ranking service has weight 1."""
MAX_DEPTH = 2000
"""The most items of a page that rules reorder, or that is filled beyond its candidates."""


@dataclass(frozen=True)
class SessionItem:
    """An item of the user's visit. An empty `type` is the shop's strongest event type."""

    item_id: str
    type: str = ""


@dataclass(frozen=True)
class User:
    """A user by the shop's id, by the id of a browser, or by neither; `session` is oldest first."""

    user_id: str = ""
    visitor_id: str = ""
    session: tuple[SessionItem, ...] = ()

    def session_hashes(self) -> list[int]:
        """The hashes of the session's items, oldest first."""
        return [item_hash(item.item_id) for item in self.session]


@dataclass(frozen=True)
class RecommendQuery:
    """A validated request. `excluded` and `items` are item hashes.

    Candidates come from `sources`, an empty tuple for all, or are `items` where these are given. With
    `by_source` the page follows the scores of the sources. With `blend` the order of `items`, best first,
    counts `BLEND_WEIGHT` times as much as that of the ranking service. With `fill` other items of the
    catalog follow where fewer than `depth` are eligible; the last of them meet `loose_condition` but not
    `condition`. Exploration draws by `seed` and uses the budget of `scenario` as of
    `exploration_log_position`, None for now. `jitter_key` is the same for one user all day long.
    """

    user: User
    as_of: datetime
    excluded: frozenset[int] = frozenset()
    exclude_purchased: bool = True
    exclude_viewed: bool = False
    condition: filters.Filter | None = None
    min_sequence: int = 0
    sources: tuple[str, ...] = ()
    by_source: bool = False
    items: tuple[int, ...] | None = None
    blend: bool = False
    rules: Rules = field(default_factory=Rules)
    depth: int = MAX_DEPTH
    fill: bool = False
    loose_condition: filters.Filter | None = None
    scenario: str = ""
    seed: int = 0
    jitter_key: str = ""
    exploration_log_position: int | None = None


@dataclass(frozen=True)
class ExplorationCandidates:
    """Items to explore, by hash, with the impressions and interactions that exploration counted for each."""

    item_hashes: Sequence[int] = ()
    impressions: Sequence[float] = ()
    interactions: Sequence[float] = ()
    log_position: int = 0


@dataclass(frozen=True)
class UserState:
    """The user's events as the ranking service knows them at `sequence`; items are hashes.

    `history` is newest first, with a weight for each item. `impressions` counts the items shown lately.
    """

    history: Sequence[int] = ()
    history_weights: Sequence[float] = ()
    purchased: Sequence[int] = ()
    impressions: Mapping[int, float] = field(default_factory=dict)
    exploration: ExplorationCandidates = field(default_factory=ExplorationCandidates)
    sequence: int = 0


@dataclass(frozen=True)
class RequestContext:
    """All that the stages share in one request.

    `user_state` is None if the ranking service did not answer. `excluded` are the hashes of items that must
    not be shown. `eligible` bool (N,) says which rows of the item table may be: it is computed once per
    request and read-only. `candidates` are those that may be shown.
    """

    query: RecommendQuery
    user_state: UserState | None
    excluded: frozenset[int]
    eligible: np.ndarray
    candidates: CandidateSet


@dataclass(frozen=True)
class Evidence:
    """One kind of evidence: its share of a score, and the user's own item behind it, empty for none."""

    kind: str
    share: float
    item_id: str = ""
    purchased: bool = False


@dataclass(frozen=True)
class StageReport:
    """A stage of a run: the number of items after it, and its seconds."""

    name: str
    items: int
    seconds: float


class DegradationCode(Enum):
    """Why a stage was skipped or a rule relaxed; the names are those of the contract's enum."""

    UNAVAILABLE = "UNAVAILABLE"
    TIMEOUT = "TIMEOUT"
    NOT_READY = "NOT_READY"
    FAILED = "FAILED"
    RULE_RELAXED = "RULE_RELAXED"
    BUNDLE_CHANGED = "BUNDLE_CHANGED"


@dataclass(frozen=True)
class Degradation:
    """A stage that was skipped or a rule that was relaxed, with a message for people."""

    stage: str
    code: DegradationCode
    message: str


@dataclass(frozen=True)
class RankedPage:
    """Every item that may be shown, best first, with the evidence for its position; items are hashes.

    `ranked` and `ranked_scores` are the candidates before the rules. `candidates` has the sources of every
    item, in no order. `components` and `probabilities` are of the items that the models scored. Exploration
    made `draws` from `pool`, whose items have `relevances` and were drawn with `propensities`; its budget is
    as of `exploration_log_position`. On an interleaved page `arms` names the arm of each item.
    """

    item_hashes: list[int]
    scores: list[float]
    components: Mapping[str, Mapping[int, float]]
    probabilities: Mapping[str, Mapping[int, float]]
    candidates: CandidateSet
    degraded: Sequence[Degradation]
    state_sequence: int
    applied_rules: Mapping[int, Sequence[str]] = field(default_factory=dict)
    ineligible: Sequence[int] = ()
    stages: Sequence[StageReport] = ()
    ranked: Sequence[int] = ()
    ranked_scores: Sequence[float] = ()
    draws: Sequence[ExplorationDraw] = ()
    pool: Sequence[int] = ()
    relevances: Sequence[float] = ()
    propensities: Mapping[int, float] = field(default_factory=dict)
    arms: Sequence[str] = ()
    exploration_log_position: int = 0

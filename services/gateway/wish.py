"""What a request asks for, validated, and what is found for it: what the steps of a Recommend hand on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from vitrine.catalog.v1 import filter_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services import filters
from services.gateway.rules import Rules
from services.gateway.trial import Draw

SOURCES = frozenset(
    ("graph", "popular", "rising", "new", "family", "affinity", "sequence", "words", "text", "image")
)
"""The names of the sources."""
BLENDED = 3.0
"""What the order of items that answer a person's own words counts beside the order for the person."""
DEEPEST = 2000
"""The most items of an answer that rules order, or that more than its candidates fill."""


@dataclass(frozen=True)
class Wish:
    """What is asked for, validated. `excluded` are item numbers; `condition` is `filter` decoded.

    Candidates come from `sources`, all when empty, or are `items`, numbers, where those are given. Their
    order is the sources' own where `by_source`; where it is to `blend`, that of `items`, best first,
    counts `BLENDED` times as much as the person's. Where fewer than `depth` are allowed and it is to `fill`,
    others of the catalogue follow, the last of them those for which `loose` holds and `condition` does not.
    What is explored is taken from the budget of `scenario`, as it was at `explored_upto`, None for now, and
    drawn by `seed`. `visit` is the same for a person all day long.
    """

    person: ranking_pb.Person
    as_of: datetime
    excluded: frozenset[int] = frozenset()
    exclude_bought: bool = True
    exclude_seen: bool = False
    filter: filter_pb2.Filter | None = None
    condition: filters.Filter | None = None
    min_sequence: int = 0
    sources: tuple[str, ...] = ()
    by_source: bool = False
    items: tuple[int, ...] | None = None
    blend: bool = False
    rules: Rules = field(default_factory=Rules)
    depth: int = DEEPEST
    fill: bool = False
    loose: filters.Filter | None = None
    scenario: str = ""
    seed: int = 0
    visit: str = ""
    explored_upto: int | None = None


@dataclass
class Candidates:
    """Candidate numbers to the score that each of their sources gave."""

    sources: dict[int, dict[str, float]] = field(default_factory=dict)

    def add(self, source: str, numbers: Sequence[int], scores: Sequence[float]) -> None:
        """Take a list of a source; of an item that comes twice the better score stays."""
        for number, score in zip(numbers, scores, strict=True):
            known = self.sources.setdefault(number, {})
            known[source] = max(score, known.get(source, score))


@dataclass(frozen=True)
class Reason:
    """A kind of evidence, its share of a score, and the person's own item it rests on, empty for none."""

    kind: str
    share: float
    item_id: str = ""
    bought: bool = False


@dataclass(frozen=True)
class Stage:
    """A step of a run: how many items it left, and the seconds it took."""

    name: str
    items: int
    seconds: float


@dataclass(frozen=True)
class Ordered:
    """Every candidate that may be shown, best first, with what its place rests on.

    `ranked` are those that were ranked, as they were before the rules. `draws` were made among `pool`, item
    numbers, of the `relevances`, with the `propensities`, and by what was shown up to `explored_upto`. Of a
    page of two `arms` each item has its own.
    """

    numbers: list[int]
    scores: list[float]
    components: Mapping[str, Mapping[int, float]]
    probabilities: Mapping[str, Mapping[int, float]]
    candidates: Candidates
    degraded: Sequence[pb.Degradation]
    state_sequence: int
    moved: Mapping[int, Sequence[str]] = field(default_factory=dict)
    left_out: Sequence[int] = ()
    stages: Sequence[Stage] = ()
    ranked: Sequence[int] = ()
    ranked_scores: Sequence[float] = ()
    draws: Sequence[Draw] = ()
    pool: Sequence[int] = ()
    relevances: Sequence[float] = ()
    propensities: Mapping[int, float] = field(default_factory=dict)
    arms: Sequence[str] = ()
    explored_upto: int = 0

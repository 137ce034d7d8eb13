"""The candidate sources: each is declared once, here.

The services derive their tables from this list. For each of its sources the ranking service has a function,
and the enum `Source` of its contract has a value. For each of its sources the embedding service searches a
vector space.
"""

from dataclasses import dataclass
from typing import Literal

Owner = Literal["ranking", "embedding"]


@dataclass(frozen=True)
class CandidateSource:
    """A source by its name, and the service that proposes its candidates."""

    name: str
    owner: Owner


CANDIDATE_SOURCES = (
    CandidateSource("attribute_affinity", "ranking"),
    CandidateSource("variants", "ranking"),
    CandidateSource("co_occurrence", "ranking"),
    CandidateSource("image", "embedding"),
    CandidateSource("new_arrivals", "ranking"),
    CandidateSource("popular", "ranking"),
    CandidateSource("trending", "ranking"),
    CandidateSource("sequence", "ranking"),
    CandidateSource("text", "embedding"),
    CandidateSource("title_keywords", "ranking"),
)
NAMES = tuple(source.name for source in CANDIDATE_SOURCES)
RANKING_SOURCES = tuple(source.name for source in CANDIDATE_SOURCES if source.owner == "ranking")
EMBEDDING_SOURCES = tuple(source.name for source in CANDIDATE_SOURCES if source.owner == "embedding")
REQUEST, QUOTA, EXPLORE, BACKFILL = "request", "quota", "explore", "backfill"
"""Candidates that the gateway adds: the request's items, items of quotas, items to explore, backfill."""

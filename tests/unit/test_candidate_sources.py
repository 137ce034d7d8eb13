"""The source registry, the enums of the contract and the implementations name the same sources."""

from collections.abc import Iterable

from vitrine.catalog.v1 import item_pb2
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services.catalog.candidate_sources import CANDIDATE_SOURCES, EMBEDDING_SOURCES, NAMES, RANKING_SOURCES
from services.catalog.item_table import ItemTable
from services.gateway.candidates import SOURCES
from services.ranking.features.context import RankingContext
from services.ranking.models.co_occurrence import GraphView, ItemGraph
from services.ranking.retrieval.candidate_sources import CandidateSources


def values(names: Iterable[str], prefix: str) -> set[str]:
    return {name.removeprefix(prefix).lower() for name in names} - {"unspecified"}


def test_every_source_has_a_unique_name_and_one_owner() -> None:
    assert len(set(NAMES)) == len(CANDIDATE_SOURCES)
    assert not set(RANKING_SOURCES) & set(EMBEDDING_SOURCES)
    assert set(NAMES) == {*RANKING_SOURCES, *EMBEDDING_SOURCES} == SOURCES


def test_the_enums_of_the_contract_name_the_sources() -> None:
    assert values(ranking_pb.Source.keys(), "SOURCE_") == set(NAMES)
    assert values(item_pb2.Space.keys(), "SPACE_") == set(EMBEDDING_SOURCES)


def test_the_ranking_service_implements_its_sources() -> None:
    items = ItemTable()
    context = RankingContext(items, GraphView(ItemGraph.empty(), items))
    assert set(CandidateSources(context).by_name) == set(RANKING_SOURCES)

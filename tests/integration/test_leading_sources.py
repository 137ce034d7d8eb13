"""A page lists the sources in which an item ranks highest."""

from hypothesis import given
from hypothesis import strategies as st
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.gateway.candidates import MAX_LEADING_SOURCES, SOURCES, CandidateSet
from tests.support.shop_server import Stub, ids, session

_OTHERS = frozenset(("request", "explore", "quota", "backfill"))
_SCORES = st.dictionaries(
    st.sampled_from(sorted(SOURCES | _OTHERS)), st.integers(0, 4).map(float), min_size=1
)


def test_the_best_ranks_come_first_and_ties_count_against_a_source() -> None:
    candidates = CandidateSet.of(
        [
            ("co_occurrence", [1, 2, 3], [9.0, 8.0, 7.0]),
            ("popular", [2, 3, 1], [0.9, 0.8, 0.7]),
            ("new_arrivals", [1, 2, 3], [1.0, 1.0, 1.0]),
            ("text", [3, 1], [0.5, 0.4]),
            ("quota", [1], [0.0]),
            ("explore", [1], [0.0]),
        ]
    )
    assert candidates.leading_sources([3, 1]) == {
        3: ["text", "popular", "co_occurrence"],
        1: ["co_occurrence", "text", "new_arrivals", "explore", "quota"],
    }


@given(st.dictionaries(st.integers(0, 20), _SCORES, min_size=1, max_size=12))
def test_no_omitted_source_ranks_an_item_higher(sources: dict[int, dict[str, float]]) -> None:
    def rank(number: int, name: str) -> int:
        score = sources[number][name]
        return sum(scores.get(name, -1.0) >= score for scores in sources.values())

    candidates = CandidateSet.of(
        (name, [n], [score]) for n, scores in sources.items() for name, score in scores.items()
    )
    for number, names in candidates.leading_sources(sources).items():
        source_names = sources[number].keys()
        leading = [name for name in names if name in SOURCES]
        ranks = [rank(number, name) for name in leading]
        assert len(leading) == len(set(leading)) == min(MAX_LEADING_SOURCES, len(source_names & SOURCES))
        assert ranks == sorted(ranks)
        assert all(rank(number, name) >= ranks[-1] for name in (source_names & SOURCES) - set(leading))
        assert names == [*leading, *sorted(source_names - SOURCES)]


async def test_a_page_names_a_few_of_the_sources_of_an_explanation(stub: Stub) -> None:
    request = pb.RecommendRequest(user_id="ann", session=session("garden-03"), page_size=10)
    page = await stub.Recommend(request)
    counts = []
    for item in page.items:
        explanation = await stub.ExplainItem(pb.ExplainItemRequest(request=request, item_id=item.item_id))
        scores = {source.source: source.score for source in explanation.item.sources}
        assert list(scores) == sorted(scores)
        assert {source.source: source.score for source in item.sources}.items() <= scores.items()
        assert len(item.sources) == min(MAX_LEADING_SOURCES, len(scores))
        counts.append(len(scores))
    assert max(counts) > MAX_LEADING_SOURCES
    similar = await stub.SimilarItems(pb.SimilarItemsRequest(item_id="garden-03", page_size=10))
    assert ids(similar)
    assert all(1 <= len(item.sources) <= MAX_LEADING_SOURCES for item in similar.items)

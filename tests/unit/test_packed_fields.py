"""Arrays in messages equal lists of numbers in messages."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.ranking.v1 import ranking_service_pb2 as pb

from services.rpc import packed_fields

_HASHES = st.lists(st.integers(0, 2**63 - 1), max_size=300)
_FLOATS = st.lists(st.floats(width=32, allow_nan=False), max_size=300)


@given(_HASHES, _HASHES, _FLOATS, _FLOATS)
def test_arrays_are_appended_like_lists(
    before: list[int], hashes: list[int], scores: list[float], ages: list[float]
) -> None:
    message = pb.CandidateList(source=pb.SOURCE_POPULAR, item_hashes=before)
    packed_fields.extend(message, "item_hashes", np.array(hashes, np.int64))
    packed_fields.extend(message, "scores", np.array(scores, np.float64))
    expected = pb.CandidateList(source=pb.SOURCE_POPULAR, item_hashes=[*before, *hashes], scores=scores)
    assert message == expected
    assert pb.CandidateList.FromString(message.SerializeToString()) == expected
    np.testing.assert_array_equal(np.asarray(message.item_hashes, np.int64), [*before, *hashes])
    history = pb.History()
    packed_fields.extend(history, "ages", np.array(ages))
    assert history == pb.History(ages=ages)
    rank = pb.RankResponse()
    packed_fields.extend(rank, "second_phase", np.arange(len(hashes)))
    assert list(rank.second_phase) == list(range(len(hashes)))


def test_every_second_element_is_appended_too() -> None:
    block, values = embedding_pb.Vectors(), np.arange(10, dtype=np.float32)[::2]
    packed_fields.extend(block, "values", values)
    assert list(block.values) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("field", ["types", "event_types", "nothing"])
def test_other_fields_are_refused(field: str) -> None:
    with pytest.raises(KeyError):
        packed_fields.extend(pb.History(), field, np.arange(3))

"""A short run of the fuzzer; `make fuzz` is the long one."""

from tests.fuzz.__main__ import fuzz
from tests.support.contracts import METHODS, method_name


def test_a_thousand_random_requests_cause_no_internal_error() -> None:
    tally, traces = fuzz(range(1000), seed=20_261_128)
    assert tally.bugs == []
    assert not traces
    assert {method for method, _ in tally.codes} == {method_name(method) for method in METHODS}
    ok_methods = {method for method, code in tally.codes if code == "OK"}
    assert ok_methods == {method_name(method) for method in METHODS}  # what is refused at once tests little

"""Which rates a load test tries, and what the quick check calls a regression."""

import io

import pytest
from rich.console import Console

from bench.serving import quick
from bench.serving.arrivals import Latencies
from bench.serving.driver import Driver, LoadPlan, Phase, peak
from bench.serving.report import ShopResult, ratios


def phase(name: str, offered: float, goodput: float, cpu_ms: float = 1.0, p50: float = 1.0) -> Phase:
    latencies = Latencies(1, offered, goodput, 0, 0, 0.0, p50, p50, p50, p50, 0.0, 0.1)
    return Phase(name, latencies, cpu_ms)


class SimulatedDriver(Driver):
    """Serves up to a capacity; above it, most pages are late."""

    def __init__(self, capacity: float, plan: LoadPlan) -> None:
        self.plan, self._capacity = plan, capacity

    def at_rate(self, rate: float, seconds: float, note: str = "") -> Phase:
        return phase(f"{rate}", rate, rate if rate <= self._capacity else 0.4 * self._capacity)


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)


def test_rates_rise_until_goodput_falls() -> None:
    driver = SimulatedDriver(150, LoadPlan(first_share=0.25, step=1.5))
    phases = driver.rising(cpu_ms=10)  # two cores could serve 200/s
    assert [p.latencies.offered for p in phases] == [50, 75, 112.5, 168.75]
    assert peak(phases) == 112.5


def test_rates_fall_if_the_first_is_too_high() -> None:
    driver = SimulatedDriver(30, LoadPlan(first_share=0.25, step=1.25))
    phases = driver.rising(cpu_ms=10)
    assert [p.latencies.offered for p in phases] == pytest.approx([25.6, 32, 40, 50])
    assert peak(phases) == pytest.approx(25.6)


def test_the_number_of_rates_is_limited() -> None:
    for capacity in (1e9, 1e-9):
        assert len(SimulatedDriver(capacity, LoadPlan(max_steps=4)).rising(10)) == 4


def test_ratios_compare_the_phases_of_one_run() -> None:
    def result(items: int, cpu_ms: float, p50: float, bare: float) -> ShopResult:
        phases = [phase("floor", 1, 1, 0.5, 0.25), phase("one caller", 1, 1, cpu_ms, p50)]
        return ShopResult("shop", "one", items, 1, 1.0, 1.0, 1.0, {}, phases, 10.0, bare_cpu_ms=bare)

    found = ratios([result(10, 10, 5, 8), result(1000, 15, 6, float("nan"))])
    assert found["shop, 10 items, one: CPU of a page over that of an empty call (floor)"] == 20
    assert found["shop, 10 items, one: p50 of a page over that of an empty call"] == 20
    assert found["shop, 10 items, one: CPU of a bare page over that of a served one (bare)"] == 0.8
    assert found["shop, 10 items, one: pages/s if the CPU were all theirs"] == 200
    assert found["growth from 10 to 1,000 items, one: p50"] == 1.2
    assert found["growth from 10 to 1,000 items, one: CPU of a page"] == 1.5
    assert not [name for name in found if "1,000 items, one" in name and "bare" in name]


def test_the_quick_check_names_what_became_more_expensive_beyond_noise() -> None:
    before = {name: [10.0, 10.1, 9.9] for name in quick.COMPARED} | {"CPU ms of a page": [5.0, 5.1]}
    now = {
        quick.COMPARED[0]: [12.0, 12.1, 11.9],
        quick.COMPARED[1]: [10.1, 10.2, 10.0],  # within the tolerance
        quick.COMPARED[2]: [8.0, 20.0, 12.0],  # within its noise
        "CPU ms of a page": [50.0, 51.0],  # of another machine
    }
    output = io.StringIO()
    assert quick.show(now, before, Console(file=output, width=150)) == [quick.COMPARED[0]]
    assert "WORSE" in output.getvalue()
    assert quick.show(now, {}, Console(file=io.StringIO())) == []  # nothing to compare with

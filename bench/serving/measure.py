"""All measurements of one shop in one layout of processes."""

import tempfile
from pathlib import Path

from bench.serving.bare import bare_cpu_ms
from bench.serving.client import write_requests
from bench.serving.cornac_server import PeerError
from bench.serving.driver import Driver, LoadPlan, client, peak
from bench.serving.peer import PeerResult, measure_peer
from bench.serving.report import ShopResult
from bench.serving.requests import recommend_requests
from bench.serving.servers import ONE, Services
from bench.serving.shops import Shop
from bench.serving.stages import stage_times
from bench.serving.writes import WritePlan, WriteResult, measure_writes

_REQUESTS, _STAGE_REQUESTS = 5000, 50


def measure(
    shop: Shop,
    layout: str,
    plan: LoadPlan,
    writes: WritePlan | None,
    out: Path,
    *,
    bare: bool = True,
    core: int | None = None,
    peer_python: Path | None = None,
) -> ShopResult:
    """Start the services and load them: one caller, rising rates, a part of the peak, writes.

    With `bare`, a process without a server answers the same requests. `core` is the only core that clients
    may use; None leaves them on all. With `peer_python`, the Python that Cornac is installed for, Cornac
    is measured after all loads of the services. All files are in temporary folders under `out`.
    """
    with tempfile.TemporaryDirectory(dir=out) as name:
        folder = Path(name)
        requests = folder / "requests.bin"
        pages = recommend_requests(shop, _REQUESTS)
        write_requests(requests, pages)
        with (
            shop.served(folder, layout) as services,
            client(services.address, folder, core) as load_client,
        ):
            driver = Driver(services, load_client, requests, plan)
            driver.warm_up()
            driver.rewind()  # the bare pages begin with the same requests
            phases = [driver.floor(), driver.one_caller()]
            stages = stage_times(services.address, pages[:_STAGE_REQUESTS])
            rising = driver.rising(phases[-1].cpu_ms)
            highest = peak(rising)
            phases += rising
            if highest:
                note = f", {plan.part:.0%}"
                phases.append(driver.at_rate(plan.part * highest, plan.part_seconds, note))
            memory = services.memory()
            written = []
            if writes and highest:
                written = _written(services, driver, shop, folder, plan, writes, highest, core)
            start = services.start_seconds, services.start_cpu_seconds
            peer: PeerResult | str | None = None
            if peer_python:
                try:
                    rate = plan.part * highest
                    peer = measure_peer(shop, services, load_client, pages, folder, plan, rate, peer_python)
                except PeerError as error:  # the row of the ratio says so
                    peer = str(error)
        bare_ms = float("nan")
        if bare and layout == ONE:
            bare_ms = bare_cpu_ms(shop, folder, requests, plan.count)
    return ShopResult(
        shop=shop.name,
        layout=layout,
        items=len(shop.item_ids),
        interactions=shop.interactions,
        start_seconds=start[0],
        start_cpu_seconds=start[1],
        first_start_seconds=shop.first_start_seconds,
        memory=memory,
        phases=phases,
        stages=stages,
        peak=highest,
        bare_cpu_ms=bare_ms,
        writes=written,
        peer=peer,
    )


def _written(
    services: Services,
    driver: Driver,
    shop: Shop,
    folder: Path,
    plan: LoadPlan,
    writes: WritePlan,
    highest: float,
    core: int | None,
) -> list[WriteResult]:
    with client(services.address, folder, core) as writer:
        return [
            measure_writes(
                services,
                driver,
                writer,
                shop,
                folder,
                page_rate=writes.part * highest,
                event_rate=rate,
                batch=writes.batch,
                seconds=plan.part_seconds,
            )
            for rate in writes.rates
        ]

"""A process starts and stops without needless output or imports."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as pb_grpc

from services.serving.loaded_bundle import EMBEDDING, GATEWAY, RANKING
from tests.support.processes import free_port, wait_until_serving
from tests.support.shop_server import ids, session

DEAD = "http://127.0.0.1:9"  # the discard port, where nobody listens


NO_TEMPORARY_DIRECTORY = """
import sys, tempfile
tempfile._candidate_tempdir_list = lambda: ["/proc/none"]
from cli.main import main
sys.exit(main(sys.argv[1:]))
"""

LOADED = """
import sys
from cli.main import main
code = main(sys.argv[1:])
unused = {"triton", "sklearn", "pandas", "pyarrow", "matplotlib", "optuna", "peft", "onnxruntime"}
loaded = [name for name in sorted(unused) if sys.modules.get(name)]
if loaded:
    print(f"loaded though unused: {loaded}", file=sys.stderr)
sys.exit(code)
"""


def start(
    bundle: Path, state: Path, service: str, port: int, *more: str, log: Path, program: Sequence[str] = ()
) -> "subprocess.Popen[bytes]":
    """A service that believes in proxies that are dead."""
    proxies = {f"{kind}_proxy": DEAD for kind in ("http", "https", "grpc")}
    environment = {
        name: text for name, text in os.environ.items() if name.lower() not in ("no_proxy", "no_grpc_proxy")
    }
    command = [sys.executable, *(program or ["-m", "cli.main"]), "serve", *filter(None, [service])]
    command += ["--bundle", str(bundle), "--state", str(state), "--address", f"127.0.0.1:{port}", *more]
    return subprocess.Popen(
        command, env=environment | proxies, stdout=log.open("ab"), stderr=subprocess.STDOUT
    )


async def recommend(port: int) -> pb.RecommendResponse:
    options = [("grpc.enable_http_proxy", 0)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        stub: pb_grpc.RecommendationServiceAsyncStub = pb_grpc.RecommendationServiceStub(channel)
        request = pb.RecommendRequest(session=session("garden-03"), page_size=10)
        return await stub.Recommend(request, timeout=60)


def stop(process: "subprocess.Popen[bytes]") -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(120)


async def test_backends_are_reached_without_the_environment_proxy(bundle: Path, tmp_path: Path) -> None:
    ports, log = {name: free_port() for name in (EMBEDDING, RANKING, GATEWAY)}, tmp_path / "log"
    embedding, ranking = (f"127.0.0.1:{ports[name]}" for name in (EMBEDDING, RANKING))
    more = {
        EMBEDDING: (),
        RANKING: ("--embedding", embedding),
        GATEWAY: ("--embedding", embedding, "--ranking", ranking),
    }
    processes = []
    try:
        for name, port in ports.items():
            processes.append(start(bundle, tmp_path / name, name, port, *more[name], log=log))
            await wait_until_serving(port, name)
        page = await recommend(ports[GATEWAY])
        assert len(ids(page)) == 10
        assert not page.degraded
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    "program",
    [(), ("-c", NO_TEMPORARY_DIRECTORY), ("-c", LOADED)],
    ids=["usual", "no temporary directory", "says what it loaded"],
)
async def test_start_and_stop_print_only_lines_of_vitrine(
    bundle: Path, tmp_path: Path, program: Sequence[str]
) -> None:
    log, port = tmp_path / "log", free_port()
    process = start(bundle, tmp_path / "state", "", port, log=log, program=program)
    try:
        await wait_until_serving(port, GATEWAY)
        assert len(ids(await recommend(port))) == 10
        assert stop(process) == 0
    finally:
        process.kill()
        process.wait()
    lines = log.read_text().splitlines()
    assert lines
    assert not [line for line in lines if " vitrine " not in line and " services." not in line]


def test_a_gateway_alone_loads_no_torch() -> None:
    program = (
        "import sys; from services.serving import app; from services.gateway import servicer; "
        "from services.gateway.clients import backend_recovery; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_text_encoders_alone_load_no_image_library() -> None:
    program = (
        "import sys; from services.core import native_threads; native_threads.prepare(); "
        "from services.embedding.encoders import encoder_pool; "
        "sys.exit(bool({'open_clip', 'torchvision'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

"""The service gives exact answers after concurrent floods of unreadable inputs."""

import asyncio
import io
import struct
import subprocess
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from PIL import Image
from vitrine.catalog.v1 import item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as pb
from vitrine.embedding.v1 import embedding_service_pb2_grpc as pb_grpc

from services.rpc.server import CHANNEL_OPTIONS
from tests.support.processes import free_port, running_process
from tests.support.shops import make_bundle

_ONE_DECODED = 3 * 100_000_000  # bytes of a photograph of as many pixels as are allowed


def _png(width: int, height: int, rows: int) -> bytes:
    """A grey PNG that says it is so large and holds `rows` rows, whatever it says."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * (width + 1) * rows, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _file(form: str) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((200, 200), 90).convert("RGB").save(out, form)
    return out.getvalue()


_NONSENSE = {
    "a bomb": _png(60_000, 60_000, 200),
    "a bomb within the limit": _png(10_000, 10_000, 10_000),
    "no rows": _png(9_000, 9_000, 0),
    "wrong magic": b"GIF89a" + _file("PNG")[6:],
    "cut PNG": _file("PNG")[:5_000],
    "cut JPEG": _file("JPEG")[:3_000],
    "cut WebP": _file("WEBP")[:1_000],
    "text": b"x" * 1_000_000,
}


def _memory(process: "subprocess.Popen[bytes]", what: str) -> int:
    """Bytes of a process: "VmRSS" now, "VmHWM" at most so far."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


async def test_a_service_is_exact_after_eight_floods_of_invalid_input(tmp_path: Path) -> None:
    port = free_port()
    async with running_process(make_bundle(tmp_path), tmp_path / "state", port) as process:
        await _flood(process, port)


async def _flood(process: "subprocess.Popen[bytes]", port: int) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        stub = pb_grpc.EmbeddingServiceStub(channel)
        good = pb.EmbedImagesRequest(images=[_file("PNG")])
        text = pb.EmbedTextsRequest(texts=["a kitchen thing"])
        before = (await stub.EmbedImages(good)).vectors.values, (await stub.EmbedTexts(text)).vectors.values
        quiet = _memory(process, "VmRSS")

        async def flood(which: int) -> None:
            for _ in range(2):
                answer = await stub.EmbedImages(pb.EmbedImagesRequest(images=list(_NONSENSE.values())))
                error_names = [list(_NONSENSE)[error.row] for error in answer.errors]
                assert error_names == [name for name in _NONSENSE if name != "a bomb within the limit"]
                assert {error.error.code for error in answer.errors} == {3}

                async def chunk() -> AsyncIterator[pb.UpsertItemsRequest]:
                    items = [
                        item_pb2.Item(id=f"{which}-{n}", image=item_pb2.Image(data=data))
                        for n, data in enumerate(_NONSENSE.values())
                    ]
                    yield pb.UpsertItemsRequest(
                        items=[*items, item_pb2.Item(id=f"{which}-good", title="fine")]
                    )

                async for response in stub.UpsertItems(chunk()):
                    codes = [outcome.error.code for outcome in response.outcomes]
                    assert codes == [3, 0, *[3] * (len(_NONSENSE) - 2), 0]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.EmbedTexts(pb.EmbedTextsRequest(texts=["x"] * 5_000))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            await stub.EmbedTexts(pb.EmbedTextsRequest(texts=["word " * 100_000] * 20))

        await asyncio.gather(*(flood(which) for which in range(8)))
        after = (await stub.EmbedImages(good)).vectors.values, (await stub.EmbedTexts(text)).vectors.values
        assert after == before
        assert process.poll() is None
        # Eight decoded at once would be 2.4 GB and their copies as much again.
        assert _memory(process, "VmHWM") - quiet < 4 * _ONE_DECODED

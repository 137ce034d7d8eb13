"""Serves the embedding service with some encoders and an empty catalog.

    python -m bench.embedding.server --text DIR [--image DIR] --state DIR [--device cuda]

Prints its port when it is ready.
"""

import argparse
import asyncio
from datetime import UTC, datetime
from pathlib import Path

from vitrine.embedding.v1 import embedding_service_pb2_grpc as pb_grpc

from services.core import gc_tuning
from services.embedding.catalog.search_view import SearchView
from services.embedding.catalog.writer import CatalogWriter
from services.embedding.encoders.encoder_pool import EncoderPool
from services.embedding.encoders.encoders import ImageEncoder, TextEncoder
from services.embedding.index.segmented_index import SegmentedIndex
from services.embedding.servicer import EmbeddingServicer
from services.embedding.store.item_store import ItemStore
from services.rpc.server import Server, Service, wait_for_stop_signal
from services.storage import store

NAME = "vitrine.embedding.v1.EmbeddingService"


def main() -> None:
    """Serve until a stop signal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    asyncio.run(_serve(parser.parse_args()))


async def _serve(options: argparse.Namespace) -> None:
    gc_tuning.enable()  # as `vitrine serve` does
    engine = store.open_engine(f"sqlite:///{options.state / 'items.sqlite'}")
    image = ImageEncoder(options.image, options.device) if options.image else None
    encoding = EncoderPool(TextEncoder(options.text, options.device), image)
    items = ItemStore(engine, lambda: datetime.now(UTC))
    indexes = {space: SegmentedIndex(size) for space, size in encoding.dimensions.items()}
    view = SearchView(items, encoding.digests, indexes)
    catalog = CatalogWriter(view, encoding)
    add = pb_grpc.add_EmbeddingServiceServicer_to_server
    server = Server([Service(NAME, EmbeddingServicer(catalog, "bench", ["bench"]), add)], "127.0.0.1:0")
    await server.start()
    gc_tuning.collect_and_freeze()
    print(server.port, flush=True)  # noqa: T201 - the answer
    await wait_for_stop_signal()
    await server.stop(1)
    encoding.close()
    view.close()
    items.close()
    engine.dispose()


if __name__ == "__main__":
    main()

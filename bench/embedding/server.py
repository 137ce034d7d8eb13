"""A process that serves the embedding service over given encoders, with an empty catalogue.

    python -m bench.embedding.server --text DIR [--image DIR] --state DIR [--device cuda]

Prints its port once it serves.
"""

import argparse
import asyncio
from datetime import UTC, datetime
from pathlib import Path

from vitrine.embedding.v1 import embedding_service_pb2_grpc as pb_grpc

from services import heap, store
from services.embedding.catalogue import Catalogue
from services.embedding.encoders import ImageEncoder, TextEncoder
from services.embedding.encoding import Encoding
from services.embedding.items import ItemStore
from services.embedding.segmented import SegmentedIndex
from services.embedding.servicer import EmbeddingServicer
from services.embedding.view import CatalogueView
from services.server import Server, Service, until_told_to_stop

NAME = "vitrine.embedding.v1.EmbeddingService"


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    asyncio.run(_serve(parser.parse_args()))


async def _serve(options: argparse.Namespace) -> None:
    heap.own()  # as `vitrine serve` does
    engine = store.open_engine(f"sqlite:///{options.state / 'items.sqlite'}")
    image = ImageEncoder(options.image, options.device) if options.image else None
    encoding = Encoding(TextEncoder(options.text, options.device), image)
    items = ItemStore(engine, lambda: datetime.now(UTC))
    indexes = {space: SegmentedIndex(size) for space, size in encoding.dimensions.items()}
    view = CatalogueView(items, encoding.digests, indexes)
    catalogue = Catalogue(view, encoding)
    add = pb_grpc.add_EmbeddingServiceServicer_to_server
    server = Server([Service(NAME, EmbeddingServicer(catalogue, "bench", ["bench"]), add)], "127.0.0.1:0")
    await server.start()
    heap.settle()
    print(server.port, flush=True)  # noqa: T201 - the answer
    await until_told_to_stop()
    await server.stop(1)
    encoding.close()
    view.close()
    items.close()
    engine.dispose()


if __name__ == "__main__":
    main()

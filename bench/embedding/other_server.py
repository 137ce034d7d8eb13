"""The speed of another server or library on the same weights and texts, in its own environment.

    python bench/embedding/other_server.py sentence-transformers|infinity cpu|cuda fp32|bf16 --model DIR \
      --texts FILE --tokens 96

Prints JSON: texts per second at the best batch size, and the batch sizes tried.
"""

import argparse
import asyncio
import json
import time
from pathlib import Path

_BATCHES = {"cpu": (8, 32, 128), "cuda": (128, 512, 2048)}


def sentence_transformers(options: argparse.Namespace, texts: list[str], batch: int) -> float:
    """Seconds of `SentenceTransformer.encode`, which sorts by length."""
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - one of two is installed

    encoder = SentenceTransformer(str(options.model), device=options.device)
    encoder.max_seq_length = options.tokens
    if options.precision == "bf16":
        encoder = encoder.bfloat16()
    encoder.encode(texts[:64], batch_size=batch)
    start = time.perf_counter()
    encoder.encode(texts, batch_size=batch, normalize_embeddings=True)
    return time.perf_counter() - start


def infinity(options: argparse.Namespace, texts: list[str], batch: int) -> float:
    """Seconds of Infinity's engine in process, without the additional cost of its HTTP server.

    It reads as many tokens as the model allows, not `tokens`.
    """
    from infinity_emb import AsyncEmbeddingEngine, EngineArgs  # noqa: PLC0415 - one of two is installed

    arguments = EngineArgs(
        model_name_or_path=str(options.model),
        device=options.device,
        dtype="bfloat16" if options.precision == "bf16" else "float32",
        engine="torch",
        batch_size=batch,
        bettertransformer=False,
    )

    async def run() -> float:
        engine = AsyncEmbeddingEngine.from_args(arguments)
        async with engine:
            start = time.perf_counter()
            await engine.embed(sentences=texts)
            return time.perf_counter() - start

    return asyncio.run(run())


def main() -> None:
    """Measure one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("sentence-transformers", "infinity"))
    parser.add_argument("device", choices=tuple(_BATCHES))
    parser.add_argument("precision", choices=("fp32", "bf16"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    options = parser.parse_args()
    texts = json.loads(options.texts.read_text())
    run = sentence_transformers if options.what == "sentence-transformers" else infinity
    rates = {n: len(texts) / run(options, texts, n) for n in _BATCHES[options.device]}
    best = max(rates, key=lambda n: rates[n])
    print(json.dumps({"per_second": rates[best], "batch": best, "tried": list(rates)}))  # noqa: T201 - the answer


if __name__ == "__main__":
    main()

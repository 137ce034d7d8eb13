"""Another server's or library's rate on the same weights and texts, in an environment of its own.

    python bench/embedding/rival.py sentence-transformers|infinity --model DIR --texts FILE --tokens 96

Prints JSON: texts a second, the best of the batch sizes tried, and of how many.
"""

import argparse
import asyncio
import json
import time
from pathlib import Path

_BATCHES = (8, 32, 128)


def sentence_transformers(model: Path, texts: list[str], tokens: int, batch: int) -> float:
    """Seconds of `SentenceTransformer.encode`, which sorts by length."""
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - one of two is installed

    encoder = SentenceTransformer(str(model), device="cpu")
    encoder.max_seq_length = tokens
    encoder.encode(texts[:64], batch_size=batch)
    began = time.perf_counter()
    encoder.encode(texts, batch_size=batch, normalize_embeddings=True)
    return time.perf_counter() - began


def infinity(model: Path, texts: list[str], tokens: int, batch: int) -> float:
    """Seconds of Infinity's engine in process, without its HTTP server, which can only cost more.

    It reads as many tokens as the model can, not `tokens`.
    """
    from infinity_emb import AsyncEmbeddingEngine, EngineArgs  # noqa: PLC0415 - one of two is installed

    arguments = EngineArgs(
        model_name_or_path=str(model), device="cpu", engine="torch", batch_size=batch, bettertransformer=False
    )

    async def run() -> float:
        engine = AsyncEmbeddingEngine.from_args(arguments)
        async with engine:
            began = time.perf_counter()
            await engine.embed(sentences=texts)
            return time.perf_counter() - began

    return asyncio.run(run())


def main() -> None:
    """Measure one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("sentence-transformers", "infinity"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    options = parser.parse_args()
    texts = json.loads(options.texts.read_text())
    run = sentence_transformers if options.what == "sentence-transformers" else infinity
    rates = {n: len(texts) / run(options.model, texts, options.tokens, n) for n in _BATCHES}
    best = max(rates, key=lambda n: rates[n])
    print(json.dumps({"per_second": rates[best], "batch": best, "tried": list(rates)}))  # noqa: T201 - the answer


if __name__ == "__main__":
    main()

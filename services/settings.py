"""What an operator can set: by flags of `vitrine serve`, or by VITRINE_ environment variables."""

from datetime import datetime
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


def _split(value: object) -> object:
    return [part for part in value.split(",") if part] if isinstance(value, str) else value


class Settings(BaseSettings):
    """Settings of one process; frozen once read."""

    model_config = SettingsConfigDict(env_prefix="VITRINE_", frozen=True, extra="forbid")

    bundle: Path = Field(description="a bundle, or a directory of bundles whose newest is served")
    state: Path = Field(Path("state"), description="the directory of what must last")
    address: str = Field("127.0.0.1:50051", description="host:port to listen on; port 0 takes a free one")
    embedding: str = Field("", description="host:port of the embedding service, when it runs apart")
    ranking: str = Field("", description="host:port of the ranking service, when it runs apart")
    embedding_database: str = Field("", description="SQLAlchemy URL; empty means SQLite under state")
    ranking_database: str = Field("", description="SQLAlchemy URL; empty means SQLite under state")
    secret: str = Field(
        "", description="signs tokens; a shop's gateways share it; empty means one kept in state"
    )
    grace: float = Field(10.0, ge=0, le=600, description="seconds that running calls get at a stop")
    device: str = Field("cpu", description="where encoders, and scans of large indices, run: cpu, cuda")
    fetch_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode, BeforeValidator(_split)] = (
        Field((), description="private networks that photographs may be fetched from: 10.1.0.0/16,fd00::/8")
    )
    look_every: float = Field(
        10.0, ge=0, description="seconds between looks for a newer bundle to make ready; 0 means never"
    )
    exchange: bool = Field(
        True,
        description="serve a newer bundle once it is ready, and those of this process' neighbours serve it, "
        "which takes twice the memory for a minute; not where other bundles are served beside",
    )
    beside: Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_split)] = Field(
        (), description="bundles served beside, for experiments whose arms name them: DIR,DIR"
    )
    graph_rows: int = Field(
        200_000,
        ge=0,
        description="from how many items on a space has a graph, walked where codes cost more; 0 means never",
    )
    exact: bool = Field(
        False, description="FAISS compares every vector in each search, which takes longer, as in evaluation"
    )
    storage: Literal["fp16", "sq8", "fp32", "pq"] = Field(
        "fp16",
        description="how 20,000 items and more keep components: fp16 loses nothing, sq8 is half of it, fp32 "
        "twice, pq an eighth, with the vectors in a file beside",
    )
    milvus: str = Field(
        "", description="http://HOST:PORT of a Milvus that searches; empty means FAISS in this process"
    )
    milvus_token: str = Field("", description="USER:PASSWORD or a token of that Milvus")
    scenarios: Path | None = Field(
        None, description="a TOML file of scenarios, read again when it changes; see docs/rules.md"
    )
    interpreter: str = Field(
        "", description="MODULE:NAME of what reads messages to Converse; empty means the built-in interpreter"
    )
    retention_days: int = Field(
        0, ge=0, description="events that happened longer ago are deleted; 0 keeps them"
    )
    served_days: int = Field(
        30, ge=0, description="days for which pages that were answered are kept; 0 keeps none"
    )
    metrics: str = Field("", description="host:port where Prometheus finds figures over HTTP; empty: nowhere")
    clock: datetime | None = Field(None, description="a time that stands still, for replays of the past")

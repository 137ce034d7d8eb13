"""The settings of a process: flags of `vitrine serve`, or VITRINE_ environment variables."""

import difflib
import logging
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from services.catalog.items import DEFAULT_ATTRIBUTE_NAMES
from services.core.addresses import ListenAddress, OptionalListenAddress, PeerAddress
from services.core.errors import FieldViolation, InvalidArgument

_PREFIX = "VITRINE_"
_CONFIDENTIAL = re.compile("secret|token|database")
# Kubernetes sets such variables for a service named vitrine.
_KUBERNETES_VARIABLE = re.compile("_(PORT|HOST|ADDR|PROTO|TCP)$")
_DATABASES = "write sqlite:////PATH or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"
_log = logging.getLogger(__name__)

_FIXED_TIME_RANGE = datetime(1971, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)


def _split(value: object) -> object:
    return [part for part in value.split(",") if part] if isinstance(value, str) else value


def _database_url(text: str) -> str:
    if not text:
        return text
    try:
        url = sa.make_url(text)
    except sa.exc.ArgumentError:
        raise ValueError(f"it is not a database URL; {_DATABASES}") from None
    if url.get_backend_name() != "sqlite" and url.drivername != "postgresql+psycopg":
        raise ValueError(f"{url.drivername} is not supported; {_DATABASES}")
    return text


DatabaseUrl = Annotated[str, AfterValidator(_database_url)]
"""A SQLAlchemy URL of SQLite or PostgreSQL; empty for the default."""


def _fixed_time(time: datetime) -> datetime:
    """An aware time, far enough from the limits of datetime that days can be added."""
    aware = time if time.tzinfo else time.replace(tzinfo=UTC)
    if not _FIXED_TIME_RANGE[0] <= aware <= _FIXED_TIME_RANGE[1]:
        raise ValueError(f"is {time.isoformat()}, the years 1971 to 9000 are allowed")
    return aware


def _index_backend(backend: str, info: ValidationInfo) -> str:
    address = info.data.get("milvus")
    if backend == "milvus" and not address:
        raise ValueError("it needs --milvus http://HOST:PORT")
    if backend not in {"auto", "milvus"} and address:
        raise ValueError("--milvus is set, but this backend does not use it")
    return backend


class Settings(BaseSettings):
    """The settings of one process; frozen."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, extra="forbid")

    bundle: Path = Field(description="a bundle, or a directory of bundles whose newest is served")
    state: Path = Field(
        Path("state"), description="the directory for the databases, the indexes and the secret"
    )
    address: ListenAddress = Field(
        "127.0.0.1:50051", description="host:port to listen on; port 0 takes a free one"
    )
    embedding: PeerAddress = Field(
        "", description="host:port of the embedding service, if another process runs it"
    )
    ranking: PeerAddress = Field(
        "", description="host:port of the ranking service, if another process runs it"
    )
    embedding_database: DatabaseUrl = Field("", description="SQLAlchemy URL; empty means SQLite under state")
    ranking_database: DatabaseUrl = Field("", description="SQLAlchemy URL; empty means SQLite under state")
    secret: str = Field(
        "",
        description="signs tokens; at least 32 characters, the same for all gateways of a shop; empty means "
        "a secret in the state directory",
    )
    grace: float = Field(
        10.0, ge=0, le=600, description="seconds that running calls have to end when the process stops"
    )
    stream_idle_seconds: float = Field(
        120.0,
        gt=0,
        description="seconds after which a stream is closed whose caller neither sends nor reads",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="where encoders and large indexes run: auto (cuda if torch sees a GPU, else cpu), cpu or "
        "cuda",
    )
    fetch_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode, BeforeValidator(_split)] = (
        Field((), description="private networks that images may be fetched from: 10.1.0.0/16,fd00::/8")
    )
    bundle_poll_seconds: float = Field(
        10.0, ge=0, description="seconds between checks for a newer bundle; 0 means never"
    )
    hot_swap: bool = Field(
        True,
        description="serve a newer bundle as soon as this process and its peers have it ready, which takes "
        "twice the memory for a minute; has no effect with --candidate-bundles",
    )
    candidate_bundles: Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_split)] = Field(
        (), description="further bundles to serve, for experiments whose arms name them: DIR,DIR"
    )
    milvus: str = Field("", description="http://HOST:PORT of a Milvus that searches; empty means none")
    milvus_token: str = Field("", description="USER:PASSWORD or a token for Milvus")
    index_backend: Annotated[
        Literal["auto", "faiss-gpu", "torch", "faiss-cpu", "milvus"], AfterValidator(_index_backend)
    ] = Field(
        "auto",
        description="what searches vectors: faiss-gpu (extra gpu), torch (every vector, on --device), "
        "faiss-cpu, or milvus at --milvus; auto takes Milvus if --milvus is set, else the fastest on "
        "--device: torch on a GPU, faiss-cpu on a CPU",
    )
    hnsw_min_items: int = Field(
        200_000,
        ge=0,
        description="number of items from which faiss-cpu gives a vector space an HNSW graph; 0 means never",
    )
    exact_search: bool = Field(
        False, description="compare every vector in each search, as `vitrine evaluate` does: exact but slower"
    )
    index_storage: Literal["fp16", "sq8", "fp32", "pq"] = Field(
        "fp16",
        description="how faiss-cpu stores the vectors of 20,000 items and more: fp16 is lossless, sq8 takes "
        "half of its memory, fp32 twice, pq an eighth, with the full vectors in a file; with pq, faiss-gpu "
        "has only codes on the GPU",
    )
    allow_other_shop: bool = Field(
        False,
        description="load a bundle even if the state has hardly any of its items, as with another shop's",
    )
    scenarios: Path | None = Field(
        None, description="a TOML file of scenarios, reloaded when it changes; see docs/rules.md"
    )
    interpreter: str = Field(
        "", description="MODULE:NAME of the interpreter of Converse messages; empty means the built-in one"
    )
    event_retention_days: int = Field(
        0, ge=0, le=36_500, description="delete events older than this many days; 0 keeps all events"
    )
    impression_log_days: int = Field(
        30,
        ge=0,
        le=36_500,
        description="days for which the impression log keeps pages; 0 keeps none",
    )
    metrics: OptionalListenAddress = Field(
        "", description="host:port that serves metrics to Prometheus over HTTP; empty means none"
    )
    max_attribute_names: int = Field(
        DEFAULT_ATTRIBUTE_NAMES,
        ge=1,
        description="the maximum number of different attribute names of all items; each takes a few KB of "
        "memory besides its values, and a write with one more is refused",
    )
    fixed_time: Annotated[datetime, AfterValidator(_fixed_time)] | None = Field(
        None,
        description="a fixed time for the clock, to replay the past, in UTC unless it has a zone; "
        "retention deletes nothing then",
    )


def settings_of(flags: Mapping[str, Any]) -> Settings:
    """The settings from flags of `vitrine serve`, by setting, and from the environment.

    Raises:
        InvalidArgument: a value is not allowed; each violation names its flag or variable.
    """
    _warn_of_misspelled_variables()
    try:
        return Settings(**flags)
    except ValidationError as error:
        raise InvalidArgument(_violation(problem, flags) for problem in error.errors()) from None
    except SettingsError as error:
        raise InvalidArgument.of("environment", str(error)) from None


def _violation(problem: Any, flags: Mapping[str, Any]) -> FieldViolation:
    name = str(problem["loc"][0])
    flag, variable = f"--{name.replace('_', '-')}", f"{_PREFIX}{name.upper()}"
    if problem["type"] == "missing":
        return FieldViolation(flag, f"is required, or {variable} in the environment")
    reason = problem["msg"].removeprefix("Value error, ")
    value = "" if _CONFIDENTIAL.search(name) else f" {problem['input']!r}"
    return FieldViolation(flag if name in flags else variable, f"does not allow{value}: {reason}")


def _warn_of_misspelled_variables() -> None:
    names = [f"{_PREFIX}{name.upper()}" for name in Settings.model_fields]
    for variable in sorted(os.environ):
        if not variable.startswith(_PREFIX) or variable in names or _KUBERNETES_VARIABLE.search(variable):
            continue
        if similar := difflib.get_close_matches(variable, names, 1, cutoff=0.85):
            _log.warning("%s is not a setting and has no effect; did you mean %s?", variable, similar[0])

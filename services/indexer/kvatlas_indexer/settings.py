"""Settings of the indexer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

from kvatlas_common.settings import EngineSettings, HashSettings, LogSettings, load


def _host_port(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) < 65536):
        raise ValueError(f"{text!r} is not <host:port>")
    return text


def _zmq_endpoint(text: str) -> str:
    if not re.fullmatch(r"tcp://(\*|\[[^\]]+\]|[^:/\s]+):(\d{1,5}|\*)|ipc://.+", text):
        raise ValueError(f"{text!r} is not tcp://<host>:<port>; to listen on every address write tcp://*:5557")
    return text


def _store(text: str) -> str:
    schemes = ("redis", "rediss", "redis+sentinel", "redis+cluster", "rediss+sentinel", "rediss+cluster")
    if text != "memory" and text.partition("://")[0] not in schemes:
        raise ValueError("the store is memory or a URL that begins with " + ", ".join(f"{s}://" for s in schemes))
    return text


HostPort = Annotated[str, AfterValidator(_host_port)]
ZmqEndpoint = Annotated[str, AfterValidator(_zmq_endpoint)]


class IndexerSettings(HashSettings, EngineSettings, LogSettings):
    """The indexer itself."""

    zmq_listen: tuple[ZmqEndpoint, ...] = Field(
        ("tcp://*:5557",), max_length=64, description="where engines connect to publish their KV events; empty: nowhere"
    )
    listen_ranks: int = Field(
        1, ge=1, le=1024, description="data-parallel ranks of listened engines: rank N publishes to the port plus N"
    )
    topic_prefix: str = Field("", description="take only KV events whose topic begins with this")
    grpc_listen: HostPort = Field("0.0.0.0:50051", description="where routers ask")
    rest_listen: HostPort = Field(
        "127.0.0.1:8081", description="REST, metrics and a web page, open to all who reach it"
    )
    store: Annotated[str, AfterValidator(_store)] = Field(
        "memory",
        description="where the index is: memory (this process alone), or shared: redis://[user:password@]host:port/db, "
        "rediss://, redis+sentinel://host:port,.../service/db, redis+cluster://host:port,...",
    )
    store_prefix: str = Field("kva1:", max_length=64, description="what all keys in the store begin with")
    store_partitions: int | None = Field(
        None, ge=1, le=64, description="parts of the key space in the store; 1, or 4 on a cluster; all shards alike"
    )
    block_ttl_s: float = Field(6 * 3600.0, ge=60, description="entries of a crashed deployment leave the store so late")
    allow_evicting_store: bool = Field(False, description="use a store that may drop index entries when it is full")
    shard: str | None = Field(None, max_length=128, description="name of this shard in a shared store; host and pid")
    recompute_keys: bool = Field(
        False, description="recompute keys from token ids even where the engines' own hashes can be reproduced"
    )
    engine_lease_s: float = Field(15.0, gt=0, description="an engine not heard of for so long gets no requests")
    forget_after_s: float = Field(600.0, gt=0, description="how long the blocks of a dead engine are kept")
    doubt_ttl_s: float = Field(600.0, gt=0, description="how long entries stay usable after messages were lost")
    estimate_ttl_s: float = Field(
        600.0, gt=0, description="how long an engine is taken to hold what it was sent, where its events do not tell"
    )
    held_back_max: int = Field(4096, ge=1, description="messages held back per engine during a replay")
    blocks_max: int = Field(8_000_000, ge=1000, description="blocks kept per engine and medium; the oldest age out")
    message_bytes_max: int = Field(16 << 20, ge=4096, description="the largest KV event message taken")
    drain_s: float = Field(5.0, ge=0, description="how long lookups under way may take when stopping")

    @classmethod
    def load(cls, argv: Sequence[str], environ: Mapping[str, str], *, prog: str = "kvatlas indexer") -> IndexerSettings:
        """Raises `SystemExit` with every problem on standard error."""
        return load(cls, argv, environ, prog=prog, description="Turns engines' KV events into the index, and answers.")

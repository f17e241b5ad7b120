"""Which engines are wanted, as people write them, parsed completely before anything is dialled.

An engine is written as text, `127.0.0.1:8001,events=tcp://127.0.0.1:5557,replay=5558,ranks=2,api-key-env=NAME`, as a
URL, or as a mapping with the same names. `dns:vllm.default.svc:8000` stands for every address of a name and
`file:engines.yaml` for the list in a file; `discovery` watches those two.

One spec is one HTTP address. Data-parallel ranks behind it are engines of their own, whose event and replay ports are
those of rank 0 plus the rank (vLLM 0.32, `distributed/kv_events.py`, `offset_endpoint_port`).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from kvatlas_common.engines.spelling import did_you_mean, kebab, snake
from kvatlas_common.words import EngineId

_TCP = re.compile(r"tcp://(?P<host>\[[^\]]+\]|[^:/\[\]\s]+):(?P<port>\d{1,5})")
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")
_ANY_HOST = ("*", "0.0.0.0", "[::]")
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One HTTP address to reach engines at. `events` and `replay` are ZeroMQ endpoints to dial for rank 0."""

    address: str  # <host:port>, an IPv6 host in brackets
    url: str  # base URL of the HTTP API, without a trailing slash
    events: str | None = None
    replay: str | None = None
    api_key: SecretStr | None = None
    ranks: int = 1  # data-parallel size
    labels: tuple[tuple[str, str], ...] = ()  # sorted by name
    speculative_drop_blocks: int = 0  # matched blocks that speculative decoding (EAGLE, MTP) computes again
    reannounces: bool = False  # its events repeat blocks it merely hit, so copies cannot be counted

    def __str__(self) -> str:
        return self.address

    @property
    def id(self) -> EngineId:
        """Rank 0."""
        return EngineId(self.address)

    @property
    def ids(self) -> tuple[EngineId, ...]:
        """Every rank behind the address."""
        return tuple(EngineId(self.address, rank) for rank in range(self.ranks))

    def events_endpoint(self, rank: int = 0) -> str | None:
        return _offset(self.events, rank)

    def replay_endpoint(self, rank: int = 0) -> str | None:
        return _offset(self.replay, rank)


@dataclass(frozen=True, slots=True)
class EngineDefaults:
    """What holds for engines that do not say otherwise. Without a dial port only engines that name one are dialled."""

    engine_port: int = 8000
    zmq_dial_port: int | None = None
    zmq_replay_port: int | None = None
    api_key: SecretStr | None = None


NO_DEFAULTS = EngineDefaults()


class _Options(BaseModel):
    """What may be said of an engine besides where it is."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    events: str | None = None
    replay: str | None = None
    api_key: SecretStr | None = None
    api_key_env: str | None = None
    ranks: int = Field(default=1, ge=1, le=1024)
    labels: dict[str, str] = Field(default_factory=dict, max_length=16)
    speculative_drop_blocks: int = Field(default=0, ge=0, le=64)
    reannounces: bool = False

    def at(self, scheme: str, host: str, port: int, defaults: EngineDefaults, api_key: SecretStr | None) -> EngineSpec:
        address = f"{host}:{port}"
        return EngineSpec(
            address=address,
            url=f"{scheme}://{address}",
            events=_endpoint("events", self.events or defaults.zmq_dial_port, host, self.ranks),
            replay=_endpoint("replay", self.replay or defaults.zmq_replay_port, host, self.ranks),
            api_key=api_key or defaults.api_key,
            ranks=self.ranks,
            labels=tuple(sorted(self.labels.items())),
            speculative_drop_blocks=self.speculative_drop_blocks,
            reannounces=self.reannounces,
        )


@dataclass(frozen=True, slots=True)
class DnsName:
    """Every address of `host` is an engine at `port`; all are alike but for their host."""

    host: str
    port: int
    like: EngineSpec  # what the engine at `host` itself would be

    def __str__(self) -> str:
        return f"dns:{self.host}:{self.port}"

    def at(self, ip: str) -> EngineSpec:
        """The engine at one address of the name. An IPv6 address is written in brackets."""
        host = f"[{ip}]" if ":" in ip else ip
        return replace(
            self.like,
            address=f"{host}:{self.port}",
            url=f"http://{host}:{self.port}",
            events=_rehost(self.like.events, host),
            replay=_rehost(self.like.replay, host),
        )


@dataclass(frozen=True, slots=True)
class EngineFile:
    """The engines listed in a YAML or JSON file, which may change while it is watched."""

    path: Path

    def __str__(self) -> str:
        return f"file:{self.path}"


EngineSource = EngineSpec | DnsName | EngineFile


def parse_source(
    written: object, defaults: EngineDefaults = NO_DEFAULTS, environ: Mapping[str, str] | None = None
) -> EngineSource:
    """What one item of an engine list names. Raises `ValueError` that says what is wrong with it and the cure.

    `environ` is where `api-key-env` is looked up.
    """
    if isinstance(written, EngineSpec | DnsName | EngineFile):
        return written
    if isinstance(written, str) and written.startswith("file:"):
        if written == "file:":
            raise ValueError("file: is followed by a path")
        return EngineFile(Path(written.removeprefix("file:")))
    if isinstance(written, str):
        where, options = _split_text(written)
    elif isinstance(written, Mapping):
        where, options = _split_mapping(written)
    else:
        raise ValueError(f"an engine is written as text or as a mapping, not as {type(written).__name__}")
    said = _checked(options)
    api_key = _api_key(said, environ or {})
    if where.startswith("dns:"):
        return _dns_name(where.removeprefix("dns:"), said, defaults, api_key)
    return said.at(*_parse_where(where, defaults), defaults, api_key)


def parse_engine(
    written: object, defaults: EngineDefaults = NO_DEFAULTS, environ: Mapping[str, str] | None = None
) -> EngineSpec:
    """Like `parse_source`, where only an engine itself will do."""
    source = parse_source(written, defaults, environ)
    if not isinstance(source, EngineSpec):
        raise ValueError("only engines can be listed here, not dns: or file:")
    return source


def split_list(text: str) -> list[str]:
    """The items of `a:1,ranks=2,b:1`: a piece `name=value` belongs to the engine before it."""
    items: list[str] = []
    for piece in text.split(","):
        if items and re.match(r"\s*[A-Za-z][\w.-]*=", piece):
            items[-1] += "," + piece
        elif piece.strip():
            items.append(piece.strip())
    return items


def clashes(specs: Sequence[EngineSpec]) -> list[str]:
    """What cannot be true of several engines at once: one address twice, or one event stream for two of them."""
    found: list[str] = []
    addresses: set[str] = set()
    streams: dict[str, str] = {}
    for spec in specs:
        if spec.address in addresses:
            found.append(f"engine {spec.address} is listed twice")
            continue
        addresses.add(spec.address)
        for endpoint in (e for rank in range(spec.ranks) if (e := spec.events_endpoint(rank))):
            other = streams.setdefault(endpoint, spec.address)
            if other != spec.address:
                found.append(f"engines {other} and {spec.address} cannot both publish at {endpoint}: give each its own")
    return found


def _dns_name(where: str, said: _Options, defaults: EngineDefaults, api_key: SecretStr | None) -> DnsName:
    if "://" in where:
        raise ValueError(f"dns:{where}: write dns:<host:port>; every address of the name is asked over http")
    for name, value in (("events", said.events), ("replay", said.replay)):
        if value is not None and not value.isdecimal():
            raise ValueError(f"{name} of a dns: name is a port, for it holds on every address of the name")
    scheme, host, port = _parse_where(where, defaults)
    return DnsName(host, port, said.at(scheme, host, port, defaults, api_key))


def _split_text(written: str) -> tuple[str, dict[str, Any]]:
    where, *pieces = (piece.strip() for piece in written.split(","))
    options: dict[str, Any] = {}
    for piece in pieces:
        name, equals, value = piece.partition("=")
        if not equals:
            raise ValueError(f"{piece!r} is not <name>=<value>")
        head, dot, label = name.partition(".")
        if head in ("label", "labels") and dot:
            options.setdefault("labels", {})[label] = value
        elif snake(name) in options:
            raise ValueError(f"{name} is given twice")
        elif snake(name) == "api_key":
            raise ValueError("an API key is not written in the open: put it in a variable and write api-key-env=<NAME>")
        else:
            options[snake(name)] = value
    return where, options


def _split_mapping(written: Mapping[Any, Any]) -> tuple[str, dict[str, Any]]:
    options = {snake(str(name)): value for name, value in written.items()}
    if len(options) < len(written):
        raise ValueError("one name is given twice, spelled differently")
    places = {name: options.pop(name) for name in ("url", "address", "dns") if name in options}
    if len(places) != 1:
        raise ValueError("an engine needs exactly one of url, address, dns")
    ((name, where),) = places.items()
    return (f"dns:{where}" if name == "dns" else str(where)), options


def _checked(options: dict[str, Any]) -> _Options:
    try:
        return _Options.model_validate(options)
    except ValidationError as error:
        # Never the input itself: it may be a key.
        problems = [
            _problem(e["loc"], e["type"], e["msg"]) for e in error.errors(include_input=False, include_url=False)
        ]
        raise ValueError("; ".join(problems)) from None


def _problem(loc: tuple[int | str, ...], kind: str, message: str) -> str:
    name = kebab(".".join(str(part) for part in loc))
    if kind == "extra_forbidden":
        return f"an engine has no option {name}{did_you_mean(name, map(kebab, _Options.model_fields))}"
    return f"{name}: {message[:1].lower()}{message[1:]}"


def _api_key(options: _Options, environ: Mapping[str, str]) -> SecretStr | None:
    if options.api_key_env is None:
        return options.api_key
    if options.api_key is not None:
        raise ValueError("api-key and api-key-env: give one of them")
    if not environ.get(options.api_key_env):
        raise ValueError(f"api-key-env: the environment has no {options.api_key_env}")
    return SecretStr(environ[options.api_key_env])


def _parse_where(where: str, defaults: EngineDefaults) -> tuple[str, str, int]:
    """Scheme, host and port of `host`, `host:port` or a URL."""
    try:
        parts = urlsplit(where if "://" in where else f"//{where}")
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{where!r} is not <host:port>: {error}") from None
    if "@" in parts.netloc:
        raise ValueError("an engine's address holds no user or password; use api-key-env")  # nor is it repeated here
    scheme = parts.scheme or "http"
    if scheme not in _DEFAULT_PORTS:
        raise ValueError(f"{where!r}: engines are asked over http or https")
    if parts.path.rstrip("/") or parts.query or parts.fragment:
        raise ValueError(f"{where!r}: write the engine's address alone, without anything after the port")
    port = port if port is not None else (_DEFAULT_PORTS[scheme] if parts.scheme else defaults.engine_port)
    if port == 0:
        raise ValueError(f"{where!r}: port 0 is no address")
    return scheme, _host(parts.hostname or "", where), port


def _host(host: str, where: str) -> str:
    if ":" in host:
        try:
            return f"[{ipaddress.IPv6Address(host)}]"
        except ValueError:
            raise ValueError(f"{where!r}: {host!r} is not an IPv6 address") from None
    if not _HOST.fullmatch(host) or len(host) > 253:
        raise ValueError(f"{where!r} is not <host:port> or http://<host:port>")
    return host


def _endpoint(name: str, value: str | int | None, host: str, ranks: int) -> str | None:
    """A ZeroMQ endpoint to dial, from a port on the engine's own host or an endpoint in full."""
    if value is None:
        return None
    endpoint = f"tcp://{host}:{value}" if str(value).isdecimal() else str(value)
    if endpoint.startswith("ipc://") and ranks == 1:
        return endpoint
    tcp = _TCP.fullmatch(endpoint)
    if tcp is None:
        raise ValueError(f"{name}: {endpoint!r} is neither a port nor tcp://<host:port>")
    if tcp["host"] in _ANY_HOST:
        raise ValueError(f"{name}: {endpoint} is where the engine binds; to dial it, write {name}={tcp['port']}")
    if not 0 < int(tcp["port"]) <= 65536 - ranks:
        raise ValueError(f"{name}: port {tcp['port']} leaves no room for {ranks} rank(s) up to 65535")
    return endpoint


def _offset(endpoint: str | None, rank: int) -> str | None:
    if endpoint is None or rank == 0:
        return endpoint
    head, _, port = endpoint.rpartition(":")
    return f"{head}:{int(port) + rank}"


def _rehost(endpoint: str | None, host: str) -> str | None:
    return None if endpoint is None else f"tcp://{host}:{endpoint.rpartition(':')[2]}"

"""Where the shared store is: one URL for a single server, Sentinel or Cluster.

    redis://[user:password@]host[:6379][/db]                          one server (Redis or Valkey)
    unix:///path/to/socket[?db=1]                                     the same, over a socket of this machine
    redis+sentinel://[user:password@]h1[:26379],h2,h3/service[/db]    the master the sentinels name
    redis+cluster://[user:password@]h1[:6379],h2,h3                   a cluster, found through any of its nodes

With `rediss` in place of `redis`, over TLS: `?ca=<file>` names the authority, `cert` and `key` a client certificate;
`check_hostname=no` where servers are known by address. `sentinel_user` and `sentinel_password` are for sentinels that
ask. A password is never part of what is shown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

Address: TypeAlias = tuple[str, int]


class Layout(StrEnum):
    SINGLE = "single"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


_SCHEMES = {
    "redis": (Layout.SINGLE, False),
    "rediss": (Layout.SINGLE, True),
    "unix": (Layout.SINGLE, False),
    "redis+sentinel": (Layout.SENTINEL, False),
    "rediss+sentinel": (Layout.SENTINEL, True),
    "redis+cluster": (Layout.CLUSTER, False),
    "rediss+cluster": (Layout.CLUSTER, True),
}
_OPTIONS = frozenset({"ca", "cert", "key", "check_hostname", "sentinel_user", "sentinel_password", "db"})
_PORTS = {Layout.SINGLE: 6379, Layout.SENTINEL: 26379, Layout.CLUSTER: 6379}


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """A parsed URL; `str` gives it back without its password."""

    layout: Layout
    addresses: tuple[Address, ...]
    path: str = ""  # of a unix socket
    service: str = ""  # what the sentinels call the master
    db: int = 0
    tls: bool = False
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    options: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, text: str) -> StoreUrl:
        """Raises `ValueError` that says what is wrong and never quotes a password."""
        scheme, separator, rest = text.partition("://")
        if not separator or scheme not in _SCHEMES:
            raise ValueError(f"a store URL begins with one of {', '.join(s + '://' for s in _SCHEMES)}")
        layout, tls = _SCHEMES[scheme]
        split = urlsplit(f"redis://{rest}")
        options = dict(parse_qsl(split.query, keep_blank_values=True))
        if unknown := sorted(options.keys() - _OPTIONS):
            raise ValueError(f"store URL: unknown option {', '.join(unknown)}; there are {', '.join(sorted(_OPTIONS))}")
        credentials, _, hosts = split.netloc.rpartition("@")
        user, _, password = credentials.partition(":")
        names: dict[str, Any] = {"username": unquote(user) or None, "password": unquote(password) or None}
        if scheme == "unix":
            if not split.path.strip("/"):
                raise ValueError("store URL: unix:// needs the path of a socket")
            return cls(layout, (), path=unquote(split.path), db=_db(options.get("db", "")), options=options, **names)
        addresses = tuple(_address(host, _PORTS[layout]) for host in hosts.split(","))
        if layout is Layout.SINGLE and len(addresses) > 1:
            raise ValueError("store URL: several servers are redis+sentinel:// or redis+cluster://")
        service, db = _path(layout, [unquote(part) for part in split.path.split("/") if part])
        return cls(layout, addresses, "", service, db or _db(options.get("db", "")), tls, options=options, **names)

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}?db={self.db}"
        scheme = next(s for s, of in _SCHEMES.items() if of == (self.layout, self.tls))
        user = f"{self.username}@" if self.username else ""
        hosts = ",".join(show(address) for address in self.addresses)
        path = {Layout.SINGLE: f"/{self.db}", Layout.SENTINEL: f"/{self.service}/{self.db}", Layout.CLUSTER: ""}
        return f"{scheme}://{user}{hosts}{path[self.layout]}"

    def tls_arguments(self) -> dict[str, Any]:
        """What redis-py's TLS connections take."""
        if not self.tls:
            return {}
        return {
            "ssl_ca_certs": self.options.get("ca"),
            "ssl_certfile": self.options.get("cert"),
            "ssl_keyfile": self.options.get("key"),
            "ssl_check_hostname": self.options.get("check_hostname", "yes") != "no",
        }


def show(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _address(text: str, port: int) -> Address:
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^:\[\]\s]+)(?::(\d{1,5}))?", text)
    if match is None or int(match[2] or port) > 65535:
        raise ValueError(f"store URL: {text!r} is not <host> or <host>:<port>")
    return match[1].strip("[]"), int(match[2] or port)


def _path(layout: Layout, parts: list[str]) -> tuple[str, int]:
    """(service, db)"""
    if layout is Layout.SENTINEL:
        if not 1 <= len(parts) <= 2:
            raise ValueError("store URL: redis+sentinel:// needs /<service>, and may have /<db> after it")
        return parts[0], _db(parts[1] if len(parts) == 2 else "")
    if layout is Layout.CLUSTER:
        if any(parts) and parts != ["0"]:
            raise ValueError("store URL: a cluster has only database 0")
        return "", 0
    if len(parts) > 1:
        raise ValueError("store URL: after the host comes /<db> and nothing else")
    return "", _db(parts[0] if parts else "")


def _db(text: str) -> int:
    if text and not text.isdecimal():
        raise ValueError(f"store URL: {text!r} is not a database number")
    return int(text or 0)

"""A real Valkey, started as the `ha` overlay starts it; its socket alone is the test's."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, OutOfMemoryError
from redis.retry import Retry

from kvatlas_loadtest.valkey import binary
from tests.unit.deploy.manifests import SECRETS, rendered

DEADLINE_S = 30.0  # far more than is needed: machines are shared
PASSWORD = SECRETS["kvatlas-store"]["password"]


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[redis.Redis]:
    arguments = rendered("ha").started(rendered("ha").workload("kvatlas-valkey"), tmp_path)
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "valkey.sock"  # a socket's path is short
        ours = ["--port", "0", "--unixsocket", str(socket), "--dir", folder]
        process = subprocess.Popen([binary(), *arguments, *ours], stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + DEADLINE_S
            while not socket.exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            with redis.Redis(unix_socket_path=str(socket), password=PASSWORD) as client:
                yield client
        finally:
            process.kill()
            process.wait()


def test_it_never_drops_an_entry(valkey: redis.Redis) -> None:
    """Full is an error for whoever writes, and everything written before is still there."""
    assert valkey.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    assert valkey.config_get("maxmemory") == {"maxmemory": str(2 << 30)}
    valkey.set("block", b"held", ex=3600)
    valkey.config_set("maxmemory", 1)
    with pytest.raises(OutOfMemoryError):
        valkey.set("another", b"refused")
    assert valkey.get("block") == b"held"


def test_it_keeps_nothing_on_disk(valkey: redis.Redis) -> None:
    assert valkey.config_get("save") == {"save": ""}
    assert valkey.config_get("appendonly") == {"appendonly": "no"}


def test_nobody_gets_in_without_the_password(valkey: redis.Redis) -> None:
    socket = valkey.connection_pool.connection_kwargs["path"]
    once = Retry(NoBackoff(), 0)
    with redis.Redis(unix_socket_path=socket, retry=once) as stranger, pytest.raises(AuthenticationError):
        stranger.ping()

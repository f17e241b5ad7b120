"""Whether what is dialled is connected: a SUB socket by itself never says that it hears nobody.

What an engine publishes while nobody listens is lost, and no sequence number shows it until the engine publishes again.
So whoever dials must know when its connection went and when it is there (again): libzmq tells it through a monitor, a
socket beside the socket. A connection counts from the ZeroMQ handshake on; whatever else answers at the port is none.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

import zmq

from kvatlas_indexer.adapters.zmq_sockets import Socket


class Connection:
    """The connection of a socket that dials one endpoint. `changed(up)` is called in the event loop.

    It begins as not connected, of which nothing is told.
    """

    def __init__(self, socket: Socket, changed: Callable[[bool], None]) -> None:
        self._socket = socket
        self._changed = changed
        self._up = False
        self._monitor = socket.get_monitor_socket(zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED)
        self._descriptor = int(self._monitor.get(zmq.FD))
        asyncio.get_running_loop().add_reader(self._descriptor, self._read)
        self._read()  # connecting may have consumed the edge: see zmq_source

    def close(self) -> None:
        """Before the socket itself is closed."""
        asyncio.get_running_loop().remove_reader(self._descriptor)
        self._socket.disable_monitor()
        self._monitor.close()

    def _read(self) -> None:
        while not self._monitor.closed:  # what a change leads to may be that this is closed
            try:
                event, *_ = self._monitor.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            up = int.from_bytes(event[:2], sys.byteorder) == zmq.Event.HANDSHAKE_SUCCEEDED  # then 4 bytes of value
            if up != self._up:
                self._up = up
                self._changed(up)

"""What every ZeroMQ socket of the indexer has in common.

The sockets are plain ones, read from the event loop through their file descriptor, not `zmq.asyncio` ones: taking a
message from a socket that is drained in batches costs a third of awaiting it (10 against 25 us at 5,300 messages a
second), and the loop is shared with decoding and with gRPC.
"""

from __future__ import annotations

import zmq

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]

SOCKETS_MAX = 16_384  # libzmq's own default, 1,023, would be one socket per engine for no more than that
MESSAGE_BYTES_MAX = 16 << 20


def new_context() -> Context:
    """The context of all sockets of one indexer; whoever makes it closes the sockets first and then calls `term`."""
    context: Context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, SOCKETS_MAX)
    return context


def new_socket(context: Context, kind: int, *, message_bytes_max: int = MESSAGE_BYTES_MAX) -> Socket:
    """A socket for peers that may vanish without a word, or be no ZeroMQ peers at all.

    A frame longer than `message_bytes_max` closes its connection. TCP keepalive, not ZeroMQ heartbeats, finds dead
    peers: a publisher that is not libzmq need not answer heartbeats, and would be cut off again and again.
    """
    socket = context.socket(kind)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.IPV6, 1)
    socket.set(zmq.MAXMSGSIZE, message_bytes_max)
    socket.set(zmq.TCP_KEEPALIVE, 1)
    socket.set(zmq.TCP_KEEPALIVE_IDLE, 10)
    socket.set(zmq.TCP_KEEPALIVE_INTVL, 5)
    socket.set(zmq.TCP_KEEPALIVE_CNT, 3)
    return socket

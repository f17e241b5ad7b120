"""Engines that cost next to nothing, so that what is measured is what stands before them: one process, many ports.

They answer what routers and indexers ask of vLLM 0.32 (health, models, a page of metrics of its size, filtered where it
is asked for), and any completion at once with as many chunks as it wants tokens. `--events`: each has a PUB socket that
says nothing. What they are called is printed as one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time
from collections.abc import Sequence

import uvloop
import zmq

CHUNK_PAUSE_S = 0.001
MODEL = "bench"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_TOKENS = re.compile(rb'"max_tokens": *(\d+)')
_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_USAGE = b'"usage":{"prompt_tokens":7200,"completion_tokens":50,"prompt_tokens_details":{"cached_tokens":6000}}'


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kvatlas_loadtest.bench.stub_engines", description=__doc__)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--events", action="store_true", help="give each a PUB socket")
    asked = parser.parse_args(argv)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(asked.count, asked.events))


async def _serve(count: int, events: bool) -> None:
    engine, context = _Engine(), zmq.Context()
    servers = [await asyncio.start_server(engine.serve, "127.0.0.1", 0, limit=1 << 22) for _ in range(count)]
    addresses = [f"127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    publishers = [context.socket(zmq.PUB) for _ in range(count if events else 0)]
    for publisher in publishers:
        publisher.bind("tcp://127.0.0.1:0")
    endpoints = [publisher.getsockopt_string(zmq.LAST_ENDPOINT) for publisher in publishers]
    print(json.dumps({"addresses": addresses, "events": endpoints}), flush=True)
    await asyncio.Event().wait()


class _Engine:
    """What every one of them says."""

    def __init__(self) -> None:
        self._models = _answer(
            "application/json", json.dumps({"object": "list", "data": [{"id": MODEL, "root": MODEL}]}).encode()
        )
        self._healthy = _answer("text/plain", b"")
        self._missing = _answer("text/plain", b"", "404 Not Found")
        lines = [
            f"process_start_time_seconds {time.time():.2f}",
            f'vllm:num_requests_running{{engine="0",model_name="{MODEL}"}} 0.0',
            f'vllm:num_requests_waiting{{engine="0",model_name="{MODEL}"}} 0.0',
            f'vllm:kv_cache_usage_perc{{engine="0",model_name="{MODEL}"}} 0.0',
            'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="9999"} 1.0',
        ]
        others = [f'vllm:some_seconds_bucket{{engine="0",le="{n}",model_name="{MODEL}"}} 0.0' for n in range(900)]
        self._few = _answer("text/plain; version=0.0.4", "\n".join([*lines, ""]).encode())
        self._page = _answer("text/plain; version=0.0.4", "\n".join([*others, *lines, ""]).encode())

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = _LENGTH.search(head)
                body = await reader.readexactly(int(length[1])) if length else b""
                if head.startswith(b"POST /v1/"):
                    await self._stream(writer, int(asked[1]) if (asked := _TOKENS.search(body)) else 1)
                else:
                    writer.write(self._page_for(head.split(b" ", 2)[1]))
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client is gone
        finally:
            writer.close()

    def _page_for(self, target: bytes) -> bytes:
        if target.startswith(b"/metrics"):
            return self._few if b"?" in target else self._page
        if target.startswith(b"/v1/models"):
            return self._models
        return self._healthy if target == b"/health" else self._missing

    async def _stream(self, writer: asyncio.StreamWriter, tokens: int) -> None:
        writer.write(_STREAM)
        for number in range(tokens):
            if number:
                await asyncio.sleep(CHUNK_PAUSE_S)
            writer.write(_chunk(b'data: {"choices":[{"index":0,"delta":{"content":"word "}}]}\n\n'))
        writer.write(_chunk(b'data: {"choices":[],' + _USAGE + b"}\n\ndata: [DONE]\n\n") + b"0\r\n\r\n")
        await writer.drain()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _answer(kind: str, body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


if __name__ == "__main__":
    main()

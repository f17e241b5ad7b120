"""Cuts a capture to what `kvatlas_loadtest replay` compares: `python cut.py FROM TO [REQUESTS]`.

Requests keep their token ids, cached tokens and salt; events lose their token ids. With REQUESTS, only the first so many
of them are kept and the events that came before the next.
"""

from __future__ import annotations

import base64
import gzip
import json
import sys
from pathlib import Path

import msgspec


def without_tokens(payload: bytes) -> bytes:
    batch = msgspec.msgpack.decode(payload)
    for event in batch[1]:
        if isinstance(event, dict):
            event.update({"token_ids": []} if "token_ids" in event else {})
        elif event[0] == "BlockStored":
            event[3] = []
    return msgspec.msgpack.encode(batch)


def main(source: Path, target: Path, count: int | None) -> None:
    requests = [json.loads(line) for line in gzip.open(source / "requests.jsonl.gz")]
    messages = [json.loads(line) for line in gzip.open(source / "events.jsonl.gz")]
    if count is not None and count < len(requests):
        messages = messages[: requests[count]["events_before"]]
        requests = requests[:count]
    target.mkdir(parents=True)
    with gzip.GzipFile(target / "requests.jsonl.gz", "wb", 9, mtime=0) as file:
        for request in requests:
            kept = {name: request[name] for name in ("prompt_token_ids", "output_token_ids", "cached_tokens")}
            kept["body"] = {"cache_salt": request["body"].get("cache_salt")}
            file.write(json.dumps(kept, separators=(",", ":")).encode() + b"\n")
    with gzip.GzipFile(target / "events.jsonl.gz", "wb", 9, mtime=0) as file:
        for message in messages:
            *names, payload = (base64.b64decode(frame) for frame in message["frames"])
            frames = [base64.b64encode(frame).decode() for frame in (*names, without_tokens(payload))]
            file.write(json.dumps({"frames": frames}).encode() + b"\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)

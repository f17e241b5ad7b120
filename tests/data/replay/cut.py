"""Cuts a capture to what `kvatlas_loadtest replay` compares: `python cut.py FROM TO`.

Requests keep their token ids, cached tokens and salt; events lose their token ids.
"""

from __future__ import annotations

import base64
import gzip
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for name, cut in (("requests.jsonl.gz", request), ("events.jsonl.gz", message)):
        write(target / name, map(cut, map(json.loads, gzip.decompress((source / name).read_bytes()).splitlines())))


def request(line: dict[str, Any]) -> dict[str, Any]:
    kept = {name: line[name] for name in ("prompt_token_ids", "output_token_ids", "cached_tokens")}
    return kept | {"body": {"cache_salt": line["body"].get("cache_salt")}}


def message(line: dict[str, Any]) -> dict[str, Any]:
    topic, seq, payload = line["frames"]
    batch = msgspec.msgpack.decode(base64.b64decode(payload))
    for event in batch[1]:
        if isinstance(event, dict) and "token_ids" in event:
            event["token_ids"] = []
        elif isinstance(event, list) and event[0] == "BlockStored":
            event[3] = []
    return {"frames": [topic, seq, base64.b64encode(msgspec.msgpack.encode(batch)).decode()]}


def write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    with gzip.GzipFile(path, "wb", 9, mtime=0) as file:
        file.writelines(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""The words of the indexer's findings: what is wrong with an engine's events, and the exact change to make."""

from __future__ import annotations

import json

from kvatlas_common.findings import Code, Finding
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.silence import Silent

EVENTS_PORT, REPLAY_PORT = 5557, 5558


def no_engines() -> Finding:
    change = "name engines with --engine <host:port>,events=5557,replay=5558, or let them publish to --zmq-listen"
    return Finding(Code.NO_ENGINES, "no engine is known", "none is listed, and none has connected", change)


def unreported(count: int) -> Finding:
    return Finding(
        Code.CACHED_TOKENS_UNREPORTED,
        f"{count} answers in a row that should have hit its cache told their usage and no cached tokens: what is "
        "predicted cannot be held against it",
        "it was started without --enable-prompt-tokens-details (or nothing was cached: versions before 0.32 leave a 0 "
        "out)",
        "start it with --enable-prompt-tokens-details",
    )


def events_unreachable(endpoint: str) -> Finding:
    return Finding(
        Code.EVENTS_UNREACHABLE,
        f"its event stream at {endpoint} is not connected: what it publishes is lost",
        "KV events are off, or its publisher binds another port, or connects where it should bind, or a firewall is "
        "between",
        f"start it with --kv-events-config '{_publisher(f'tcp://*:{_port(endpoint)}')}', and open port "
        f"{_port(endpoint)} to the indexer",
    )


def no_events(engine: EngineId, model: str, silent: Silent, dialled: str | None, *, heard: bool) -> Finding:
    since = "since its last event" if heard else "and no event of it has ever come"
    wrong = f"it has computed {silent.tokens} prompt tokens in {silent.seconds:.0f} s {since}"
    if heard:
        cause = "its event stream is cut on the way, or its publisher has stopped"
        change = "check the network and the publisher's port (rank N: port + N); if it stays silent, restart the engine"
        return Finding(Code.NO_EVENTS, wrong, cause, change)
    if dialled is not None:
        cause = f"KV events are off, or what answers at {dialled} is another engine's publisher, or not this rank's"
        config = _publisher(f"tcp://*:{_port(dialled)}", replay=True)
        return Finding(Code.NO_EVENTS, wrong, cause, f"start it with --kv-events-config '{config}'")
    cause = "KV events are off, or go elsewhere, or their topic does not name this engine's address"
    return Finding(Code.NO_EVENTS, wrong, cause, f"start it with --kv-events-config '{_connecting(engine, model)}'")


def not_heard_yet(engine: EngineId, model: str, dialled: str | None) -> Finding:
    wrong = "no event of it has come yet, and it has computed too little to tell whether that is wrong"
    config = _connecting(engine, model) if dialled is None else _publisher(f"tcp://*:{_port(dialled)}", replay=True)
    change = f"send it a prompt of several blocks; it publishes with --kv-events-config '{config}'"
    return Finding(Code.NOT_HEARD_YET, wrong, "it is idle, or KV events are off", change)


def replay_absent(engine: EngineId, dialled: str | None) -> Finding:
    events = f",events={_port(dialled)}" if dialled is not None else ""
    return Finding(
        Code.REPLAY_ABSENT,
        "what it publishes while nobody listens cannot be asked for again: it is inexact after every loss, and after "
        "every restart of the indexer",
        "no replay endpoint is known for it",
        f'add "replay_endpoint": "tcp://*:{REPLAY_PORT}" to its --kv-events-config, and write '
        f"--engine {engine.address}{events},replay={REPLAY_PORT} for the indexer",
    )


def replay_unreachable(endpoint: str, how: str) -> Finding:
    return Finding(
        Code.REPLAY_UNREACHABLE,
        f"its replay at {endpoint} failed: {how}",
        "it has no replay_endpoint, or at another port (rank N: port + N), or a firewall is between",
        f'add "replay_endpoint": "tcp://*:{_port(endpoint)}" to its --kv-events-config and open that port, or correct '
        "replay= at --engine",
    )


def inexact(reason: str, *, can_replay: bool) -> Finding:
    reset = "POST /reset_prefix_cache to it (VLLM_SERVER_DEV_MODE=1) or restart it: from then on it is exact"
    if can_replay:
        return Finding(Code.INEXACT, reason, "", f"wait for the next replay from its first message, or {reset}")
    return Finding(
        Code.INEXACT,
        reason,
        "there is no replay endpoint to ask for what was missed",
        f"give it one (see {Code.REPLAY_ABSENT}); {reset}",
    )


def store_evicts(why: str) -> Finding:
    change = "CONFIG SET maxmemory-policy noeviction, and start the indexer without --allow-evicting-store"
    return Finding(Code.STORE_EVICTS, why, "--allow-evicting-store was given", change)


def store_unreachable() -> Finding:
    wrong = "the store does not answer: lookups of other shards' engines fail, and nothing is handed over"
    return Finding(Code.STORE_UNREACHABLE, wrong, "it is down, full, or out of reach", "start it; check --store")


def _publisher(endpoint: str, *, replay: bool = False) -> str:
    config = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
    return json.dumps(config | ({"replay_endpoint": f"tcp://*:{REPLAY_PORT}"} if replay else {}))


def _connecting(engine: EngineId, model: str) -> str:
    topic = f"kv@{engine.address}@{model or '<model>'}"
    endpoint = f"tcp://<indexer>:{EVENTS_PORT}"
    config = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint, "topic": topic}
    return json.dumps(config)


def _port(endpoint: str) -> str:
    return endpoint.rpartition(":")[2]

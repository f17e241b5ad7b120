"""The commands of `python -m kvatlas_loadtest` and their options."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq

from kvatlas_common.blocks.profile import Algorithm
from kvatlas_common.fleet import Adapter
from kvatlas_common.prompts.errors import BadModelFiles, ModelFilesMissing
from kvatlas_loadtest.block_pool import PoolVersion
from kvatlas_loadtest.captures import CaptureError
from kvatlas_loadtest.engine import ANY_PORT, TINY_MODEL, EngineConfig, SimulatedEngine
from kvatlas_loadtest.events import WireVersion
from kvatlas_loadtest.replay import ReplayOptions, replay
from kvatlas_loadtest.scheduler import EngineLimits
from kvatlas_loadtest.time_model import NO_TIME, TimeModel

EXIT_DIFFERENT, EXIT_UNUSABLE = 1, 2

ENGINE_EPILOG = """examples:
  an engine that an indexer dials, on any free ports (the first line of output names them):
    python -m kvatlas_loadtest engine
  an engine of vLLM 0.10 that connects to an indexer, as the reference set-up has it:
    python -m kvatlas_loadtest engine --port 8000 --vllm-version 0.10 --block-size 64 \\
      --prefix-caching-hash-algo sha256_cbor_64bit --hash-seed 42 --kv-events-endpoint tcp://127.0.0.1:5557
"""
REPLAY_EPILOG = """example:
  python -m kvatlas_loadtest replay captures/v032-evict-b32 --num-blocks 140 --block-size 32 --hash-seed 42 \\
    --prefix-caching-hash-algo sha256_cbor --resets 40,80 --pool 0.32

Exit status: 0 no difference, 1 differences, 2 the capture or the options cannot be used.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return int(args.run(args))
    except (CaptureError, ModelFilesMissing, BadModelFiles, ValueError, OSError, zmq.ZMQError) as error:
        print(f"kvatlas_loadtest {args.command}: {error}", file=sys.stderr)
        return EXIT_UNUSABLE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvatlas_loadtest", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    engine = commands.add_parser(
        "engine",
        help="serve one simulated engine until SIGTERM",
        description="An engine by all its wires (OpenAI API, metrics, KV events, replay), simulated in what it "
        "computes. Prints one JSON line with its addresses when it is ready.",
        epilog=ENGINE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _engine_options(engine)
    engine.set_defaults(run=_run_engine)
    replay_command = commands.add_parser(
        "replay",
        help="compare the simulated engine with a real one's recorded events",
        description="Feeds a capture's requests to the simulated engine and compares its KV events (type, keys, "
        "medium, order) and cached tokens with those recorded.",
        epilog=REPLAY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _replay_options(replay_command)
    replay_command.set_defaults(run=_run_replay)
    return parser


def _hash_options(parser: argparse.ArgumentParser, algorithm: str | None) -> None:
    parser.add_argument("--hash-seed", metavar="SEED", help="the engine's PYTHONHASHSEED (default: not set)")
    parser.add_argument(
        "--prefix-caching-hash-algo",
        choices=[str(a) for a in Algorithm],
        default=algorithm,
        required=algorithm is None,
        help="how block keys are computed" + (f" (default: {algorithm})" if algorithm else ""),
    )


def _adapter_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora-modules", nargs="*", default=[], metavar="NAME=PATH", help="adapters the engine serves, numbered from 1"
    )


def _adapters(args: argparse.Namespace) -> tuple[Adapter, ...]:
    return tuple(_adapter(text, number) for number, text in enumerate(args.lora_modules, 1))


def _engine_options(parser: argparse.ArgumentParser) -> None:
    limits, config = EngineLimits(), EngineConfig()
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to serve HTTP on (default: %(default)s)")
    add("--port", type=int, default=0, help="port of the API; 0: any free one (default)")
    add("--model", type=Path, default=TINY_MODEL, help="folder with the tokenizer and template (default: a tiny model)")
    add("--served-model-name", default="tiny", help="(default: %(default)s)")
    _adapter_option(parser)
    add(
        "--vllm-version",
        type=WireVersion,
        choices=list(WireVersion),
        default=WireVersion.V0_32,
        metavar="VERSION",
        help=f"whose events, extra keys and pool: {', '.join(WireVersion)} (default: %(default)s)",
    )
    add("--num-gpu-blocks-override", type=int, default=limits.num_blocks, metavar="N", help="(default: %(default)s)")
    add("--block-size", type=int, default=limits.block_size, metavar="TOKENS", help="(default: %(default)s)")
    _hash_options(parser, config.hash_algorithm)
    add("--bytes-block-hashes", action="store_true", help="publish whole hashes instead of 64-bit integers")
    add(
        "--kv-events-endpoint",
        default=ANY_PORT,
        metavar="ENDPOINT",
        help="binds if a wildcard or port 0, else connects; '' for no events",
    )
    add("--kv-events-replay-endpoint", default=ANY_PORT, metavar="ENDPOINT", help="'' for no replay")
    add("--kv-events-topic", metavar="TOPIC", help="(default: kv@HOST:PORT@MODEL)")
    add("--first-seq", type=int, default=0, help="number of the first event message (default: 0)")
    add("--data-parallel-size", type=int, default=1, metavar="N", help="ranks, each a cache of its own (default: 1)")
    add("--max-model-len", type=int, default=limits.max_model_len, metavar="TOKENS", help="(default: %(default)s)")
    add("--max-num-seqs", type=int, default=limits.max_num_seqs, metavar="N", help="(default: %(default)s)")
    add(
        "--max-num-batched-tokens",
        type=int,
        default=limits.max_num_batched_tokens,
        metavar="N",
        help="(default: %(default)s)",
    )
    add("--api-key", help="required of clients of /v1")
    add(
        "--speed",
        type=float,
        default=1.0,
        help="1: about one large GPU with a 32B model; 0: no time at all (default: 1)",
    )
    add("--seed", type=int, default=0, help="of the answers (default: 0)")
    add(
        "--debug",
        action="store_true",
        help="answer GET /debug/block_table (the blocks it holds) and POST /debug/faults (what goes wrong with its "
        "next event messages and replays); for tests",
    )


def _replay_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("capture", type=Path, metavar="DIR", help="folder with events.jsonl[.gz] and requests.jsonl[.gz]")
    add("--num-blocks", type=int, required=True, metavar="N", help="the engine's --num-gpu-blocks-override")
    add("--block-size", type=int, required=True, metavar="B", help="in tokens")
    _hash_options(parser, None)
    add("--resets", type=_numbers, default=(), metavar="I,J", help="the cache was reset after these requests, from 0")
    add("--pool", type=PoolVersion, choices=list(PoolVersion), default=PoolVersion.V0_32, help="whose pool rules")
    add(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help="chunk of a prompt (default: 2048; pool 0.10: no chunks)",
    )
    _adapter_option(parser)
    add("--json", action="store_true", help="print the counts as JSON")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part.strip())


def _run_replay(args: argparse.Namespace) -> int:
    options = ReplayOptions(
        num_blocks=args.num_blocks,
        block_size=args.block_size,
        hash_algorithm=args.prefix_caching_hash_algo,
        hash_seed=args.hash_seed,
        pool=args.pool,
        resets=args.resets,
        max_num_batched_tokens=args.max_num_batched_tokens,
        adapters=_adapters(args),
    )
    report = replay(args.capture, options)
    if args.json:
        print(json.dumps(report.as_json()))
    else:
        print(f"events: {report.events_real} captured, {report.events_simulated} simulated")
        print(f"differences: {report.differences}; cached-token mismatches: {report.cached_mismatches}")
    if report.first_difference:
        print(f"first difference: {report.first_difference}", file=sys.stderr)
    return 0 if report.equal else EXIT_DIFFERENT


def _run_engine(args: argparse.Namespace) -> int:
    limits = EngineLimits(
        num_blocks=args.num_gpu_blocks_override,
        block_size=args.block_size,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_seqs=args.max_num_seqs,
        max_model_len=args.max_model_len,
    )
    config = EngineConfig(
        model=args.served_model_name,
        model_path=args.model.resolve(),
        adapters=_adapters(args),
        host=args.host,
        port=args.port,
        version=args.vllm_version,
        limits=limits,
        hash_algorithm=args.prefix_caching_hash_algo,
        hash_seed=args.hash_seed,
        hashes_as_bytes=args.bytes_block_hashes,
        events_endpoint=args.kv_events_endpoint or None,
        replay_endpoint=args.kv_events_replay_endpoint or None,
        topic=args.kv_events_topic,
        data_parallel_size=args.data_parallel_size,
        api_key=args.api_key,
        time_model=TimeModel(speed=args.speed) if args.speed else NO_TIME,
        seed=args.seed,
        debug=args.debug,
    )
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(config, args.first_seq))
    return 0


async def _serve(config: EngineConfig, first_seq: int) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    engine = SimulatedEngine(config)
    await engine.start(first_seq)
    try:
        addresses = {
            "url": engine.url,
            "address": engine.address,
            "events_endpoint": engine.events_endpoint,
            "replay_endpoint": engine.replay_endpoint,
            "topic": engine.topic,
            "profile": config.profile().name,
        }
        print(json.dumps(addresses), flush=True)
        await stop.wait()
    finally:
        await engine.stop()


def _adapter(text: str, number: int) -> Adapter:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ValueError(f"--lora-modules {text!r} is not NAME=PATH")
    return Adapter(name, path, number)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it exists; None: asyncio's own."""
    try:
        import uvloop
    except ImportError:  # not on Windows
        return None
    return uvloop.new_event_loop

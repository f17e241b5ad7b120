"""gRPC messages to our types and back. What does not parse raises `ValueError` that names the field."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvatlas_common.fleet import Adapter, EngineView, Head, Health, InFlight, Load, Sync
from kvatlas_common.matching import EngineMatch, MatchAnswer, PlainMatches
from kvatlas_common.observations import Finished, FirstToken, Observation, Outcome, Routed
from kvatlas_common.proto.kvatlas.v1 import index_pb2 as pb
from kvatlas_common.words import EngineId, Medium

K = TypeVar("K")
T = TypeVar("T")
V = TypeVar("V")

KNOWN_MAX = 16_384

NO_HEAD = Head()

_medium = lru_cache(maxsize=len(Medium))(Medium)


class _Known(dict[K, V]):
    """What `make` makes of a key, remembered: a look into a dictionary takes a quarter of one into an `lru_cache`."""

    def __init__(self, make: Callable[[K], V]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, key: K) -> V:
        if len(self) >= KNOWN_MAX:
            self.clear()
        made = self[key] = self._make(key)
        return made


_names = _Known[EngineId, str](str)  # an answer names the same engines as the one before
_engine_ids = _Known[str, EngineId](EngineId.parse)


def pack_keys(keys: Sequence[int] | np.ndarray[Any, Any]) -> bytes:
    """uint64[n] -> n x 8 bytes, little-endian."""
    return np.asarray(keys, dtype="<u8").tobytes()


def unpack_keys(packed: bytes) -> NDArray[np.uint64]:
    if len(packed) % 8:
        raise ValueError(f"keys: {len(packed)} bytes are not whole 8-byte block keys")
    return np.frombuffer(packed, dtype="<u8").astype(np.uint64, copy=False)


def match_request(
    model: str,
    prompts: Mapping[str, Sequence[int] | np.ndarray[Any, Any]],
    engines: Iterable[EngineId] = (),
    *,
    estimate: bool = False,
) -> pb.MatchRequest:
    return pb.MatchRequest(
        model=model,
        prompts=[pb.PromptKeys(profile=profile, keys=pack_keys(keys)) for profile, keys in prompts.items()],
        engines=[str(e) for e in engines],
        estimate=estimate,
        reads_plain=True,  # as `match_answer` does
    )


def match_response(answer: MatchAnswer, *, plain: bool = False) -> pb.MatchResponse:
    """`plain`: whoever asked reads `MatchResponse.plain`."""
    message = pb.MatchResponse()
    write_match_response(answer, message, plain=plain)
    return message


def write_match_response(answer: MatchAnswer, message: pb.MatchResponse, *, plain: bool) -> None:
    """The same into an empty message: one put into another is copied."""
    message.engines.extend(map(_engine_match, answer.listed if plain else answer.matches))
    message.unknown.extend(map(str, answer.unknown))
    columns = answer.plain
    if plain and columns.engines:
        message.plain.engines.extend(map(_names.__getitem__, columns.engines))
        message.plain.blocks.extend(columns.blocks)
        if not all(columns.exact):
            message.plain.inexact.extend([place for place, exact in enumerate(columns.exact) if not exact])


def match_answer(message: pb.MatchResponse) -> MatchAnswer:
    """Raises `ValueError` for columns that do not go together."""
    columns = message.plain
    engines = list(map(_engine_ids.__getitem__, columns.engines))
    exact = [True] * len(engines)
    if len(columns.blocks) != len(engines) or any(place >= len(engines) for place in columns.inexact):
        raise ValueError(f"plain: {len(engines)} engines, {len(columns.blocks)} blocks, inexact {columns.inexact}")
    for place in columns.inexact:
        exact[place] = False
    return MatchAnswer(
        tuple(map(_listed, message.engines)),
        tuple(map(_engine_ids.__getitem__, message.unknown)),
        PlainMatches(engines, list(columns.blocks), exact),
    )


def _engine_match(match: EngineMatch) -> pb.EngineMatch:
    return pb.EngineMatch(
        engine=_names[match.engine],
        blocks=match.blocks,
        media=[pb.MediumBlocks(medium=medium, blocks=of_medium) for medium, of_medium in match.media.items()],
        exact=match.exact,
        doubtful=match.doubtful,
        expected=max(match.expected, match.blocks),
    )


def _listed(message: pb.EngineMatch) -> EngineMatch:
    media = {_medium(each.medium): each.blocks for each in message.media}
    engine = _engine_ids[message.engine]
    return EngineMatch(engine, message.blocks, media, message.exact, message.doubtful, message.expected)


def engine_message(view: EngineView) -> pb.Engine:
    return pb.Engine(
        id=str(view.id),
        url=view.url,
        models=sorted(view.models),
        adapters=[pb.Adapter(name=a.name, path=a.path, number=a.number) for a in view.adapters],
        root=view.root,
        health=view.health,
        profile=view.profile,
        profile_verified=view.profile_verified,
        block_size=view.block_size,
        sync=view.sync,
        inexact_reason=view.inexact_reason,
        max_model_len=view.max_model_len,
        kv_tokens=view.kv_tokens,
        labels=dict(view.labels),
    )


def engine_view(message: pb.Engine) -> EngineView:
    def given(name: str, value: T) -> T | None:
        return value if message.HasField(name) else None

    return EngineView(
        id=EngineId.parse(message.id),
        url=message.url,
        models=frozenset(message.models),
        adapters=tuple(
            Adapter(a.name, a.path if a.HasField("path") else None, a.number if a.HasField("number") else None)
            for a in message.adapters
        ),
        root=given("root", message.root),
        health=Health(message.health),
        profile=given("profile", message.profile),
        profile_verified=message.profile_verified,
        block_size=given("block_size", message.block_size),
        sync=Sync(message.sync),
        inexact_reason=message.inexact_reason,
        max_model_len=given("max_model_len", message.max_model_len),
        kv_tokens=given("kv_tokens", message.kv_tokens),
        labels=tuple(sorted(message.labels.items())),
    )


def load_message(engine: EngineId, load: Load, now: float) -> pb.EngineLoad:
    """`now`: of the clock that `load.head` was told by."""
    others, head = load.others, load.head
    return pb.EngineLoad(
        engine=str(engine),
        running=load.running,
        waiting=load.waiting,
        kv_usage=load.kv_usage,
        scraped_at=load.scraped_at,
        loras=sorted(load.loras),
        others=pb.InFlight(
            prefilling=others.prefilling, prefill_tokens=others.prefill_tokens, decoding=others.decoding
        ),
        head=None if head == NO_HEAD else pb.Head(tokens=head.tokens, age_s=max(now - head.since, 0.0)),
    )


def engine_load(message: pb.EngineLoad, now: float) -> tuple[EngineId, Load]:
    """`now`: of the clock that `Load.head` is to be told by."""
    others = message.others
    head = Head(message.head.tokens, now - message.head.age_s) if message.HasField("head") else NO_HEAD
    return _engine_ids[message.engine], Load(
        message.running,
        message.waiting,
        message.kv_usage,
        message.scraped_at,
        frozenset(message.loras),
        InFlight(others.prefilling, others.prefill_tokens, others.decoding),
        head,
    )


def observation_message(observation: Observation) -> pb.Observation:
    message = pb.Observation(request_id=observation.request_id, engine=str(observation.engine), model=observation.model)
    match observation:
        case Routed():
            message.routed.prompt_tokens = observation.prompt_tokens
            message.routed.predicted_cached_tokens = observation.predicted_cached_tokens
            for profile, keys in observation.keys.items():
                message.routed.prompts.add(profile=profile, keys=pack_keys(keys))
            message.routed.again = observation.again
            if observation.to_compute is not None:
                message.routed.to_compute = observation.to_compute
            message.routed.silent_s = observation.silent_s
            message.routed.SetInParent()
        case FirstToken():
            message.first_token.ttft_s = observation.ttft_s
            message.first_token.SetInParent()
        case Finished():
            if observation.cached_tokens is not None:
                message.finished.cached_tokens = observation.cached_tokens
            message.finished.completion_tokens = observation.completion_tokens
            message.finished.comparable = observation.comparable
            message.finished.outcome = observation.outcome
    return message


def observation(message: pb.Observation) -> Observation:
    about = (message.request_id, EngineId.parse(message.engine), message.model)
    match message.WhichOneof("what"):
        case "routed":
            routed = message.routed
            keys = {p.profile: tuple(unpack_keys(p.keys).tolist()) for p in routed.prompts}
            return Routed(
                *about,
                routed.prompt_tokens,
                routed.predicted_cached_tokens,
                keys,
                routed.again,
                routed.to_compute if routed.HasField("to_compute") else None,
                routed.silent_s,
            )
        case "first_token":
            return FirstToken(*about, message.first_token.ttft_s)
        case "finished":
            done = message.finished
            cached = done.cached_tokens if done.HasField("cached_tokens") else None
            return Finished(*about, cached, done.completion_tokens, done.comparable, Outcome(done.outcome))
        case _:
            raise ValueError("what: none of routed, first_token, finished is given")

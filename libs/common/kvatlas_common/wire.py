"""gRPC messages to our types and back. What does not parse raises `ValueError` that names the field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from kvatlas_common.fleet import Adapter, EngineView, Head, Health, InFlight, Load, Sync
from kvatlas_common.matching import EngineMatch, MatchAnswer
from kvatlas_common.observations import Finished, FirstToken, Observation, Outcome, Routed
from kvatlas_common.proto.kvatlas.v1 import index_pb2 as pb
from kvatlas_common.words import EngineId, Medium

T = TypeVar("T")

NO_HEAD = Head()

_engine_id = lru_cache(maxsize=16_384)(EngineId.parse)  # an answer names the same engines as the one before
_new = tuple.__new__  # what a NamedTuple calls, without the function around it
_LENGTH_DELIMITED = 2
_ENGINES = pb.MatchResponse.ENGINES_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_ENGINE = pb.EngineMatch.ENGINE_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_MORE = 0x80  # from here on, a byte of a varint is not its last
_medium = lru_cache(maxsize=len(Medium))(Medium)


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
    )


def match_response(answer: MatchAnswer) -> pb.MatchResponse:
    return pb.MatchResponse.FromString(packed_match_response(answer))


def packed_match_response(answer: MatchAnswer) -> bytes:
    """Put together from parts as they are on the wire, most of them seen before: a third of setting field by field."""
    parts: list[bytes] = []
    for engine, blocks, media, exact, doubtful, expected in answer.matches:
        name = _name_field(engine)
        other = _other_fields(blocks, tuple(media.items()), exact, doubtful, max(expected, blocks))
        parts += (_engines_field(len(name) + len(other)), name, other)
    if answer.unknown:
        parts.append(pb.MatchResponse(unknown=map(str, answer.unknown)).SerializeToString())
    return b"".join(parts)


# Messages in parts: of two of one kind, one after the other, protobuf makes one that has the fields of both.


@lru_cache(maxsize=16_384)
def _name_field(engine: EngineId) -> bytes:
    return pb.EngineMatch(engine=str(engine)).SerializeToString()


@lru_cache(maxsize=16_384)
def _other_fields(
    blocks: int, media: tuple[tuple[Medium, int], ...], exact: bool, doubtful: int, expected: int
) -> bytes:
    return pb.EngineMatch(
        blocks=blocks,
        media=[pb.MediumBlocks(medium=medium, blocks=of_medium) for medium, of_medium in media],
        exact=exact,
        doubtful=doubtful,
        expected=expected,
    ).SerializeToString()


@lru_cache(maxsize=1024)
def _engines_field(length: int) -> bytes:
    """What comes before one of the engines of an answer: the field's number and kind, and its length as a varint."""
    field = bytearray([_ENGINES])
    while length >= _MORE:
        field.append(length % _MORE | _MORE)
        length >>= 7
    field.append(length)
    return bytes(field)


def match_answer(message: pb.MatchResponse) -> MatchAnswer:
    return unpacked_match_answer(message.SerializeToString())


def unpacked_match_answer(packed: bytes) -> MatchAnswer:
    """What `packed_match_response` puts together, taken apart the same way: a third of reading field by field.

    An encoder may order the fields as it likes: from what does not begin as ours does, it is read as any message.
    """
    matches: list[EngineMatch] = []
    at, end = 0, len(packed) - 3
    while at < end and packed[at] == _ENGINES and packed[at + 1] < _MORE and packed[at + 2] == _ENGINE:
        first, last = at + 2, at + 2 + packed[at + 1]
        behind_name = first + 2 + packed[first + 1]
        if behind_name > last or last > len(packed):  # its length takes more bytes, or it is cut off
            break
        engine, others = _engine_of(packed[first:behind_name]), _others_of(packed[behind_name:last])
        matches.append(_new(EngineMatch, (engine, *others)))
        at = last
    try:
        left = pb.MatchResponse.FromString(packed[at:])
    except DecodeError as error:
        raise ValueError(f"answer: {error}") from None
    matches += [_new(EngineMatch, (_engine_id(each.engine), *_others(each))) for each in left.engines]
    return MatchAnswer(tuple(matches), tuple([_engine_id(engine) for engine in left.unknown]))


@lru_cache(maxsize=16_384)
def _engine_of(packed: bytes) -> EngineId:
    return EngineId.parse(pb.EngineMatch.FromString(packed).engine)


@lru_cache(maxsize=16_384)
def _others_of(packed: bytes) -> tuple[int, Mapping[Medium, int], bool, int, int]:
    return _others(pb.EngineMatch.FromString(packed))


def _others(message: pb.EngineMatch) -> tuple[int, Mapping[Medium, int], bool, int, int]:
    """All fields of an `EngineMatch` but the first."""
    media = {_medium(each.medium): each.blocks for each in message.media}
    return message.blocks, media, message.exact, message.doubtful, message.expected


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
    return _engine_id(message.engine), Load(
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

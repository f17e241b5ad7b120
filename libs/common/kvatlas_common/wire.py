"""gRPC messages to our types and back. What does not parse raises `ValueError` that names the field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from kvatlas_common.fleet import Adapter, EngineView, Health, Load, Sync
from kvatlas_common.matching import EngineMatch, MatchAnswer
from kvatlas_common.proto.kvatlas.v1 import index_pb2 as pb
from kvatlas_common.words import EngineId, Medium

T = TypeVar("T")


def pack_keys(keys: Sequence[int] | np.ndarray[Any, Any]) -> bytes:
    """uint64[n] -> n x 8 bytes, little-endian."""
    return np.asarray(keys, dtype="<u8").tobytes()


def unpack_keys(packed: bytes) -> list[int]:
    if len(packed) % 8:
        raise ValueError(f"keys: {len(packed)} bytes are not whole 8-byte block keys")
    keys: list[int] = np.frombuffer(packed, dtype="<u8").tolist()
    return keys


def match_request(
    model: str, prompts: Mapping[str, Sequence[int] | np.ndarray[Any, Any]], engines: Iterable[EngineId] = ()
) -> pb.MatchRequest:
    return pb.MatchRequest(
        model=model,
        prompts=[pb.PromptKeys(profile=profile, keys=pack_keys(keys)) for profile, keys in prompts.items()],
        engines=[str(e) for e in engines],
    )


def match_response(answer: MatchAnswer) -> pb.MatchResponse:
    return pb.MatchResponse(
        engines=[
            pb.EngineMatch(
                engine=str(m.engine),
                blocks=m.blocks,
                media=[pb.MediumBlocks(medium=medium, blocks=n) for medium, n in m.media.items()],
                exact=m.exact,
                doubtful=m.doubtful,
            )
            for m in answer.matches
        ],
        unknown=[str(e) for e in answer.unknown],
    )


def match_answer(message: pb.MatchResponse) -> MatchAnswer:
    return MatchAnswer(
        tuple(
            EngineMatch(
                EngineId.parse(m.engine), m.blocks, {Medium(x.medium): x.blocks for x in m.media}, m.exact, m.doubtful
            )
            for m in message.engines
        ),
        tuple(EngineId.parse(e) for e in message.unknown),
    )


def engine_message(view: EngineView) -> pb.Engine:
    return pb.Engine(
        id=str(view.id),
        url=view.url,
        models=sorted(view.models),
        adapters=[pb.Adapter(name=a.name, path=a.path, number=a.number) for a in view.adapters],
        root=view.root,
        health=view.health,
        load=pb.Load(
            running=view.load.running,
            waiting=view.load.waiting,
            kv_usage=view.load.kv_usage,
            scraped_at=view.load.scraped_at,
        ),
        profile=view.profile,
        profile_verified=view.profile_verified,
        block_size=view.block_size,
        sync=view.sync,
        inexact_reason=view.inexact_reason,
        max_model_len=view.max_model_len,
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
        load=Load(message.load.running, message.load.waiting, message.load.kv_usage, message.load.scraped_at),
        profile=given("profile", message.profile),
        profile_verified=message.profile_verified,
        block_size=given("block_size", message.block_size),
        sync=Sync(message.sync),
        inexact_reason=message.inexact_reason,
        max_model_len=given("max_model_len", message.max_model_len),
    )

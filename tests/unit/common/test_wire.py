"""What goes over gRPC comes back equal, and what does not parse names its field."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common import wire
from kvatlas_common.fleet import Adapter, EngineView, Head, Health, InFlight, Load, Sync
from kvatlas_common.matching import EngineMatch, MatchAnswer, PlainMatches
from kvatlas_common.observations import Finished, FirstToken, Observation, Outcome, Routed
from kvatlas_common.proto.kvatlas.v1 import index_pb2 as pb
from kvatlas_common.words import KEY_MASK, EngineId, Medium

engines = st.builds(
    EngineId, st.sampled_from(["10.0.0.1:8000", "[::1]:8000", "engine-0.svc:80"]), st.integers(min_value=0, max_value=7)
)
keys = st.lists(st.integers(min_value=0, max_value=KEY_MASK), max_size=8).map(tuple)
counts = st.integers(min_value=0, max_value=2**32 - 1)
reals = st.floats(min_value=0, max_value=1e9)
names = st.text(max_size=8)

observations: st.SearchStrategy[Observation] = st.one_of(
    st.builds(Routed, names, engines, names, counts, counts, st.dictionaries(names, keys, max_size=3), st.booleans()),
    st.builds(FirstToken, names, engines, names, reals),
    st.builds(Finished, names, engines, names, st.none() | counts, counts, st.booleans(), st.sampled_from(Outcome)),
)
matches = st.builds(
    EngineMatch,
    engines,
    counts,
    st.dictionaries(st.sampled_from(Medium), counts),
    st.booleans(),
    counts,
).map(lambda match: match._replace(expected=max(match.blocks, match.doubtful)))
columns = st.lists(st.tuples(engines, counts, st.booleans()), max_size=4).map(
    lambda rows: PlainMatches(*map(list, zip(*rows, strict=True))) if rows else PlainMatches([], [], [])
)
answers = st.builds(
    MatchAnswer, st.lists(matches, max_size=3).map(tuple), st.lists(engines, max_size=3).map(tuple), columns
)
in_flight = st.builds(InFlight, counts, counts, counts)
loads = st.builds(Load, counts, counts, st.floats(0, 1, width=32), reals, st.frozensets(names, max_size=2), in_flight)
views = st.builds(
    EngineView,
    id=engines,
    url=names,
    models=st.frozensets(names, max_size=3),
    adapters=st.lists(st.builds(Adapter, names, st.none() | names, st.none() | counts), max_size=2).map(tuple),
    root=st.none() | names,
    health=st.sampled_from(Health),
    profile=st.none() | names,
    profile_verified=st.booleans(),
    block_size=st.none() | counts,
    sync=st.sampled_from(Sync),
    inexact_reason=names,
    max_model_len=st.none() | counts,
    kv_tokens=st.none() | counts,
)


@given(observations)
def test_an_observation_survives_the_wire(observation: Observation) -> None:
    message = pb.Observation.FromString(wire.observation_message(observation).SerializeToString())
    assert wire.observation(message) == observation


@given(answers, st.booleans())
def test_a_match_answer_survives_the_wire(answer: MatchAnswer, plain: bool) -> None:
    message = pb.MatchResponse.FromString(wire.match_response(answer, plain=plain).SerializeToString())
    read = wire.match_answer(message)
    assert read == answer
    assert read.plain == (answer.plain if plain else PlainMatches([], [], []))
    assert len(message.engines) == len(answer.listed if plain else answer.matches)


@pytest.mark.parametrize(
    "columns",
    [
        pb.PlainMatches(engines=["h:1", "h:2"], blocks=[3]),
        pb.PlainMatches(engines=["h:1"], blocks=[3, 4]),
        pb.PlainMatches(engines=["h:1"], blocks=[3], inexact=[1]),
    ],
)
def test_columns_that_do_not_go_together_are_told(columns: pb.PlainMatches) -> None:
    with pytest.raises(ValueError, match=r"plain: . engines, . blocks"):
        wire.match_answer(pb.MatchResponse(plain=columns))


def test_a_match_that_expects_nothing_more_says_so_in_blocks() -> None:
    match = EngineMatch(EngineId("h:1"), 3, {Medium.GPU: 3}, True)
    assert wire.match_answer(wire.match_response(MatchAnswer((match,)))).matches == (match._replace(expected=3),)


@given(engines, loads)
def test_a_load_survives_the_wire(engine: EngineId, load: Load) -> None:
    message = pb.EngineLoad.FromString(wire.load_message(engine, load, 5.0).SerializeToString())
    assert wire.engine_load(message, 7.0) == (engine, load)


def test_how_long_an_engine_has_been_computing_is_told_from_clock_to_clock() -> None:
    load = Load(others=InFlight(1, 700, 0), head=Head(700, 12.5))
    message = wire.load_message(EngineId("h:1"), load, now=13.0)
    assert wire.engine_load(message, now=100.0) == (EngineId("h:1"), replace(load, head=Head(700, 99.5)))


@given(views)
def test_an_engine_survives_the_wire(view: EngineView) -> None:
    assert wire.engine_view(pb.Engine.FromString(wire.engine_message(view).SerializeToString())) == view


@given(keys)
def test_keys_survive_packing(block_keys: tuple[int, ...]) -> None:
    assert tuple(wire.unpack_keys(wire.pack_keys(block_keys)).tolist()) == block_keys


def test_an_observation_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^what: "):
        wire.observation(pb.Observation(request_id="r", engine="h:1"))


def test_half_a_key_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^keys: 9 bytes"):
        wire.unpack_keys(b"123456789")

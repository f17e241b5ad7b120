"""What all routers have in flight, against a list of requests; and who is told of what."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.fleet import Head, InFlight, Load
from kvatlas_common.observations import Finished, FirstToken, Observation, Outcome, Routed
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.in_flight import InFlightBook, InFlightLimits
from kvatlas_indexer.core.loads import LoadBoard, Telling

E1, E2 = EngineId("a:1"), EngineId("b:1")
NOBODY = InFlight()


def routed(request: str, engine: EngineId = E1, tokens: int = 100, cached: int = 0) -> Routed:
    return Routed(request, engine, "m", tokens, cached, {})


def first(request: str, engine: EngineId = E1) -> FirstToken:
    return FirstToken(request, engine, "m", 0.1)


def finished(request: str, engine: EngineId = E1) -> Finished:
    return Finished(request, engine, "m", None, 1, True, Outcome.OK)


def book(*routers: str, **limits: float) -> InFlightBook:
    made = InFlightBook(InFlightLimits(**limits))  # type: ignore[arg-type]
    for router in routers:
        made.joined(router)
    return made


def test_a_request_is_prefilling_then_decoding_then_gone_and_never_its_own_routers() -> None:
    it = book("r1", "r2")
    it.observe("r1", routed("x", tokens=100, cached=64), 0)
    assert it.others(E1, "r2") == it.others(E1, "") == InFlight(1, 36, 0)
    assert it.others(E1, "r1") == it.others(E2, "r2") == NOBODY
    it.observe("r1", first("x"), 1)
    assert it.others(E1, "r2") == InFlight(0, 0, 1)
    it.observe("r1", finished("x"), 2)
    assert (it.others(E1, "r2"), len(it)) == (NOBODY, 0)


def test_a_retry_moves_its_request() -> None:
    it = book("r1")
    it.observe("r1", routed("x"), 0)
    it.observe("r1", routed("x", E2), 1)
    it.observe("r1", first("x"), 2)  # of the first attempt, late
    assert (it.others(E1, ""), it.others(E2, "")) == (NOBODY, InFlight(1, 100, 0))


def test_two_routers_may_use_one_id() -> None:
    it = book("r1", "r2")
    it.observe("r1", routed("x"), 0)
    it.observe("r2", routed("x"), 0)
    it.observe("r1", finished("x"), 1)
    assert (it.others(E1, "r1"), it.others(E1, "r2")) == (InFlight(1, 100, 0), NOBODY)


def test_a_router_that_went_is_forgotten_after_a_grace_and_one_that_comes_back_begins_anew() -> None:
    it = book("r1", "r2", router_grace_s=5)
    it.observe("r1", routed("x"), 0)
    it.observe("r2", routed("y"), 0)
    it.left("r1", 1)
    it.left("r2", 1)
    it.on_tick(6)
    assert it.others(E1, "") == InFlight(2, 200, 0)
    it.joined("r2")
    it.observe("r2", routed("z"), 6)
    it.on_tick(6.1)
    assert (it.others(E1, ""), it.routers) == (InFlight(1, 100, 0), 1)


def test_a_stream_that_ends_after_the_next_has_begun_is_no_going() -> None:
    it = book("r1", router_grace_s=5)
    it.joined("r1")
    it.left("r1", 0)
    it.observe("r1", routed("x"), 1)
    it.on_tick(100)
    assert it.others(E1, "") == InFlight(1, 100, 0)


def test_what_is_too_old_or_too_much_is_given_up() -> None:
    it = book("r1", requests_max=2, request_age_max_s=10)
    for number in range(3):
        it.observe("r1", routed(str(number)), number)
    assert it.others(E1, "") == InFlight(2, 200, 0)
    it.on_tick(11.5)
    assert it.others(E1, "") == InFlight(1, 100, 0)
    it.observe("r1", finished("1"), 12)  # late
    assert it.others(E1, "") == InFlight(1, 100, 0)


def test_routers_beyond_the_limit_are_not_counted() -> None:
    it = book("r1", "r2", routers_max=1)
    it.observe("r2", routed("x"), 0)
    it.left("r2", 1)
    assert (it.others(E1, ""), it.routers) == (NOBODY, 1)


observations = st.one_of(
    *(st.builds(made, st.sampled_from("xyz"), st.sampled_from([E1, E2])) for made in (routed, first, finished))
)
steps = st.lists(st.tuples(st.sampled_from(["r1", "r2"]), st.none() | observations), max_size=40)


@given(steps)
def test_the_sums_are_those_of_the_requests(run: list[tuple[str, Observation | None]]) -> None:
    it, open_requests = book("r1", "r2"), dict[tuple[str, str], list[object]]()
    for router, observation in run:
        if observation is None:
            it.joined(router)
            open_requests = {at: request for at, request in open_requests.items() if at[0] != router}
            continue
        it.observe(router, observation, 0)
        at = (router, observation.request_id)
        match observation:
            case Routed():
                open_requests.pop(at, None)
                open_requests[at] = [observation.engine, False]
            case FirstToken() if open_requests.get(at, [None])[0] == observation.engine:
                open_requests[at][1] = True
            case Finished():
                open_requests.pop(at, None)
    for engine in (E1, E2):
        for asking in ("r1", "r2", ""):
            seen = [began for (r, _), (e, began) in open_requests.items() if r != asking and e == engine]
            waiting = seen.count(False)
            assert it.others(engine, asking) == InFlight(waiting, 100 * waiting, seen.count(True))
        oldest = next((r for (r, _), (e, began) in open_requests.items() if e == engine and not began), None)
        for asking in ("r1", "r2", ""):
            assert it.head(engine, asking).tokens == (0 if oldest in (None, asking) else 100)


def test_an_engine_computes_the_oldest_prompt_that_anybody_waits_for() -> None:
    it = book("r1", "r2")
    it.observe("r1", routed("x", tokens=100), 1)
    it.observe("r2", routed("y", tokens=200), 2)
    assert (it.head(E1, "r1"), it.head(E1, "r2"), it.head(E2, "r2")) == (Head(0, 1), Head(100, 1), Head())
    it.observe("r2", first("y"), 3)  # it overtook the oldest, which is that still
    assert it.head(E1, "r2") == Head(100, 1)
    it.observe("r2", routed("z", tokens=300), 4)
    it.observe("r1", first("x"), 5)
    assert (it.head(E1, "r1"), it.head(E1, "r2")) == (Head(300, 5), Head(0, 5))
    it.observe("r2", finished("z"), 6)
    assert it.head(E1, "r1") == Head()


# -- who is told -------------------------------------------------------------------------------------------------------


def test_a_router_is_told_what_is_new_to_it_and_of_no_engine_of_another_shard() -> None:
    it = book("r1", "r2")
    board = LoadBoard(it)
    board.speak_of([E1])
    one, two = Telling(board, "r1"), Telling(board, "r2")
    assert one.news() == two.news() == ()
    assert board.scraped(E1, Load(running=3, scraped_at=1.0))
    assert not board.scraped(E2, Load(running=3, scraped_at=1.0))
    assert one.news() == two.news() == ((E1, Load(running=3, scraped_at=1.0)),)
    assert one.news() == ()
    it.observe("r1", routed("x"), 0)
    it.observe("r1", routed("y", E2), 0)
    assert board.in_flight_changed()
    assert not board.in_flight_changed()
    assert one.news() == ()
    assert two.news() == ((E1, Load(running=3, scraped_at=1.0, others=InFlight(1, 100, 0), head=Head(100, 0))),)


def test_one_that_comes_later_is_told_all_there_is() -> None:
    board = LoadBoard(book())
    board.speak_of([E1, E2])
    board.scraped(E1, Load(running=1, scraped_at=1.0))
    board.scraped(E2, Load(running=2, scraped_at=1.0))
    assert sorted(Telling(board, "r1").news()) == [
        (E1, Load(running=1, scraped_at=1.0)),
        (E2, Load(running=2, scraped_at=1.0)),
    ]


def test_an_engine_that_leaves_the_shard_is_taken_back() -> None:
    board = LoadBoard(book())
    board.speak_of([E1])
    board.scraped(E1, Load(running=1, scraped_at=1.0))
    told = Telling(board, "r1")
    told.news()
    board.speak_of([])
    assert told.news() == ((E1, Load()),)
    assert Telling(board, "r1").news() == ()

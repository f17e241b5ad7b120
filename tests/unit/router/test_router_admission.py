"""The queue before the choice, rule by rule, and what holds whatever happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.words import EngineId
from kvatlas_router.core.admission import PACE_GRANTS, Admission, AdmissionRules, Cause, Line, Place, Shed, Waiter

A, B, C = EngineId("a:1"), EngineId("b:1"), EngineId("c:1")
SERVING: Mapping[str, Sequence[EngineId]] = {"m": (A, B), "a": (A,), "b": (B,), "gone": ()}


class Fleet:
    """Engines with so many places."""

    def __init__(self, queue_max: int = 4, **free: int) -> None:
        self.free = {EngineId(f"{name}:1"): places for name, places in free.items()}
        self.admission = Admission(AdmissionRules(queue_max, 30.0))

    def places(self, engine: EngineId) -> int:
        return self.free.get(engine, 0)

    def ask(self, model: str = "m", now: float = 0.0) -> Place | Waiter | Shed:
        return self.admission.ask(Line(model), SERVING[model], self.places, now)

    def wait(self, model: str = "m", now: float = 0.0) -> Waiter:
        found = self.ask(model, now)
        assert isinstance(found, Waiter)
        return found

    def shed(self, model: str = "m", now: float = 0.0) -> Shed:
        found = self.ask(model, now)
        assert isinstance(found, Shed)
        return found

    def pump(self, now: float = 0.0) -> list[Waiter]:
        return self.admission.pump(lambda line: SERVING[line.model], self.places, now)


def test_where_there_is_a_place_nobody_waits() -> None:
    fleet = Fleet(a=0, b=2)
    assert isinstance(fleet.ask(), Place)
    assert fleet.admission.idle


def test_a_place_that_was_given_is_taken_until_it_is_released() -> None:
    fleet = Fleet(a=1)
    place = fleet.ask()
    assert isinstance(place, Place)
    waiter = fleet.wait()
    assert fleet.pump() == []
    place.release()
    place.release()
    assert fleet.pump() == [waiter]
    assert fleet.pump() == []


def test_first_come_first_served() -> None:
    fleet = Fleet()
    waiters = [fleet.wait() for _ in range(4)]
    fleet.free[A] = 3
    assert fleet.pump() == waiters[:3]
    assert all(w.place for w in waiters[:3])
    assert waiters[3].place is None


def test_who_comes_while_others_wait_waits_behind_them() -> None:
    fleet = Fleet()
    first = fleet.wait()
    fleet.free[A] = 1
    second = fleet.wait()
    assert fleet.pump() == [first]
    assert second.place is None


def test_of_models_that_share_an_engine_the_first_request_gets_the_place() -> None:
    fleet = Fleet()
    waiters = [fleet.wait(model) for model in ("a", "m", "b", "a")]
    fleet.free[A] = 1
    assert fleet.pump() == [waiters[0]]
    fleet.free[B] = 1
    assert fleet.pump() == [waiters[1]], "the place at A is taken, the one at B goes to who came before"
    fleet.free[B] = 2
    assert fleet.pump() == [waiters[2]]


def test_a_model_that_waits_does_not_hold_up_another() -> None:
    fleet = Fleet(b=1)
    waiting = fleet.wait("a")
    other = fleet.wait("b")
    assert fleet.pump() == [other]
    assert waiting.place is None


def test_where_no_engine_is_left_all_go_on_to_be_told() -> None:
    fleet = Fleet()
    assert isinstance(fleet.ask("gone"), Place)
    waiting = [fleet.wait(), fleet.wait()]
    assert fleet.admission.pump(lambda _: (), fleet.places, 0.0) == waiting


def test_a_full_queue_turns_away() -> None:
    fleet = Fleet(queue_max=2)
    fleet.wait()
    fleet.wait()
    assert (fleet.shed().cause, fleet.shed().waiting) == (Cause.FULL, 2)
    assert isinstance(fleet.ask("a"), Waiter), "each model has a queue of its own"


def test_without_a_queue_who_finds_no_place_is_turned_away() -> None:
    assert Fleet(queue_max=0).shed() == Shed(Cause.FULL, 0, 1)


def test_a_deadline_that_passed_is_seen_and_said() -> None:
    fleet = Fleet()
    early, late = fleet.wait(now=0.0), fleet.wait(now=5.0)
    assert fleet.admission.due(29.9) == []
    assert fleet.admission.due(30.0) == [early]
    assert fleet.admission.give_up(early, Cause.DEADLINE, 30.0) == Shed(Cause.DEADLINE, 2, 30)
    assert fleet.admission.waiters() == [late]


def test_who_leaves_is_not_called_and_gives_back_what_it_had() -> None:
    fleet = Fleet()
    gone, called, last = fleet.wait(), fleet.wait(), fleet.wait()
    fleet.admission.leave(gone)
    fleet.free[A] = 1
    assert fleet.pump() == [called]
    fleet.admission.leave(called)
    assert fleet.pump() == [last]
    fleet.admission.leave(last)
    fleet.admission.leave(last)
    assert fleet.admission.idle
    assert isinstance(fleet.ask(), Place)


@pytest.mark.parametrize(("every_s", "waiting", "expected"), [(0.5, 20, 11), (0.01, 20, 1), (10.0, 20, 120)])
def test_when_to_try_again_is_told_by_how_fast_the_queue_moves(every_s: float, waiting: int, expected: int) -> None:
    fleet = Fleet(queue_max=waiting)
    while not isinstance(fleet.ask(), Shed):
        pass
    now = 0.0
    for _ in range(PACE_GRANTS * 2):
        now += every_s
        fleet.free[A] = 1
        (waiter,) = fleet.pump(now)
        assert waiter.place is not None
        waiter.place.release()
        fleet.free[A] = 0
        fleet.wait(now=now)
    assert fleet.shed(now=now).retry_after_s == expected


steps = st.lists(
    st.tuples(
        st.sampled_from(["ask", "sent", "ended", "leave", "late"]), st.sampled_from(["m", "a", "b"]), st.integers(0, 9)
    ),
    max_size=80,
)


@given(steps, st.integers(0, 3), st.integers(0, 3))
def test_whatever_happens(steps: list[tuple[str, str, int]], at_a: int, at_b: int) -> None:
    """No engine gets more than it has places for, nobody is lost, and turns are in order of arrival.

    As long as requests leave the engines to those that have no other.
    """
    limits = {A: at_a, B: at_b}
    running: list[EngineId] = []
    fleet = Fleet(queue_max=3)
    admitted: list[tuple[str, Place]] = []
    waiting: dict[str, list[Waiter]] = {"m": [], "a": [], "b": []}

    def free(engine: EngineId) -> int:
        return max(0, limits[engine] - running.count(engine))

    for what, model, which in steps:
        if what == "ask":
            found = fleet.admission.ask(Line(model), SERVING[model], free, 0.0)
            if isinstance(found, Waiter):
                waiting[model].append(found)
            elif isinstance(found, Place):
                admitted.append((model, found))
            else:
                assert len(waiting[model]) == 3
        elif what == "sent" and admitted:
            wanted, place = admitted.pop(which % len(admitted))
            place.release()
            no_other = Counter(SERVING[other][0] for other, _ in admitted if len(SERVING[other]) == 1)
            running.append(max(SERVING[wanted], key=lambda engine: free(engine) - no_other[engine]))
        elif what == "ended" and running:
            running.pop(which % len(running))
        elif what in ("leave", "late") and waiting[model]:
            waiter = waiting[model].pop(which % len(waiting[model]))
            if what == "leave":
                fleet.admission.leave(waiter)
            else:
                fleet.admission.give_up(waiter, Cause.DEADLINE, 99.0)
        for called in fleet.admission.pump(lambda line: SERVING[line.model], free, 0.0):
            assert called is waiting[called.line.model].pop(0)
            assert called.place is not None
            admitted.append((called.line.model, called.place))
        assert len(admitted) + len(running) <= at_a + at_b
        assert fleet.admission.waiters() == [
            w for ws in (waiting[line.model] for line in fleet.admission._queues) for w in ws
        ]
    assert fleet.admission.waiting == sum(map(len, waiting.values()))

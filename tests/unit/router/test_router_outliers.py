"""Engines set aside and brought back, rule by rule, and what holds whatever happens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.words import EngineId
from kvatlas_router.core.outliers import Attempt, Cause, Ejection, Fault, OutlierRules, Outliers, Trust, fault_of

ENGINES = tuple(EngineId(f"{name}:1") for name in "abcd")
A, B, C, D = ENGINES
RULES = OutlierRules()


def outliers(rules: OutlierRules = RULES) -> Outliers:
    found = Outliers(rules)
    found.keep_only(ENGINES)
    return found


def fail(found: Outliers, engine: EngineId, now: float, times: int = 1, fault: Fault = Fault.CONNECT) -> list[Ejection]:
    """One after the other, each at once."""
    ejections = [found.sent(engine, now).failed(fault, now) for _ in range(times)]
    return [e for e in ejections if e is not None]


def answer(found: Outliers, engine: EngineId, now: float) -> bool:
    attempt = found.sent(engine, now)
    back = attempt.began(now)
    attempt.answered(now)
    return back


@pytest.mark.parametrize("status", [200, 301, 400, 401, 404, 413, 422, 429, 499, 501])
def test_what_is_the_clients_doing_is_no_fault(status: int) -> None:
    assert fault_of(status) is None


@pytest.mark.parametrize(
    ("status", "fault"), [(500, Fault.ERROR), (502, Fault.STATUS), (503, Fault.STATUS), (504, Fault.ERROR)]
)
def test_what_is_the_engines(status: int, fault: Fault) -> None:
    assert fault_of(status) is fault


def test_an_engine_nobody_knows_has_full_trust() -> None:
    assert outliers().trust(A, 0.0) is Trust.FULL


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault is not Fault.ERROR])
def test_one_fault_makes_a_suspect_for_a_while(fault: Fault) -> None:
    found = outliers()
    assert fail(found, A, 10.0, fault=fault) == []
    assert found.trust(A, 10.0) is Trust.SUSPECT
    assert found.trust(A, 10.0 + RULES.suspect_s - 0.01) is Trust.SUSPECT
    assert found.trust(A, 10.0 + RULES.suspect_s) is Trust.FULL
    assert found.trust(B, 10.0) is Trust.FULL


def test_one_error_that_may_be_the_requests_own_changes_nothing_and_a_row_of_them_ejects() -> None:
    found = outliers()
    assert fail(found, A, 0.0, RULES.consecutive_max - 1, Fault.ERROR) == []
    assert found.trust(A, 0.0) is Trust.FULL
    assert fail(found, A, 0.0, 1, Fault.ERROR) == [Ejection(A, Cause.CONSECUTIVE, Fault.ERROR, RULES.ejection_s)]


def test_faults_in_a_row_eject() -> None:
    found = outliers()
    (ejection,) = fail(found, A, 0.0, RULES.consecutive_max)
    assert (ejection.cause, ejection.for_s) == (Cause.CONSECUTIVE, RULES.ejection_s)
    assert found.trust(A, RULES.ejection_s - 0.01) is Trust.EJECTED
    assert found.ejected == 1


def test_an_answer_between_breaks_the_row() -> None:
    found = outliers(OutlierRules(share_requests_min=1000))
    for n in range(20):
        assert fail(found, A, float(n), RULES.consecutive_max - 1, Fault.ERROR) == []
        answer(found, A, float(n))


def test_half_of_the_requests_failing_eject_though_never_in_a_row() -> None:
    found = outliers()
    ejections: list[Ejection] = []
    for n in range(20):
        answer(found, A, n * 0.1)
        ejections += fail(found, A, n * 0.1, fault=Fault.ERROR)
        if ejections:
            break
    assert [e.cause for e in ejections] == [Cause.SHARE]
    assert n == RULES.share_requests_min // 2 - 1


def test_what_is_older_than_the_window_does_not_count() -> None:
    found = outliers()
    for n in range(4):
        answer(found, A, float(n))
        fail(found, A, float(n), fault=Fault.ERROR)
    for _ in range(RULES.share_requests_min):
        answer(found, A, 40.0)
    assert fail(found, A, 40.0, 4, Fault.ERROR) == []


def test_streams_that_are_cut_one_after_the_other_eject() -> None:
    """Each of them had begun, so they are never faults in a row."""
    found = outliers()
    attempts = [found.sent(A, 0.0) for _ in range(40)]
    ejections = []
    for n, attempt in enumerate(attempts):
        attempt.began(1.0 + n)
        ejections.append(attempt.failed(Fault.CUT, 1.0 + n))
    assert [e.cause for e in ejections if e][:1] == [Cause.SHARE]


def test_after_its_time_one_request_at_a_time_is_a_trial() -> None:
    found = outliers()
    fail(found, A, 0.0, RULES.consecutive_max)
    now = RULES.ejection_s
    assert found.trust(A, now) is Trust.FULL
    trial = found.sent(A, now)
    assert found.trust(A, now) is Trust.EJECTED, "while the trial is out"
    trial.close()
    assert found.trust(A, now) is Trust.FULL, "its client left: the next one is the trial"


def test_a_trial_without_an_answer_does_not_keep_the_engine_out_for_ever() -> None:
    found = outliers()
    fail(found, A, 0.0)
    found.sent(A, 5.0)
    assert found.trust(A, 5.0 + RULES.suspect_s - 0.1) is Trust.SUSPECT
    assert found.trust(A, 5.0 + RULES.suspect_s) is Trust.FULL


def test_a_trial_that_begins_to_be_answered_brings_the_engine_back() -> None:
    found = outliers()
    fail(found, A, 0.0, RULES.consecutive_max)
    trial = found.sent(A, 10.0)
    assert trial.began(10.1)
    assert found.trust(A, 10.1) is Trust.FULL
    assert found.ejected == 0
    fail(found, A, 10.2)
    assert found.trust(A, 15.2) is Trust.FULL, "the first trial, still being answered, is no trial any more"


def test_a_trial_that_fails_ejects_for_longer_and_longer_up_to_a_limit() -> None:
    found = outliers()
    (ejection,) = fail(found, A, 0.0, RULES.consecutive_max)
    times, now = [ejection.for_s], 0.0
    for _ in range(15):
        now += times[-1]
        (again,) = fail(found, A, now)
        assert again.cause is Cause.TRIAL
        times.append(again.for_s)
    assert times[:4] == [10.0, 20.0, 30.0, 40.0]
    assert max(times) == RULES.ejection_max_s


def test_of_trials_that_were_out_together_one_failure_counts() -> None:
    found = outliers()
    fail(found, A, 0.0, RULES.consecutive_max)
    together = [found.sent(A, 10.0) for _ in range(5)]
    assert [t.failed(Fault.RESET, 10.5) is not None for t in together] == [True, False, False, False, False]
    assert found.trust(A, 30.5) is Trust.FULL


def test_good_conduct_is_rewarded() -> None:
    found = outliers()
    now = 0.0
    for expected in (10.0, 20.0, 30.0):
        (ejection,) = fail(found, A, now, RULES.consecutive_max)
        assert ejection.for_s == expected
        now += ejection.for_s
        assert answer(found, A, now)
    (ejection,) = fail(found, A, now + 2 * RULES.decay_s, RULES.consecutive_max)
    assert ejection.for_s == 20.0, "two of three are forgiven"


def test_an_answer_to_what_was_sent_before_proves_nothing() -> None:
    found = outliers()
    early = found.sent(A, 0.0)
    fail(found, A, 1.0, RULES.consecutive_max)
    assert not early.began(2.0)
    assert found.trust(A, 2.0) is Trust.EJECTED


def test_an_answer_from_an_engine_tried_as_a_last_resort_brings_it_back() -> None:
    found = outliers()
    fail(found, A, 1.0, RULES.consecutive_max)
    assert answer(found, A, 2.0)
    assert found.trust(A, 2.0) is Trust.FULL


def test_faults_of_a_last_resort_do_not_prolong() -> None:
    found = outliers()
    fail(found, A, 0.0, RULES.consecutive_max)
    assert fail(found, A, 5.0, 20) == []
    assert found.trust(A, RULES.ejection_s) is Trust.FULL


def test_a_restart_forgets_it_all() -> None:
    found = outliers()
    early = found.sent(A, 0.0)
    fail(found, A, 0.0, RULES.consecutive_max)
    found.restarted(A)
    assert found.trust(A, 0.0) is Trust.FULL
    early.failed(Fault.CUT, 1.0)
    assert found.trust(A, 1.0) is Trust.FULL, "that was its former life"


def test_no_more_than_a_share_of_the_fleet_is_ejected_the_others_are_suspects() -> None:
    found = outliers()
    for engine in ENGINES:
        fail(found, engine, 0.0, RULES.consecutive_max)
    assert [found.trust(e, 0.0) for e in ENGINES] == [Trust.EJECTED, Trust.EJECTED, Trust.SUSPECT, Trust.SUSPECT]


@pytest.mark.parametrize(
    ("engines", "share", "most"), [(1, 0.5, 1), (3, 0.1, 1), (4, 0.5, 2), (4, 1.0, 4), (4, 0.0, 1)]
)
def test_one_may_always_be_ejected(engines: int, share: float, most: int) -> None:
    found = Outliers(OutlierRules(ejected_share_max=share))
    found.keep_only(ENGINES[:engines])
    for engine in ENGINES[:engines]:
        fail(found, engine, 0.0, RULES.consecutive_max)
    assert found.ejected == most


def test_nothing_is_ejected_when_that_is_off() -> None:
    found = outliers(OutlierRules(consecutive_max=0))
    assert fail(found, A, 0.0, 100) == []
    assert found.trust(A, 0.0) is Trust.SUSPECT


def test_engines_that_left_are_forgotten() -> None:
    found = outliers()
    fail(found, A, 0.0, RULES.consecutive_max)
    found.keep_only((B,))
    assert found.ejected == 0
    assert found.trust(A, 0.0) is Trust.FULL


def test_an_attempt_counts_once() -> None:
    found = outliers(OutlierRules(consecutive_max=2))
    attempt = found.sent(A, 0.0)
    attempt.failed(Fault.ERROR, 0.0)
    assert attempt.failed(Fault.ERROR, 0.0) is None
    attempt.answered(0.0)
    assert found.trust(A, 0.0) is Trust.FULL


steps = st.lists(
    st.tuples(
        st.sampled_from(ENGINES),
        st.sampled_from(["send", "began", "answered", "failed", "cut", "left", "restart"]),
        st.integers(0, 5),  # which of the requests in flight there
        st.sampled_from([0.0, 0.1, 1.0, 6.0, 30.0]),  # seconds later
    ),
    max_size=80,
)


@given(steps)
def test_whatever_happens(steps: list[tuple[EngineId, str, int, float]]) -> None:
    """The share holds, no trial is lost, and without further faults every engine is trusted again in bounded time."""
    found, now = outliers(), 0.0
    flying: dict[EngineId, list[Attempt]] = {e: [] for e in ENGINES}
    for engine, what, which, later in steps:
        now += later
        if what == "send":
            flying[engine].append(found.sent(engine, now))
        elif what == "restart":
            found.restarted(engine)
        elif flying[engine]:
            attempt = flying[engine][which % len(flying[engine])]
            if what == "began":
                attempt.began(now)
                continue
            flying[engine].remove(attempt)
            if what == "answered":
                attempt.answered(now)
            elif what == "left":
                attempt.close()
            else:
                attempt.failed(Fault.CUT if what == "cut" else Fault.RESET, now)
        assert found.ejected <= 2
    for attempts in flying.values():
        for attempt in attempts:
            attempt.close()
    now += RULES.ejection_max_s
    assert all(found.trust(e, now) is Trust.FULL for e in ENGINES)
    for engine in ENGINES:
        answer(found, engine, now)
    assert found.ejected == 0

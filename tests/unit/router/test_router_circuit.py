"""The circuit of an indexer that does not answer."""

from __future__ import annotations

from kvatlas_router.core.circuit import FIRST_PAUSE_S, LONGEST_PAUSE_S, OPEN_AFTER, Circuit


def opened(now: float) -> Circuit:
    circuit = Circuit()
    for _ in range(OPEN_AFTER):
        assert circuit.allows(now)
        circuit.failed(now)
    return circuit


def test_a_few_failures_in_a_row_open_it() -> None:
    circuit = opened(0.0)
    assert not circuit.allows(0.0)
    assert not circuit.allows(FIRST_PAUSE_S - 0.01)


def test_failures_apart_do_not() -> None:
    circuit = Circuit()
    for _ in range(10):
        for _ in range(OPEN_AFTER - 1):
            circuit.failed(0.0)
        circuit.succeeded()
    assert circuit.allows(0.0)


def test_one_trial_at_a_time() -> None:
    circuit = opened(0.0)
    assert circuit.allows(FIRST_PAUSE_S)
    assert not circuit.allows(FIRST_PAUSE_S)


def test_a_trial_that_succeeds_closes_it() -> None:
    circuit = opened(0.0)
    assert circuit.allows(1.0)
    circuit.succeeded()
    assert all(circuit.allows(1.0) for _ in range(5))


def test_the_pause_doubles_up_to_a_limit() -> None:
    circuit, now, pauses = opened(0.0), 0.0, []
    for _ in range(8):
        start = now
        while not circuit.allows(now):
            now += 0.125
        pauses.append(now - start)
        circuit.failed(now)
    assert pauses == [0.5, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert max(pauses) == LONGEST_PAUSE_S

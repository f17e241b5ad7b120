"""The ports of data-parallel ranks, and what an operator reads when an address cannot be had."""

from __future__ import annotations

import errno

import pytest

from kvatlas_indexer.adapters.addresses import unavailable
from kvatlas_indexer.adapters.zmq_source import with_rank


@pytest.mark.parametrize(
    ("endpoint", "rank", "expected"),
    [
        ("tcp://*:5557", 0, "tcp://*:5557"),
        ("tcp://*:5557", 3, "tcp://*:5560"),
        ("tcp://[::]:5557", 1, "tcp://[::]:5558"),
        ("tcp://engine-0.svc:5557", 2, "tcp://engine-0.svc:5559"),
        ("tcp://127.0.0.1:0", 1, "tcp://127.0.0.1:0"),
        ("tcp://127.0.0.1:*", 1, "tcp://127.0.0.1:*"),
    ],
)
def test_a_rank_has_the_port_so_many_higher(endpoint: str, rank: int, expected: str) -> None:
    assert with_rank(endpoint, rank) == expected


@pytest.mark.parametrize("endpoint", ["tcp://host", "ipc:///tmp/x", ""])
def test_an_endpoint_without_a_port_has_no_further_ranks(endpoint: str) -> None:
    with pytest.raises(ValueError, match="no port"):
        with_rank(endpoint, 1)


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.EADDRINUSE, "already in use"),
        (errno.EACCES, "above 1023"),
        (errno.EADDRNOTAVAIL, "no such address"),
        (errno.ENOMEM, "Check --flag"),
    ],
)
def test_an_address_that_cannot_be_had_is_named_with_its_cure(number: int, cure: str) -> None:
    text = str(unavailable("KV events", "tcp://*:5557", number, "--flag"))
    assert text.startswith("cannot listen for KV events on tcp://*:5557: ")
    assert "--flag" in text
    assert cure in text

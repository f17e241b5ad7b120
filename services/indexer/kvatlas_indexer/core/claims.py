"""Who may speak for an engine.

A listened message says in its topic which engine it comes from; nothing proves it. What can be held against it: the
address ZeroMQ saw it come from, the engines we dial ourselves, and the models the named engine serves. A name whose
host is the very address it comes from is the speaker's own: nobody else gets it, however long its owner is silent.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from kvatlas_common.events.types import Topic

CLAIMS_MAX = 65_536


@dataclass(slots=True)
class _Claim:
    peer: str
    heard_at: float


class Claims:
    """Which peer speaks for which engine address. A silent speaker's name is free again after `lease_s`."""

    def __init__(self, *, lease_s: float) -> None:
        self._lease_s = lease_s
        self._claims: OrderedDict[str, _Claim] = OrderedDict()

    def refusal(
        self, address: str, topic: Topic, peer: str, *, dialled: bool, models: frozenset[str], now: float
    ) -> str | None:
        """None: it may speak, and its claim is renewed. Else why not, in words for the operator.

        `dialled`: its events are taken from an endpoint of the configuration. `models`: what it serves; empty: unknown.
        """
        if dialled:
            return (
                f"engine {address} is dialled, and {peer} publishes under its name too: give one of them another topic"
            )
        if models and topic.model not in models:
            served = ", ".join(sorted(models)[:8])
            return (
                f"{peer} publishes as {address} for model {topic.model!r}, which that engine does not serve ({served})"
            )
        claim, own = self._claims.get(address), topic.host.strip("[]")
        held = claim is not None and (claim.peer == own or now - claim.heard_at < self._lease_s)
        if claim is not None and held and peer not in {claim.peer, own}:
            return f"{peer} publishes under the name {address}, which {claim.peer} uses: give each engine its own topic"
        if claim is None and len(self._claims) >= CLAIMS_MAX:
            self._claims.popitem(last=False)
        self._claims[address] = _Claim(peer, now)
        self._claims.move_to_end(address)
        return None

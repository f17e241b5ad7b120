"""Who may speak for an engine.

A listened message says in its topic which engine it comes from; nothing proves it. What can be held against it: the
address ZeroMQ saw it come from, the engines we dial ourselves, and the models the named engine serves. A name whose
host is the very address it comes from is the speaker's own: nobody else gets it, however long its owner is silent.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from kvatlas_common.events.types import Topic
from kvatlas_common.findings import Code, Finding

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
    ) -> Finding | None:
        """None: it may speak, and its claim is renewed. Else why not.

        `dialled`: its events are taken from an endpoint of the configuration. `models`: what it serves; empty: unknown.
        """
        if dialled:
            return _twice(f"engine {address} is dialled, and {peer} publishes under its name too")
        if models and topic.model not in models:
            return _other_model(address, topic.model, peer, models)
        claim, own = self._claims.get(address), topic.host.strip("[]")
        held = claim is not None and (claim.peer == own or now - claim.heard_at < self._lease_s)
        if claim is not None and held and peer not in {claim.peer, own}:
            return _twice(f"{peer} publishes under the name {address}, which {claim.peer} uses")
        if claim is None and len(self._claims) >= CLAIMS_MAX:
            self._claims.popitem(last=False)
        self._claims[address] = _Claim(peer, now)
        self._claims.move_to_end(address)
        return None


def _twice(wrong: str) -> Finding:
    cause = "two engines were started with the same topic, or one was moved and its name given to another"
    change = 'give each engine a "topic" of its own in --kv-events-config: kv@<its host:port>@<its model>'
    return Finding(Code.NAME_CLAIMED_TWICE, wrong, cause, change)


def _other_model(address: str, named: str, peer: str, models: frozenset[str]) -> Finding:
    served = ", ".join(sorted(models)[:8])
    wrong = f"{peer} publishes as {address} for model {named!r}, which that engine does not serve ({served})"
    cause = "the topic names the model otherwise than --served-model-name, or another engine's address"
    change = f'write "topic": "kv@{address}@{min(models)}" in the --kv-events-config of the engine at {address}'
    return Finding(Code.TOPIC_MODEL, wrong, cause, change)


def refused(reason: str, wrong: str) -> Finding:
    """A message that is none of an engine's, or one too many."""
    if reason == "too-many-engines":
        change = "have the engines of one model share indexers of their own; see who else publishes there"
        return Finding(Code.TOO_MANY_ENGINES, wrong, "every name in a topic is an engine", change)
    cause = "what publishes there is no engine, or one whose topic is not kv@<host:port>@<model>"
    change = "let only engines with --kv-events-config publish there; --topic-prefix kv@ passes over all else"
    return Finding(Code(f"refused-{reason}"), wrong, cause, change)

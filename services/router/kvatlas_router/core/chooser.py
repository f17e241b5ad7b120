"""All that choosing rests on, in one object without I/O: the real router and the simulator drive the same one.

`choose` weighs the engines as they stand; `send` enters the request at the engine it goes to; what its `Ticket` is told
until it is closed feeds the books (what is in flight where), the rates (how fast each engine is) and the history of the
last moments (what each engine will hold once it has computed what it was sent, so that requests that share a prefix
nobody holds yet land together). How engines fail and come back is told to `outliers` and `slow_start` by who forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from kvatlas_common.fleet import EngineView, Load
from kvatlas_common.history import RoutingHistory
from kvatlas_common.matching import MatchAnswer
from kvatlas_common.words import EngineId
from kvatlas_router.core.ask import Ask
from kvatlas_router.core.books import Books, Occupancy, Ticket
from kvatlas_router.core.candidates import EngineState
from kvatlas_router.core.choice import Choice, Term
from kvatlas_router.core.cost import WEIGHTS, Ahead, Quote, Weights
from kvatlas_router.core.foreign import ForeignTraffic
from kvatlas_router.core.lineup import Lineup
from kvatlas_router.core.outliers import Outliers
from kvatlas_router.core.policies import Needs, Policy, Situation
from kvatlas_router.core.prompt import ESTIMATE
from kvatlas_router.core.rates import Rates, Served
from kvatlas_router.core.slow_start import SlowStart
from kvatlas_router.core.told import Told

BURST_S = 10.0
"""How long a prompt counts as held after it was sent, or its first token came, if no event says so."""
BURST_BLOCKS_MAX = 16_384  # per engine
PROGRESS_MAX = 0.95
"""Of a prompt that is late: what it has still to go is not nothing."""
BUSY_LEARNING = 0.03


class Chooser:
    """`chance` draws from [0, 1). Times are seconds of one monotonic clock, given by the caller."""

    def __init__(
        self,
        chance: Callable[[], float],
        *,
        outliers: Outliers | None = None,
        slow_start: SlowStart | None = None,
        weights: Weights = WEIGHTS,
    ) -> None:
        self.books = Books()
        self.rates = Rates()
        self.outliers = outliers or Outliers()
        self._slow_start = slow_start or SlowStart(0.0)
        self._weights = weights
        self._chance = chance
        self._foreign = ForeignTraffic()
        self._lately = RoutingHistory(lifetime_s=BURST_S, blocks_max=BURST_BLOCKS_MAX)
        self._lineup = Lineup(self._state)
        self._prompt_tokens = 1000.0  # mean length of prompts
        self._busy = 0.0  # mean share of engines that are computing prompts

    def choose(
        self,
        policy: Policy,
        ask: Ask,
        views: Sequence[EngineView],
        *,
        loads: Mapping[EngineId, Load],
        answer: MatchAnswer | None,
        now: float,
        cause: str | None = None,
    ) -> Choice | None:
        """None: the policy has no answer. `answer`: None where the policy needs none. Raises `NoEngine`."""
        line = self._lineup.of(views, loads, now)
        self._busy += (line.busy - self._busy) * BUSY_LEARNING
        lately = self._sent_lately(ask, now) if answer is not None else {}
        told = Told(ask, answer, lately, guessed=policy.needs is Needs.HISTORY)
        return policy.choose(Situation(ask, told.candidates(line), cause, self._chance))

    def prepare(self, views: Sequence[EngineView], loads: Mapping[EngineId, Load], now: float) -> None:
        """For a choice soon to come: half of its work, and most where the last was long ago, is the engines' states."""
        self._lineup.of(views, loads, now)

    def _sent_lately(self, ask: Ask, now: float) -> Mapping[EngineId, int]:
        found: dict[EngineId, int] = {}
        for keys in ask.keys.values():
            found.update(self._lately.leading(keys, now))
        return found

    def send(self, term: Term, ask: Ask, now: float) -> Ticket:
        """The request goes to the engine of this term."""
        engine = term.engine
        self._prompt_tokens += (ask.prompt_tokens - self._prompt_tokens) * 0.02
        keys = ask.keys.get(_profile(term.view, ask))
        if keys is not None:
            self._lately.note(engine, keys.tolist(), now)
        transferred = term.transferred

        def ended(ticket: Ticket) -> None:
            self._lineup.changed(engine)
            if ticket.first_token_s is None or ticket.ended_at is None:
                return
            computed = term.to_compute
            if ticket.cached_tokens is not None:
                computed = max(ask.prompt_tokens - ticket.cached_tokens, 0)
            self.rates.learn(
                Served(
                    engine,
                    first_token_s=ticket.first_token_s,
                    ahead=term.ahead.queued_tokens,
                    computed=computed,
                    decoding=term.ahead.decoding,
                    completion_tokens=ticket.completion_tokens,
                    decode_total_s=ticket.ended_at - ticket.sent_at - ticket.first_token_s,
                    decoding_at_end=self.books.of(engine, ticket.ended_at).decoding,
                    transferred=transferred,
                )
            )

        self._lineup.changed(engine)
        return self.books.enter(
            engine,
            term.to_compute,
            now,
            expected_s=term.cost.ttft_ms / 1000,
            streams=ask.streams,
            on_end=ended,
        )

    def keep_only(self, engines: Collection[EngineId]) -> None:
        """These are the engines of the fleet now."""
        self.books.keep_only(engines)
        self.rates.keep_only(engines)
        self._foreign.keep_only(engines)
        self._lineup.clear()

    def _state(self, view: EngineView, load: Load, now: float) -> EngineState:
        speed = self.rates.of(view.id)
        ours, others = self.books.of(view.id, now), load.others
        pending, decoding = ours.pending + others.prefilling, ours.decoding + others.decoding
        foreign = self._foreign.at(view.id, load, pending + decoding)
        ahead = Ahead(
            _still_to_compute(ours, load, speed.token_s, now) + int(foreign.waiting * self._prompt_tokens),
            pending + foreign.waiting,
            decoding + foreign.running,
            ours.late_s,
            load.kv_usage,
            view.kv_tokens or 0,
        )
        share = self._slow_start.share(view.id, now)
        quote = Quote(speed, ahead, self.rates.answer_tokens, self._weights, self._busy, share=share)
        return EngineState.of(view, ahead, quote, ours.last_used, self.outliers.trust(view.id, now))


def _still_to_compute(ours: Occupancy, load: Load, token_s: float, now: float) -> int:
    """Prompt tokens of all routers. One prompt is being computed: another router's, if we are told of one, else the
    oldest of ours, though not before what others had there was computed.
    """
    queued = ours.queued_tokens + load.others.prefill_tokens
    tokens, since = load.head.tokens, load.head.since
    if not tokens and ours.head_since is not None:
        tokens, since = ours.head_tokens, max(ours.head_since, since)
    return queued - int(min((now - since) / token_s, tokens * PROGRESS_MAX)) if tokens else queued


def _profile(view: EngineView, ask: Ask) -> str:
    """Under which name the ask has keys for the engine: its own, or the one for guesses."""
    return view.profile if view.profile in ask.keys and view.profile is not None else ESTIMATE

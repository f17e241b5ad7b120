"""How fast each engine is, learnt from what its answers took.

Of every streamed answer the router knows when the first token came, how many prompt tokens were to be computed before
it (its own and those queued ahead), how many requests were decoding beside it, and how long a token took after that.
Four figures per engine follow from these:

- `token_s`, to compute a prompt token, from answers with much to compute;
- `overhead_s`, of any request, from answers with little;
- the length of a step as a straight line over the requests that decode in it: `step_s` and `decode_s` for each, from
  the time between tokens. One line for the fleet, because a slope shows only in many answers, and how much longer or
  shorter the engine's own steps are;
- `transfer_s`, to bring a cached token from a slower medium to the GPU, from what is left of the time to first token.

Measurements are noisy (other traffic, pauses, a prediction that did not hold), so none moves an estimate far: each
pulls by its logarithm, bounded, and weighs as much as its own share of the work. An engine of which little has been
seen is thought to be like the rest of the fleet.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from kvatlas_common.words import EngineId, Medium

CHUNK_TOKENS = 2048
"""Prompt tokens computed in one step (vLLM's default `max_num_batched_tokens` for serving)."""
LARGE_TOKENS = 512  # from here on a prompt tells of `token_s`, below of `overhead_s`
LEARNING = 0.04  # how far one measurement pulls, once there are some
PULL_MAX = 0.7  # of the logarithm
OUTLIER = 4.0  # a token time so many times off is not the engine's own
ENOUGH = 16  # measurements after which an engine speaks for itself
FORGETTING = 0.998
NOISE = 0.2  # of the logarithm: engines that differ by less are taken for alike


@dataclass(frozen=True, slots=True)
class Speed:
    """What one engine takes, in seconds. The defaults are about one large GPU with a model of 30 billion weights."""

    token_s: float = 0.0001
    overhead_s: float = 0.02
    step_s: float = 0.012
    decode_s: float = 0.0001
    cpu_token_s: float = 0.000005
    storage_token_s: float = 0.00002
    remote_token_s: float = 0.00002

    def prefill_s(self, tokens: float, decoding: float) -> float:
        """To compute so many prompt tokens beside so many decoding requests: in chunks, each a step of all of them."""
        if tokens <= 0:
            return 0.0
        return tokens * self.token_s + (tokens / CHUNK_TOKENS) * (self.step_s + decoding * self.decode_s)

    def transfer_s(self, medium: Medium) -> float:
        """Per token."""
        match medium:
            case Medium.CPU:
                return self.cpu_token_s
            case Medium.STORAGE:
                return self.storage_token_s
            case Medium.REMOTE:
                return self.remote_token_s
            case _:
                return 0.0


PRIOR = Speed()


@dataclass(frozen=True, slots=True)
class Served:
    """One answer that came whole. Times in seconds; `ahead`: prompt tokens queued there when it was sent."""

    engine: EngineId
    first_token_s: float
    ahead: int
    computed: int  # of its own prompt
    decoding: int  # beside it, when it was sent
    completion_tokens: int | None = None
    decode_total_s: float = 0.0  # from its first token to its last
    decoding_at_end: int = 0
    transferred: tuple[tuple[Medium, int], ...] = ()  # tokens by slower media


@dataclass(slots=True)
class _Line:
    """A straight line through noisy points, older ones weighing less."""

    slope: float
    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        self.n = self.n * FORGETTING + 1
        self.x = self.x * FORGETTING + x
        self.y = self.y * FORGETTING + y
        self.xx = self.xx * FORGETTING + x * x
        self.xy = self.xy * FORGETTING + x * y

    def fit(self) -> tuple[float, float]:
        """Intercept and slope; `slope` is the least there is, and what is taken where the points do not show one."""
        mean_x, mean_y = self.x / self.n, self.y / self.n
        variance = self.xx / self.n - mean_x**2
        slope = self.slope
        if self.n > ENOUGH and variance > 4.0:
            slope = max((self.xy / self.n - mean_x * mean_y) / variance, slope)
        slope = min(slope, mean_y / (2 * mean_x))
        return mean_y - slope * mean_x, slope


@dataclass(slots=True)
class _Learnt:
    token_s: float
    overhead_s: float
    transfer_s: dict[Medium, float]
    large: int = 0
    small: int = 0
    steps: int = 0
    step_ratio: float = 1.0  # of its steps to the fleet's


class Rates:
    """The speeds of all engines, as far as known. `prior` until the first has answered."""

    def __init__(self, prior: Speed = PRIOR) -> None:
        self._prior = prior
        self._learnt: dict[EngineId, _Learnt] = {}
        self._speeds: dict[EngineId, Speed] = {}
        self._fleet: Speed = prior
        self._until_mean = 0
        self._steps = _Line(prior.decode_s / 2)
        self.answer_tokens = 256.0  # mean length of answers

    def of(self, engine: EngineId) -> Speed:
        return self._speeds.get(engine, self._fleet)

    def keep_only(self, engines: Collection[EngineId]) -> None:
        for engine in self._learnt.keys() - set(engines):
            del self._learnt[engine]
            self._speeds.pop(engine, None)

    def learn(self, served: Served) -> None:
        learnt = self._learnt.get(served.engine)
        if learnt is None:
            fleet = self._fleet
            media = {m: fleet.transfer_s(m) for m in (Medium.CPU, Medium.STORAGE, Medium.REMOTE)}
            learnt = self._learnt[served.engine] = _Learnt(fleet.token_s, fleet.overhead_s, media)
        self._learn_steps(learnt, served)
        speed = self._speed(learnt)
        transfer_tokens = sum(tokens for _, tokens in served.transferred)
        if transfer_tokens >= LARGE_TOKENS:
            self._learn_transfer(learnt, served, speed, transfer_tokens)
        elif served.ahead + served.computed >= LARGE_TOKENS:
            self._learn_token(learnt, served, speed)
        else:
            self._learn_overhead(learnt, served, speed)
        self._speeds[served.engine] = self._speed(learnt)
        self._until_mean -= 1
        if self._until_mean <= 0:  # a mean over the fleet for every few answers of each engine is enough
            self._fleet = _mean(list(self._learnt.values()), self._speeds, self._prior)
            self._until_mean = len(self._learnt) // 4

    def _learn_token(self, learnt: _Learnt, served: Served, speed: Speed) -> None:
        work = served.ahead + served.computed
        besides = speed.overhead_s + speed.prefill_s(work, served.decoding) - work * speed.token_s
        seen = max((served.first_token_s - besides) / work, learnt.token_s / OUTLIER)
        weight = _weight(learnt.large) * served.computed / work
        learnt.token_s *= math.exp(weight * _pull(seen, learnt.token_s))
        learnt.large += 1

    def _learn_overhead(self, learnt: _Learnt, served: Served, speed: Speed) -> None:
        work = served.ahead + served.computed
        seen = served.first_token_s - speed.prefill_s(work, served.decoding)
        off = max(-learnt.overhead_s, min(learnt.overhead_s, seen - learnt.overhead_s))
        learnt.overhead_s = max(learnt.overhead_s + _weight(learnt.small) * off, 0.0001)
        learnt.small += 1

    def _learn_transfer(self, learnt: _Learnt, served: Served, speed: Speed, tokens: int) -> None:
        rest = (
            served.first_token_s - speed.overhead_s - speed.prefill_s(served.ahead + served.computed, served.decoding)
        )
        for medium, part in served.transferred:
            before = learnt.transfer_s.get(medium)
            if before is not None and part * 2 > tokens:  # told by the medium that most of it came from
                seen = max(rest / tokens, before / OUTLIER)
                learnt.transfer_s[medium] = before * math.exp(2 * LEARNING * _pull(seen, before))

    def _learn_steps(self, learnt: _Learnt, served: Served) -> None:
        if not served.completion_tokens or served.completion_tokens < 8 or served.decode_total_s <= 0:
            return
        step_s = served.decode_total_s / (served.completion_tokens - 1)
        decoding = (served.decoding + served.decoding_at_end) / 2 + 1
        self._steps.add(decoding, step_s / learnt.step_ratio)
        flat, slope = self._steps.fit()
        learnt.step_ratio *= math.exp(
            _weight(learnt.steps) * _pull(step_s / (flat + slope * decoding), learnt.step_ratio)
        )
        learnt.steps += 1
        self.answer_tokens += (served.completion_tokens - self.answer_tokens) * 0.02

    def _speed(self, learnt: _Learnt) -> Speed:
        fleet = self._fleet
        flat, slope = self._steps.fit() if self._steps.n else (self._prior.step_s, self._prior.decode_s)
        ratio = _apart(learnt.step_ratio, 1.0, learnt.steps)
        return Speed(
            token_s=_apart(learnt.token_s, fleet.token_s, learnt.large),
            overhead_s=_apart(learnt.overhead_s, fleet.overhead_s, learnt.small),
            step_s=flat * ratio,
            decode_s=slope * ratio,
            cpu_token_s=learnt.transfer_s[Medium.CPU],
            storage_token_s=learnt.transfer_s[Medium.STORAGE],
            remote_token_s=learnt.transfer_s[Medium.REMOTE],
        )


def _weight(seen: int) -> float:
    """Of one more measurement after so many."""
    return max(LEARNING, 1 / (seen + 1))


def _pull(seen: float, known: float) -> float:
    return max(-PULL_MAX, min(PULL_MAX, math.log(seen / known)))


def _apart(own: float, fleet: float, seen: int) -> float:
    """The engine's own figure as far as it stands apart from the fleet's: by more than noise would make it.

    What looks a little slower is chosen a little less, and is seen less often to be no slower: small differences would
    keep themselves up.
    """
    apart = math.log(own / fleet) * min(seen / ENOUGH, 1.0)
    believed = min(abs(apart), max(2 * (abs(apart) - NOISE), 0.0))
    return fleet * math.exp(math.copysign(believed, apart))


def _mean(learnt: list[_Learnt], speeds: dict[EngineId, Speed], prior: Speed) -> Speed:
    """Over the engines that have been seen, each figure by itself; of token times the geometric mean."""
    large = [one for one in learnt if one.large]
    small = [one for one in learnt if one.small]
    return Speed(
        token_s=math.exp(_average([math.log(o.token_s) for o in large], math.log(prior.token_s))),
        overhead_s=_average([o.overhead_s for o in small], prior.overhead_s),
        step_s=_average([s.step_s for s in speeds.values()], prior.step_s),
        decode_s=_average([s.decode_s for s in speeds.values()], prior.decode_s),
        cpu_token_s=_average([s.cpu_token_s for s in speeds.values()], prior.cpu_token_s),
        storage_token_s=_average([s.storage_token_s for s in speeds.values()], prior.storage_token_s),
        remote_token_s=_average([s.remote_token_s for s in speeds.values()], prior.remote_token_s),
    )


def _average(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise

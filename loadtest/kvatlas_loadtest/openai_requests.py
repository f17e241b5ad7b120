"""What a completion request asks of a simulated engine, checked as far as the simulation uses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from kvatlas_loadtest.openai_shapes import ApiError

CHOICES_MAX = 128
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wanted:
    """`max_tokens` None: the answer ends by itself. `choices`: `n`, sequences per prompt."""

    model: str | None
    stream: bool
    include_usage: bool
    choices: int
    max_tokens: int | None
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    cache_salt: str | None
    return_token_ids: bool

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Wanted:
        """Raises `ApiError` that names the field."""
        stop = body.get("stop")
        options = _field(body, "stream_options", dict, {})
        max_tokens = _field(body, "max_completion_tokens", int, _field(body, "max_tokens", int, None))
        choices = _field(body, "n", int, 1)
        if max_tokens is not None and max_tokens < 1:
            raise ApiError(400, f"max_tokens must be at least 1, got {max_tokens}.", param="max_tokens")
        if not 1 <= choices <= CHOICES_MAX:
            raise ApiError(400, f"n must be within 1..{CHOICES_MAX}, got {choices}.", param="n")
        return cls(
            model=_field(body, "model", str, None),
            stream=_field(body, "stream", bool, False),
            include_usage=bool(options.get("include_usage")),
            choices=choices,
            max_tokens=max_tokens,
            stop=tuple(s for s in ([stop] if isinstance(stop, str) else _list(body, "stop", str)) if s),
            stop_ids=tuple(_list(body, "stop_token_ids", int)),
            cache_salt=_field(body, "cache_salt", str, None) or None,
            return_token_ids=_field(body, "return_token_ids", bool, False),
        )


def _field(body: Mapping[str, Any], name: str, kind: type[T], default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ApiError(400, f"{name} should be a valid {kind.__name__}.", "Bad Request", f"body.{name}")
    return value


def _list(body: Mapping[str, Any], name: str, kind: type[T]) -> list[T]:
    values = _field(body, name, list, [])
    if not all(isinstance(value, kind) for value in values):
        raise ApiError(400, f"{name} should be a list of {kind.__name__}.", "Bad Request", f"body.{name}")
    return list(values)


class StopText:
    """Ends a text at the first of the `stop` strings, which does not become part of it.

    Text that might be the beginning of a stop string is held back until it is not, or the answer ends.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._margin = max((len(s) - 1 for s in stop), default=0)
        self._held = ""

    def push(self, text: str, last: bool) -> tuple[str, str | None]:
        """(text that can be shown now, the stop string met or None)."""
        self._held += text
        met = min((at, s) for s in self._stop if (at := self._held.find(s)) >= 0) if self._meets() else None
        if met is not None:
            shown, self._held = self._held[: met[0]], ""
            return shown, met[1]
        keep = 0 if last else self._margin
        cut = max(len(self._held) - keep, 0)
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, None

    def _meets(self) -> bool:
        return any(s in self._held for s in self._stop)

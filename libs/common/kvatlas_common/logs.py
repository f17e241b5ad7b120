"""Logging of both services: an event's name and its fields, one line each, on standard error.

Code logs with the standard library, `log.info("engine down", extra={"engine": str(engine)})`; what is in `extra`
becomes fields. Lines are JSON unless a person is watching. Whatever can happen once per message or request goes through
`LimitedLog`, which says how many lines it held back. Libraries do not, so what they warn of is limited here.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

LogFormat = Literal["auto", "json", "text"]
LogLevel = Literal["debug", "info", "warning", "error"]

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_DEPTH_MAX = 4
FOREIGN_INTERVAL_S = 30.0


def setup_logs(stream: TextIO, level: LogLevel = "info", style: LogFormat = "auto") -> None:
    """Sends every logger's lines to `stream`, and nowhere else. Calling it again replaces what it set up before."""
    handler = logging.StreamHandler(stream)
    readable = style == "text" or (style == "auto" and stream.isatty())
    handler.setFormatter(TextFormatter() if readable else JsonFormatter())
    handler.addFilter(ForeignLimit(FOREIGN_INTERVAL_S, time.monotonic))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)


class JsonFormatter(logging.Formatter):
    """`{"time", "level", "logger", "event", ...fields, "error"?, "trace"?}`, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        for name, value in _fields(record).items():
            line[name if name not in line else f"{name}_"] = _plain(value)
        if record.exc_info and record.exc_info[1] is not None:
            line.setdefault("error", repr(record.exc_info[1]))
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


class TextFormatter(logging.Formatter):
    """`12:00:00.123 warning engine down  engine=10.0.0.5:8000 [kvatlas_common.engines]`"""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_word(value)}" for name, value in _fields(record).items())
        line = f"{_time(record)[11:23]} {record.levelname.lower():7} {_printable(record.getMessage())}"
        line += f" {fields}" if fields else ""
        line += f" [{record.name}]"
        if record.exc_info and record.exc_info[1] is not None:
            line += "\n" + self.formatException(record.exc_info)
        return line


class ForeignLimit(logging.Filter):
    """Libraries write a line for every request they cannot read, and anybody can send such: a full disk is for free.

    Of warnings and errors by loggers that are not ours, one line passes per place in the code (and place of what was
    raised) and interval; it says in `suppressed` how many were held back before it. `clock` gives seconds, monotonic.
    """

    def __init__(self, interval_s: float, clock: Callable[[], float]) -> None:
        super().__init__()
        self._interval_s = interval_s
        self._clock = clock
        self._held: dict[tuple[object, ...], _Held] = {}  # as many as there are places in the code

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or record.name.startswith("kvatlas"):
            return True
        place, now = (record.name, record.pathname, record.lineno, *_raised_at(record)), self._clock()
        held = self._held.get(place)
        if held is not None and now - held.since < self._interval_s:
            held.suppressed += 1
            return False
        if held is not None and held.suppressed:
            record.suppressed = held.suppressed
        self._held[place] = _Held(now)
        return True


def _raised_at(record: logging.LogRecord) -> tuple[object, ...]:
    if not record.exc_info or record.exc_info[2] is None:
        return ()
    trace = record.exc_info[2]
    while trace.tb_next is not None:
        trace = trace.tb_next
    return (record.exc_info[0], trace.tb_frame.f_code.co_filename, trace.tb_lineno)


@dataclass(slots=True)
class _Held:
    since: float
    suppressed: int = 0


class LimitedLog:
    """At most one line per key and interval. The next line of a key says in `suppressed` how many were held back.

    `keys_max` keys are remembered; when there are more, the key written longest ago is forgotten, and what it held back
    is said. `clock` gives seconds, monotonic.
    """

    def __init__(
        self, log: logging.Logger, interval_s: float, clock: Callable[[], float], *, keys_max: int = 1024
    ) -> None:
        if keys_max < 1:
            raise ValueError("keys_max is at least 1")
        self._log = log
        self._interval_s = interval_s
        self._clock = clock
        self._keys_max = keys_max
        self._held: OrderedDict[str, _Held] = OrderedDict()

    def warning(self, key: str, event: str, **fields: object) -> bool:
        return self.log(logging.WARNING, key, event, fields)

    def info(self, key: str, event: str, **fields: object) -> bool:
        return self.log(logging.INFO, key, event, fields)

    def log(self, level: int, key: str, event: str, fields: Mapping[str, object]) -> bool:
        """Whether the line was written."""
        now = self._clock()
        held = self._held.get(key)
        if held is not None and now - held.since < self._interval_s:
            held.suppressed += 1
            return False
        extra = {f"{name}_" if name in _STANDARD else name: value for name, value in fields.items()}
        if held is not None and held.suppressed:
            extra["suppressed"] = held.suppressed
        self._held[key] = _Held(now)
        self._held.move_to_end(key)
        if len(self._held) > self._keys_max:
            forgotten, left = self._held.popitem(last=False)
            if left.suppressed:
                self._log.log(level, "lines held back", extra={"key": forgotten, "suppressed": left.suppressed})
        self._log.log(level, event, extra=extra)
        return True


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _plain(value: Any, depth: int = 0) -> Any:
    """Something JSON has. NaN and infinities become text, for JSON has none."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if depth < _DEPTH_MAX and isinstance(value, Mapping):
        return {str(name): _plain(v, depth + 1) for name, v in value.items()}
    if depth < _DEPTH_MAX and isinstance(value, list | tuple | set | frozenset):
        return [_plain(v, depth + 1) for v in value]
    return str(value)


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(_plain(value))
    plain = text and not any(c.isspace() or c in '"=' or not c.isprintable() for c in text)
    return text if plain or not isinstance(value, str) else json.dumps(text)


def _printable(text: str) -> str:
    """A line stays one line, whatever a stranger sent."""
    return text if text.isprintable() else json.dumps(text)[1:-1]

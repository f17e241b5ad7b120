"""One line per event, with its fields."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.logs import ForeignLimit, JsonFormatter, LimitedLog, LogFormat, TextFormatter, setup_logs
from kvatlas_common.words import EngineId, Medium

log = logging.getLogger("kvatlas_test.logs")


@pytest.fixture
def root() -> Iterator[None]:
    """Gives the process's logging back as it was."""
    before = logging.getLogger()
    handlers, level = list(before.handlers), before.level
    yield
    logging.captureWarnings(False)
    for handler in list(before.handlers):
        before.removeHandler(handler)
    for handler in handlers:
        before.addHandler(handler)
    before.setLevel(level)


def set_up(style: LogFormat, stream: io.StringIO | None = None) -> io.StringIO:
    stream = stream or io.StringIO()
    setup_logs(stream, "info", style)
    return stream


def json_line(message: str = "event", /, **extra: Any) -> dict[str, Any]:
    record = log.makeRecord(log.name, logging.INFO, "f", 1, message, (), None, extra=extra)
    line: dict[str, Any] = json.loads(JsonFormatter().format(record), parse_constant=pytest.fail)
    return line


@pytest.mark.usefixtures("root")
def test_json_lines_unless_a_person_watches() -> None:
    stream = set_up("auto")
    log.warning("engine down", extra={"engine": EngineId("a:1", 1), "failures": 3})
    log.debug("not logged")
    line = json.loads(stream.getvalue())
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "kvatlas_test.logs",
        "event": "engine down",
        "engine": "a:1/dp1",
        "failures": 3,
    }

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = set_up("auto", Terminal())
    log.info("engine down", extra={"engine": "a:1", "why": "two words", "empty": ""})
    assert terminal.getvalue()[12:] == ' info    engine down  engine=a:1 why="two words" empty="" [kvatlas_test.logs]\n'
    assert stream.getvalue().count("\n") == 1  # the first set-up is replaced


@pytest.mark.usefixtures("root")
def test_an_exception_keeps_its_trace() -> None:
    stream = set_up("json")
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("failed")
    line = json.loads(stream.getvalue())
    assert line["error"] == "ValueError('broken')"
    assert line["trace"].startswith("Traceback")
    text = set_up("text")
    log.error("failed", exc_info=ValueError("broken"))
    assert text.getvalue().splitlines()[-1] == "ValueError: broken"


def test_values_that_json_lacks() -> None:
    line = json_line(nan=float("nan"), medium=Medium.GPU, many={EngineId("a:1"): (1, {2.5})}, data=b"x")
    assert (line["nan"], line["medium"], line["many"], line["data"]) == ("nan", "gpu", {"a:1": [1, [2.5]]}, "b'x'")


def test_a_field_cannot_replace_the_event() -> None:
    line = json_line("event", level="mine", event="mine")
    assert (line["event"], line["event_"], line["level"], line["level_"]) == ("event", "mine", "info", "mine")


@given(st.text(st.characters()), st.text(st.characters()))
def test_a_line_stays_one_line_whatever_a_stranger_sent(event: str, value: str) -> None:
    record = log.makeRecord(log.name, logging.INFO, "f", 1, "%s", (event,), None, extra={"value": value})
    for formatter in (JsonFormatter(), TextFormatter()):
        line = formatter.format(record)
        assert len(line.splitlines()) == 1
        line.encode()
    assert json.loads(JsonFormatter().format(record))["value"] == value


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append((record.getMessage(), record.__dict__.get("suppressed", 0)))


def test_what_libraries_warn_of_is_limited_by_its_place() -> None:
    now = [0.0]
    lines, theirs, ours = Lines(), logging.Logger("library.http"), logging.Logger("kvatlas_router.http")
    lines.addFilter(ForeignLimit(30.0, lambda: now[0]))
    for logger in (theirs, ours):
        logger.addHandler(lines)

    def happen() -> None:
        theirs.info("fine")
        theirs.warning("garbage from %s", "a stranger")
        ours.warning("mine")
        for error in (ValueError("a"), KeyError("b")):
            try:
                raise error
            except LookupError:
                theirs.exception("broken")
            except ValueError:
                theirs.exception("broken")

    happen()
    first = [("fine", 0), ("garbage from a stranger", 0), ("mine", 0), ("broken", 0), ("broken", 0)]
    assert lines.seen == first
    happen()
    assert lines.seen == [*first, ("fine", 0), ("mine", 0)]
    now[0], lines.seen = 30.0, []
    happen()
    assert [(text, suppressed) for text, suppressed in lines.seen if suppressed] == [
        ("garbage from a stranger", 1),
        ("broken", 1),
        ("broken", 1),
    ]


def test_a_limited_log_says_how_much_it_held_back() -> None:
    now = [0.0]
    lines, target = Lines(), logging.Logger("limited")
    target.addHandler(lines)
    limited = LimitedLog(target, 10.0, lambda: now[0], keys_max=2)
    assert [limited.warning("a", "bad event", name="x") for _ in range(4)] == [True, False, False, False]
    assert limited.info("b", "other")
    now[0] = 10.0
    assert limited.warning("a", "bad event")
    assert lines.seen == [("bad event", 0), ("other", 0), ("bad event", 3)]
    limited.warning("b", "other")
    limited.warning("a", "bad event")
    limited.warning("c", "third")  # of two keys remembered, a is the one written longest ago
    assert lines.seen[3:] == [("other", 0), ("lines held back", 1), ("third", 0)]
    assert limited.warning("a", "bad event")
    with pytest.raises(ValueError, match="at least 1"):
        LimitedLog(target, 1.0, lambda: 0.0, keys_max=0)

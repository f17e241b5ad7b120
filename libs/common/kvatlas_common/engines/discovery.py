"""Which engines are wanted now: a fixed list, a file that is read again, a name that is resolved again.

What cannot be read keeps its last answer: a file half written, or a name server out of reach, must not take a fleet
away. Each source is followed on its own, so a slow one holds up no other. An address that several sources name is
described by the first of them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from kvatlas_common.engines.plain_yaml import load_plain_yaml
from kvatlas_common.engines.specs import (
    NO_DEFAULTS,
    DnsName,
    EngineDefaults,
    EngineFile,
    EngineSource,
    EngineSpec,
    clashes,
    parse_engine,
)

log = logging.getLogger(__name__)

FILE_BYTES_MAX = 4 << 20
ENGINES_MAX = 10_000

Resolve = Callable[[str, int], Awaitable[frozenset[str]]]
Engines = frozenset[EngineSpec]


class BrokenList(ValueError):
    """An engine list that cannot be used; says every reason."""


async def resolve_addresses(host: str, port: int) -> frozenset[str]:
    """Every A and AAAA record of a name, by the system's resolver. Raises `OSError`."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # A link-local IPv6 address carries its interface after `%`, which no URL can.
    return frozenset(str(address[0]) for *_, address in found if "%" not in str(address[0]))


def parse_engine_list(
    text: str, defaults: EngineDefaults = NO_DEFAULTS, environ: Mapping[str, str] | None = None
) -> Engines:
    """Engines from YAML or JSON: a list, or a mapping with the list under `engines`. Raises `BrokenList`."""
    try:
        document = load_plain_yaml(text)
    except ValueError as error:
        raise BrokenList(str(error)) from None
    if isinstance(document, dict) and set(document) == {"engines"}:
        document = document["engines"]
    if document is None:
        raise BrokenList("it is empty; for no engines write []")
    if not isinstance(document, list) or len(document) > ENGINES_MAX:
        raise BrokenList(f"it is no list of at most {ENGINES_MAX} engines")
    specs: list[EngineSpec] = []
    problems: list[str] = []
    for number, written in enumerate(document, 1):
        try:
            specs.append(parse_engine(written, defaults, environ))
        except ValueError as error:
            problems.append(f"engine {number}: {error}")
    problems += clashes(specs)
    if problems:
        raise BrokenList("; ".join(problems))
    return frozenset(specs)


async def watch(
    sources: Sequence[EngineSource],
    *,
    defaults: EngineDefaults = NO_DEFAULTS,
    environ: Mapping[str, str] | None = None,
    refresh_s: float = 5.0,
    resolve: Resolve = resolve_addresses,
) -> AsyncGenerator[Engines, None]:
    """The wanted engines: as soon as any source is known, then on every change, until the iterator is closed.

    Close it (`contextlib.aclosing`): its followers run until then. `defaults` and `environ` serve what files list.
    """
    fixed = frozenset(source for source in sources if isinstance(source, EngineSpec))
    lists: list[Engines | None] = [frozenset({s}) if isinstance(s, EngineSpec) else None for s in sources]
    changed = asyncio.Event()

    async def follow(place: int, look: Callable[[], Awaitable[Engines | None]]) -> None:
        while True:
            found = await look()
            if found is not None and found != lists[place]:
                lists[place] = found
                changed.set()
            await asyncio.sleep(refresh_s)

    followers = [
        asyncio.create_task(follow(place, look), name=f"engines from {source}")
        for place, source in enumerate(sources)
        if (look := _looker(source, defaults, environ or {}, resolve)) is not None
    ]
    if fixed or not followers:
        changed.set()
    last: Engines | None = None
    try:
        while True:
            await _either(changed, followers)
            changed.clear()
            engines = _united(lists)
            if engines != last:
                last = engines
                yield engines
    finally:
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)


async def _either(changed: asyncio.Event, followers: Sequence[asyncio.Task[None]]) -> None:
    """Until something changed. A follower only ends by a defect, which is raised here rather than lost."""
    waiting = asyncio.ensure_future(changed.wait())
    try:
        await asyncio.wait([waiting, *followers], return_when=asyncio.FIRST_COMPLETED)
        for follower in followers:
            if follower.done():
                follower.result()
    finally:
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting


def _united(lists: Sequence[Engines | None]) -> Engines:
    by_address: dict[str, EngineSpec] = {}
    for engines in lists:
        for spec in sorted(engines or (), key=lambda spec: spec.address):
            by_address.setdefault(spec.address, spec)
    united = tuple(by_address.values())
    for clash in clashes(united):
        log.warning("engines clash", extra={"clash": clash})
    return frozenset(united)


def _looker(
    source: EngineSource, defaults: EngineDefaults, environ: Mapping[str, str], resolve: Resolve
) -> Callable[[], Awaitable[Engines | None]] | None:
    if isinstance(source, EngineFile):
        return FileLook(source.path, defaults, environ).look
    if isinstance(source, DnsName):
        return NameLook(source, resolve).look
    return None


@dataclass(slots=True)
class FileLook:
    """Looks at one file; None is nothing new. The path is followed anew each time: a Kubernetes ConfigMap changes by
    swapping a symbolic link above the file."""

    path: Path
    defaults: EngineDefaults = NO_DEFAULTS
    environ: Mapping[str, str] = field(default_factory=dict)
    _seen: tuple[int, ...] | None = None
    _broken: str = ""

    async def look(self) -> Engines | None:
        return await asyncio.to_thread(self._look)

    def _look(self) -> Engines | None:
        try:
            return self._read()
        except (OSError, ValueError) as error:
            self._complain(str(error))
            return None

    def _read(self) -> Engines | None:
        stat = self.path.stat()
        # Noted before reading: a change while reading shows the next time.
        seen = (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if seen == self._seen:
            return None
        if stat.st_size > FILE_BYTES_MAX:
            raise BrokenList(f"it is larger than {FILE_BYTES_MAX} bytes")
        text = self.path.read_text("utf-8")
        self._seen = seen
        engines = parse_engine_list(text, self.defaults, self.environ)
        self._broken = ""
        log.info("engine list read", extra={"file": str(self.path), "engines": len(engines)})
        return engines

    def _complain(self, why: str) -> None:
        """Once for each reason, not at every look."""
        if why != self._broken:
            self._broken = why
            log.warning("engine list unusable, keeping the last", extra={"file": str(self.path), "why": why})


@dataclass(slots=True)
class NameLook:
    """Resolves one name; None is no answer. A name without addresses is no answer too: the resolver says the same of a
    name that is empty and of one that it cannot find just now, and whether engines live is for probes to say."""

    name: DnsName
    resolve: Resolve = resolve_addresses
    _failing: bool = False

    async def look(self) -> Engines | None:
        try:
            addresses = await self.resolve(self.name.host, self.name.port)
        except (OSError, UnicodeError) as error:  # a label longer than 63 characters is a UnicodeError
            self._complain(str(error))
            return None
        if not addresses:
            self._complain("it has no addresses")
            return None
        self._failing = False
        return frozenset(self.name.at(ip) for ip in addresses)

    def _complain(self, why: str) -> None:
        if not self._failing:
            self._failing = True
            log.warning("engine name unresolved, keeping the last answer", extra={"host": self.name.host, "why": why})

"""Leases in Redis: which shard owns which engine, and which shards there are; `core.ownership` says what follows.

A lease is a hash with a time to live, `shard` and `fence`. Its fence is higher than any given out for the engine
before, so that an owner that has been replaced without noticing can write nothing any more. Fences follow the clock
(ms): also after the highest one was lost, in a wipe or a fail-over, or has expired, the next is higher. All times are
Redis's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvatlas_indexer.core.ownership import Lease

BEAT = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local shard, lease_ms = ARGV[1], tonumber(ARGV[2])
local heard = tonumber(redis.call('ZSCORE', KEYS[1], shard) or '0') >= now - lease_ms
redis.call('ZADD', KEYS[1], now, shard)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - lease_ms)
local found = {redis.call('ZRANGE', KEYS[1], 0, -1), heard and 0 or 1}
for i = 2, #KEYS do
  local lease = redis.call('HMGET', KEYS[i], 'shard', 'fence')
  if lease[1] == shard and lease[2] == ARGV[i + 1] then
    redis.call('PEXPIRE', KEYS[i], lease_ms)
  end
  found[i + 1] = lease
end
return found
"""
ACQUIRE = """
local lease = redis.call('HMGET', KEYS[1], 'shard', 'fence')
if lease[1] and lease[1] ~= ARGV[1] and ARGV[3] ~= '1' then
  return false
end
local t = redis.call('TIME')
local known = math.max(tonumber(redis.call('GET', KEYS[2]) or '0'), tonumber(lease[2] or '0'), tonumber(ARGV[4]))
local fence = math.max(known + 1, t[1] * 1000 + math.floor(t[2] / 1000))
local said = string.format('%.0f', fence)
redis.call('SET', KEYS[2], said, 'EX', 604800)
redis.call('HSET', KEYS[1], 'shard', ARGV[1], 'fence', said)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return fence
"""
RELEASE = """
local lease = redis.call('HMGET', KEYS[1], 'shard', 'fence')
if lease[1] == ARGV[1] and lease[2] == ARGV[2] then
  redis.call('DEL', KEYS[1])
end
"""

LEAVE = """
redis.call('ZREM', KEYS[1], ARGV[1])
for i = 2, #KEYS do
  if redis.call('HGET', KEYS[i], 'shard') == ARGV[1] then
    redis.call('DEL', KEYS[i])
  end
end
"""


class Scripts(Protocol):
    async def run_script(self, text: str, keys: Sequence[bytes], args: Sequence[bytes | str | int]) -> Any:
        """Runs one script whose keys share a hash tag. Raises `StoreUnavailable`."""
        ...


@dataclass(frozen=True, slots=True)
class Beat:
    """What a heartbeat found: the live shards (this one too), and who holds the leases that were asked about.

    `returned`: this shard had not been heard for a whole lease, or ever. Where that is the store's doing (it was wiped,
    stopped, out of reach), the others are still to be heard.
    """

    live: frozenset[str]
    leases: Mapping[str, Lease]
    returned: bool


class RedisLeases:
    """The leases of one shard. `prefix` ends where the hash tag `{0}` begins. Every call raises `StoreUnavailable`."""

    def __init__(self, scripts: Scripts, prefix: str, shard: str, *, lease_s: float = 3.0) -> None:
        self._scripts = scripts
        self._prefix = f"{prefix}{{0}}".encode()
        self._shard = shard
        self._lease_ms = round(lease_s * 1000)

    async def beat(self, addresses: Sequence[str], held: Mapping[str, int]) -> Beat:
        """I am alive, and so are my leases. `held`: address -> fence of those this shard believes it holds."""
        keys = [self._prefix + b"shards", *(self._lease(address) for address in addresses)]
        args: list[str | int] = [self._shard, self._lease_ms, *(held.get(address, 0) for address in addresses)]
        live, returned, *leases = await self._scripts.run_script(BEAT, keys, args)
        return Beat(
            frozenset(shard.decode() for shard in live),
            {
                address: Lease(shard.decode(), int(fence))
                for address, (shard, fence) in zip(addresses, leases, strict=True)
                if shard is not None and fence is not None
            },
            bool(returned),
        )

    async def acquire(self, address: str, *, force: bool, above: int = 0) -> int | None:
        """The fence, higher than any before and than `above`; None: another shard holds the lease."""
        keys = [self._lease(address), self._prefix + b"f" + address.encode()]
        fence = await self._scripts.run_script(ACQUIRE, keys, [self._shard, self._lease_ms, int(force), above])
        return None if fence is None else int(fence)

    async def release(self, address: str, fence: int) -> None:
        await self._scripts.run_script(RELEASE, [self._lease(address)], [self._shard, fence])

    async def leave(self, addresses: Sequence[str]) -> None:
        """This shard is going, and lets go of whichever of these it holds, all at once: the others need not wait for
        its silence, and none of them sees an engine free that would still fall to this one.
        """
        keys = [self._prefix + b"shards", *(self._lease(address) for address in addresses)]
        await self._scripts.run_script(LEAVE, keys, [self._shard])

    def _lease(self, address: str) -> bytes:
        return self._prefix + b"o" + address.encode()

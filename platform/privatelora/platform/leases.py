"""What all backbones share in Valkey: counters that blocks are taken from, slots that expire, and a rate.

    take, give     a block of a window's allowance, reserved at once for all backbones by a script; the rest comes back
    hold, leave    slots of concurrent sessions: each is a lease of its own that its backbone renews, never a counter,
                   so that one whose device or backbone vanished is free again by itself
    pace           when the next bytes of a rate may go (the generic cell rate algorithm, in Valkey's time)

All of it may be lost with Valkey. `epoch` is a time that Valkey keeps as long as its memory: when it changes, each
backbone counts again what it has taken (`gate.py`), and the database says what was used before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from redis import Redis

PREFIX = "privatelora:"
EPOCH = PREFIX + "epoch"

_EPOCH = """
local epoch = redis.call('GET', KEYS[#KEYS])
if not epoch then
  local now = redis.call('TIME')
  epoch = now[1] .. '.' .. now[2]
  redis.call('SET', KEYS[#KEYS], epoch)
end
"""

# KEYS: counter, epoch. ARGV: limit, want, what is used already or -1 (unknown), seconds to live.
_TAKE = (
    _EPOCH
    + """
local used = redis.call('GET', KEYS[1])
if not used then
  if tonumber(ARGV[3]) < 0 then return {-1, 0, epoch} end
  used = ARGV[3]
end
used = tonumber(used)
local grant = math.max(0, math.min(tonumber(ARGV[2]), tonumber(ARGV[1]) - used))
redis.call('SET', KEYS[1], string.format('%.0f', used + grant), 'EX', ARGV[4])
return {grant, used + grant, epoch}
"""
)

# KEYS: counter. ARGV: how many, which may be negative. A counter that is gone stays gone.
_ADD = """
if redis.call('EXISTS', KEYS[1]) == 1 then return redis.call('INCRBY', KEYS[1], ARGV[1]) end
return 0
"""

# KEYS: a sorted set for each quota. ARGV: member, seconds, then a limit for each. All or none.
_HOLD = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
for at, key in ipairs(KEYS) do
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  if not redis.call('ZSCORE', key, ARGV[1]) and redis.call('ZCARD', key) >= tonumber(ARGV[2 + at]) then
    return at
  end
end
for _, key in ipairs(KEYS) do
  redis.call('ZADD', key, now + tonumber(ARGV[2]), ARGV[1])
  redis.call('EXPIRE', key, math.ceil(2 * tonumber(ARGV[2])))
end
return 0
"""

# KEYS: a sorted set for each slot. ARGV: seconds, then the member of each. A set that was lost is made again.
_RENEW = """
local time = redis.call('TIME')
local until_ = tonumber(time[1]) + tonumber(time[2]) / 1e6 + tonumber(ARGV[1])
for at, key in ipairs(KEYS) do
  redis.call('ZADD', key, until_, ARGV[1 + at])
  redis.call('EXPIRE', key, math.ceil(2 * tonumber(ARGV[1])))
end
return 0
"""

# KEYS: a time. ARGV: bytes a second, bytes. Returns the microseconds until these bytes may go.
_PACE = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1e6 + tonumber(time[2])
local due = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now)
local after = due + tonumber(ARGV[2]) * 1e6 / tonumber(ARGV[1])
redis.call('SET', KEYS[1], string.format('%.0f', after), 'PX', math.ceil((after - now) / 1000) + 1000)
return math.floor(due - now)
"""


@dataclass(frozen=True)
class Grant:
    """A block of an allowance.

    Parameters
    ----------
    amount : what was granted, less than was asked for where the limit is near; -1: the counter is not there, so what
        is used already must be said.
    total : of all backbones, spent or held as blocks.
    epoch : of Valkey's memory.
    """

    amount: int
    total: int
    epoch: bytes


class Leases:
    """The scripts on one Valkey; every call is one round trip, and raises `redis.RedisError` where there is none."""

    def __init__(self, valkey: Redis) -> None:
        self._take, self._add = valkey.register_script(_TAKE), valkey.register_script(_ADD)
        self._hold, self._renew = valkey.register_script(_HOLD), valkey.register_script(_RENEW)
        self._pace, self._valkey = valkey.register_script(_PACE), valkey

    def take(self, counter: str, limit: int, want: int, used: int | None, live_s: int) -> Grant:
        """Reserve up to `want` of what `limit` leaves; `used` starts a counter that is not there."""
        amount, total, epoch = cast(
            list[Any],
            self._take(
                keys=[PREFIX + counter, EPOCH],
                args=[limit, want, -1 if used is None else used, live_s],
            ),
        )
        return Grant(int(amount), int(total), epoch)

    def epoch(self) -> bytes | None:
        """Of Valkey's memory; None while nobody has taken anything."""
        return cast(bytes | None, self._valkey.get(EPOCH))

    def add(self, counter: str, amount: int) -> None:
        """Give back what was not spent (negative), or count what was taken before Valkey lost it."""
        self._add(keys=[PREFIX + counter], args=[amount])

    def hold(self, member: str, slots: Sequence[tuple[str, int]], live_s: float) -> int | None:
        """Take a slot of each (name, limit) for `member`, or none; returns which one is full."""
        full = int(
            cast(
                int,
                self._hold(
                    keys=[PREFIX + name for name, _ in slots], args=[member, live_s, *(limit for _, limit in slots)]
                ),
            )
        )
        return full - 1 if full else None

    def renew(self, slots: Sequence[tuple[str, str]], live_s: float) -> None:
        """Keep each slot (name, member) for `live_s` more."""
        if slots:
            self._renew(keys=[PREFIX + name for name, _ in slots], args=[live_s, *(member for _, member in slots)])

    def leave(self, member: str, names: Sequence[str]) -> None:
        """Give up slots."""
        with self._valkey.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.zrem(PREFIX + name, member)
            pipe.execute()

    def pace(self, rate: str, bytes_per_s: int, nbytes: int) -> float:
        """Seconds until `nbytes` more may go, which are counted as if they went then."""
        return int(cast(int, self._pace(keys=[PREFIX + rate], args=[bytes_per_s, nbytes]))) / 1e6

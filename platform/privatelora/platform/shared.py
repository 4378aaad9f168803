"""What all sessions of one quota share on a backbone. All of it is memory.

    Allowance                         a windowed quota: spends a block in hand, asks for the next before it runs dry
    Rate                              bytes a second: spends a block, holds devices back until the next may go
    Holding                           KV memory of the sessions that are here
    Slots                             concurrent sessions: nothing to do here, the bank renews them

Everything here runs on the event loop, and what a session's meter calls is on a token's path: a few additions. What an
allowance or a rate asks for is fetched in a thread (`bank.py`), and the answer is given back on the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from privatelora.platform.quotas import WINDOWS, Window, window
from privatelora.platform.tables import Quota, Resource, utc_now
from privatelora.protocol.errors import ConfigurationError, QuotaError

if TYPE_CHECKING:
    from privatelora.platform.leases import Grant
    from privatelora.platform.meter import SessionMeter

SHARE = 20  # a block is at most one so many of the limit, so that the last of it is not all in one backbone's hand
RATE_BLOCK_S = 0.25  # of a rate's bytes
FULL_S = 5.0  # after which one who found no memory left may ask again


class Bank(Protocol):
    """Where blocks come from: returns at once, and answers by `Allowance.granted` and `Rate.granted`."""

    def ask(self, allowance: Allowance, want: int) -> None: ...

    def pace(self, rate: Rate, nbytes: int) -> None: ...

    def write(self) -> None:
        """What was spent is to be written to the database now."""
        ...


@dataclass(eq=False)
class Shared:
    """What sessions of a quota have in common here; `limit` is the quota's, at hand for a token's path."""

    quota: Quota
    meters: set[SessionMeter] = field(default_factory=set, kw_only=True)
    limit: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.change(self.quota)

    def change(self, quota: Quota) -> None:
        """These are its limits from now on."""
        self.quota, self.limit = quota, quota.limit


@dataclass(eq=False)
class Allowance(Shared):
    """A quota with a window, as far as this backbone has it.

    Parameters
    ----------
    largest : lease; half of it is the most that is in hand, and the other half what may be spent and not yet written.
    left : of what was granted; below 0 while what came was more than what was left.
    taken : granted in this window; spent : of that; written : of that, what the database knows.
    total : spent or held by all backbones, when the last block was granted.
    spent_out : the last answer was less than was asked for, so there is no more before the window resets.
    epoch : of Valkey's memory, which `taken` is counted in.
    block : what is asked for at once.
    """

    bank: Bank
    largest: int
    span: Window = field(init=False)
    block: int = field(init=False)
    left: int = 0
    taken: int = 0
    spent: int = 0
    written: int = 0
    total: int = 0
    spent_out: bool = False
    asking: bool = False
    epoch: bytes | None = None
    waiting: list[tuple[SessionMeter, int, Callable[[], None]]] = field(default_factory=list)
    _resets_at: float = field(init=False)  # of `span`, in seconds since 1970

    def __post_init__(self) -> None:
        super().__post_init__()
        self._begin(utc_now())

    def change(self, quota: Quota) -> None:
        if quota.limit > self.limit:
            self.spent_out = False
        super().change(quota)
        self.block = max(1, min(self.largest, quota.limit // SHARE) // 2)

    @property
    def resource(self) -> Resource:
        return Resource(self.quota.resource)

    def spend(self, amount: int) -> None:
        """Take from what is in hand, and ask for more in time."""
        self.left -= amount
        self.spent += amount
        if self.left < self.block // 2:
            self.ask(0)
        if self.spent - self.written > self.block:
            self.bank.write()

    @property
    def unknown(self) -> int:
        """What this backbone has taken and nobody knows of but a Valkey that keeps its memory."""
        if self.resource is Resource.TOKENS_PER_MINUTE:
            return self.taken
        return max(0, self.left) + self.spent - self.written

    def ask(self, beside: int) -> None:
        """Ask for as much as makes a block in hand, or more where `beside` is."""
        self.turn()
        if not self.asking and not self.spent_out:
            self.asking = True
            self.bank.ask(self, max(beside, self.block) - self.left)

    def turn(self) -> None:
        """A new window has begun: what was left of the old one is gone with it."""
        if time.time() >= self._resets_at:
            self._begin(utc_now())
            self.spent_out = False
            self.left = self.taken = self.spent = self.written = 0

    def granted(self, quota: Quota, span: Window, asked: int, grant: Grant) -> None:
        """A block came, or less than one; of an old window it is nothing.

        `quota` is what the limit was when it was asked for: one that has been raised since may still have more.
        """
        self.asking = False
        if span == self.span:
            self.left += grant.amount
            self.taken += grant.amount
            self.total, self.epoch = grant.total, grant.epoch
            self.spent_out = grant.amount < asked and quota.limit >= self.limit
        self.serve()

    def serve(self) -> None:
        """Let those go on who waited for a block, and end those for whom there will be none."""
        waiting, self.waiting = self.waiting, []
        for meter, amount, go_on in waiting:
            if meter.closed:
                continue
            if self.enough(amount):
                meter.attempt(go_on)
            elif self.spent_out:
                meter.end(self.error())
            else:
                self.waiting.append((meter, amount, go_on))
        if self.waiting:
            self.ask(max(amount for _, amount, _ in self.waiting))

    def enough(self, amount: int) -> bool:
        """Whether `amount` may be spent of what is in hand."""
        self.turn()
        return self.left >= amount and self.left > 0

    def error(self) -> QuotaError:
        """What a device is told whose quota is spent."""
        now, quota = utc_now(), self.quota
        seconds = max(1.0, (self.span.resets_at - now).total_seconds())
        return QuotaError(
            f"the {quota.level}'s quota of {quota.limit} {quota.resource} is spent; it resets at "
            f"{self.span.resets_at:%Y-%m-%d %H:%M:%S} UTC. What was finished is kept: go on then, or ask your operator",
            retry_after_s=seconds,
        )

    def _begin(self, now: datetime) -> None:
        """The window that `now` is in."""
        found = window(self.quota, now)
        if found is None:
            raise ValueError(f"{self.quota.resource} has no window")
        self.span, self._resets_at = found, found.resets_at.timestamp()


@dataclass(eq=False)
class Rate(Shared):
    """Bytes a second, both ways together: devices are held back, not sent away."""

    bank: Bank
    block: int = field(init=False)
    left: int = field(init=False)
    asking: bool = False
    held: set[SessionMeter] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.left = self.block

    def change(self, quota: Quota) -> None:
        super().change(quota)
        self.block = max(1, int(quota.limit * RATE_BLOCK_S))

    def spend(self, amount: int, meter: SessionMeter) -> None:
        self.left -= amount
        if self.left <= 0 or self.left < self.block // 2:
            self._ask()
        if self.left <= 0 and meter not in self.held and not meter.closed:
            self.held.add(meter)
            meter.hold_back(self)

    def granted(self, nbytes: int) -> None:
        """So many bytes may go now."""
        self.asking = False
        self.left += nbytes
        if self.left > 0:
            held, self.held = self.held, set()
            for meter in held:
                meter.let_go(self)
        if self.left <= 0 or self.left < self.block // 2:
            self._ask()

    def _ask(self) -> None:
        if not self.asking:
            self.asking = True
            self.bank.pace(self, max(self.block, 1 - self.left))


@dataclass(eq=False)
class Holding(Shared):
    """Memory that sessions of one quota may hold on this backbone.

    most : what they hold is no more than this, all that was let in since it was last added up; for most tokens it need
        not be.
    """

    most: int = 0

    def check(self, nbytes: int) -> None:
        """Raise `QuotaError` if `nbytes` more are too many, `ConfigurationError` if they never fit."""
        if nbytes > self.limit:
            raise ConfigurationError(
                f"this pass must keep {nbytes} bytes, over the {self.quota.level}'s quota of {self.limit} "
                "kv_memory_bytes; use shorter texts or smaller batches"
            )
        if self.most + nbytes <= self.limit:
            self.most += nbytes
            return
        held = self.most = sum(meter.session.held_bytes for meter in self.meters if meter.session is not None)
        self.most += nbytes
        if held + nbytes > self.limit:
            self.most = held
            raise QuotaError(
                f"this pass must keep {nbytes} bytes beside {held} that sessions of this {self.quota.level} hold, over "
                f"its quota of {self.limit} kv_memory_bytes; use shorter texts or smaller batches, or end other "
                "sessions",
                retry_after_s=FULL_S,
            )


@dataclass(eq=False)
class Slots(Shared):
    """Concurrent sessions of one quota, counted in Valkey."""

    @property
    def name(self) -> str:
        return f"slots:{self.quota.id}"


def shared_for(quota: Quota, bank: Bank, largest_bytes: int, largest_tokens: int) -> Shared:
    """What sessions of a quota share."""
    resource = Resource(quota.resource)
    if resource in WINDOWS:
        return Allowance(quota, bank, largest_tokens if resource is Resource.TOKENS_PER_MINUTE else largest_bytes)
    if resource is Resource.BYTES_PER_SECOND:
        return Rate(quota, bank)
    return Holding(quota) if resource is Resource.KV_MEMORY_BYTES else Slots(quota)

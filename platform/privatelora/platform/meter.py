"""A session's account on its backbone, and what all sessions of one quota share there. All of it is memory.

    SessionMeter.admit, .spend        on a token's path: a few additions, no call to anything outside; what is spent is
                                      settled with each pass, and within one as soon as it is more than a crumb
    Allowance                         a windowed quota: spends a block in hand, asks for the next before it runs dry
    Rate                              bytes a second: spends a block, holds devices back until the next may go
    Holding                           KV memory of the sessions that are here
    Slots                             concurrent sessions: nothing to do here, the bank renews them

Everything here runs on the event loop. What an allowance or a rate asks for is fetched in a thread (`bank.py`), and the
answer is given back on the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from privatelora.cloud.session import Session
from privatelora.platform.quotas import WINDOWS, Window, window
from privatelora.platform.tables import Quota, Resource, utc_now
from privatelora.protocol.errors import ConfigurationError, PrivateLoraError, QuotaError

if TYPE_CHECKING:
    from privatelora.platform.keys import Caller

SHARE = 20  # a block is at most one so many of the limit, so that the last of it is not all in one backbone's hand
RATE_BLOCK_S = 0.25  # of a rate's bytes
CRUMBS = 64  # of a block: what one session may have spent and not settled
CRUMB_BYTES = 64 << 10
KEEP_ALIVE_S = 15.0  # a device that is held back hears of it so often, and does not take it for silence
FULL_S = 5.0  # after which one who found no memory left may ask again

_SPENT_BY = {Resource.BYTES_UP_PER_DAY: 0, Resource.BYTES_DOWN_PER_DAY: 1}


class Bank(Protocol):
    """Where blocks come from: returns at once, and answers by `Allowance.granted` and `Rate.granted`."""

    def ask(self, allowance: Allowance, want: int) -> None: ...

    def pace(self, rate: Rate, nbytes: int) -> None: ...

    def write(self) -> None:
        """What was spent is to be written to the database now."""
        ...


@dataclass(eq=False)
class Allowance:
    """A quota with a window, as far as this backbone has it.

    Parameters
    ----------
    largest : lease; half of it is the most that is in hand, and the other half what may be spent and not yet written.
    left : of what was granted; below 0 while what came was more than what was left.
    taken : granted in this window; spent : of that; written : of that, what the database knows.
    total : spent or held by all backbones, when the last block was granted.
    spent_out : the last answer was less than was asked for, so there is no more before the window resets.
    epoch : of Valkey's memory, which `taken` is counted in.
    """

    quota: Quota
    bank: Bank
    largest: int
    span: Window = field(init=False)
    left: int = 0
    taken: int = 0
    spent: int = 0
    written: int = 0
    total: int = 0
    spent_out: bool = False
    asking: bool = False
    epoch: bytes | None = None
    meters: set[SessionMeter] = field(default_factory=set)
    waiting: list[tuple[SessionMeter, int, Callable[[], None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.span = self._window(utc_now())

    @property
    def block(self) -> int:
        return max(1, min(self.largest, self.quota.limit // SHARE) // 2)

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
        now = utc_now()
        if now >= self.span.resets_at:
            self.span, self.spent_out = self._window(now), False
            self.left = self.taken = self.spent = self.written = 0

    def granted(self, span: Window, asked: int, amount: int, total: int, epoch: bytes) -> None:
        """A block came, or less than one; of an old window it is nothing."""
        self.asking = False
        if span == self.span:
            self.left += amount
            self.taken += amount
            self.total, self.epoch = total, epoch
            self.spent_out = amount < asked
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

    def _window(self, now: datetime) -> Window:
        found = window(self.quota, now)
        if found is None:
            raise ValueError(f"{self.quota.resource} has no window")
        return found


@dataclass(eq=False)
class Rate:
    """Bytes a second, both ways together: devices are held back, not sent away."""

    quota: Quota
    bank: Bank
    left: int = 0
    asking: bool = False
    meters: set[SessionMeter] = field(default_factory=set)
    held: set[SessionMeter] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.left = self.block

    @property
    def block(self) -> int:
        return max(1, int(self.quota.limit * RATE_BLOCK_S))

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
class Holding:
    """Memory that sessions of one quota may hold on this backbone.

    most : what they hold is no more than this, all that was let in since it was last added up; for most tokens it need
        not be.
    """

    quota: Quota
    meters: set[SessionMeter] = field(default_factory=set)
    most: int = 0

    def check(self, nbytes: int) -> None:
        """Raise `QuotaError` if `nbytes` more are too many, `ConfigurationError` if they never fit."""
        if nbytes > self.quota.limit:
            raise ConfigurationError(
                f"this pass must keep {nbytes} bytes, over the {self.quota.level}'s quota of {self.quota.limit} "
                "kv_memory_bytes; use shorter texts or smaller batches"
            )
        if self.most + nbytes <= self.quota.limit:
            self.most += nbytes
            return
        held = self.most = sum(meter.session.held_bytes for meter in self.meters if meter.session is not None)
        self.most += nbytes
        if held + nbytes > self.quota.limit:
            self.most = held
            raise QuotaError(
                f"this pass must keep {nbytes} bytes beside {held} that sessions of this {self.quota.level} hold, over "
                f"its quota of {self.quota.limit} kv_memory_bytes; use shorter texts or smaller batches, or end other "
                "sessions",
                retry_after_s=FULL_S,
            )


@dataclass(eq=False)
class Slots:
    """Concurrent sessions of one quota, counted in Valkey."""

    quota: Quota
    meters: set[SessionMeter] = field(default_factory=set)

    @property
    def name(self) -> str:
        return f"slots:{self.quota.id}"


Shared = Allowance | Rate | Holding | Slots


@dataclass(eq=False)
class Unwritten:
    """Bytes that all sessions here have moved and the database does not know of; calls `write` at `much`."""

    much: int
    write: Callable[[], None]
    total: int = 0

    def add(self, nbytes: int) -> None:
        self.total += nbytes
        if self.total > self.much:
            self.write()


@dataclass(eq=False)
class SessionMeter:
    """One session's account: the data plane's `Meter`.

    id : of its row; number : what the wire calls it; bytes_up, bytes_down, tokens : since it began.
    unwritten : of all sessions here; written : of this one's bytes, what the database knows.
    """

    id: str
    number: int
    caller: Caller
    unwritten: Unwritten
    written: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    tokens: int = 0
    session: Session | None = None
    opening: asyncio.Future[None] | None = None
    closed: bool = False
    closed_at: datetime | None = None
    end_reason: str | None = None
    shared: dict[str, Shared] = field(default_factory=dict)  # by quota
    on_close: Callable[[SessionMeter], None] = lambda meter: None
    _settled_up: int = 0  # of bytes_up, what was taken from what sessions share
    _settled_down: int = 0
    _crumb: int = CRUMB_BYTES  # that may be spent before it is settled
    _bytes: list[tuple[Allowance, int]] = field(default_factory=list)
    _tokens: list[Allowance] = field(default_factory=list)
    _rates: list[Rate] = field(default_factory=list)
    _holdings: list[Holding] = field(default_factory=list)
    _held_by: set[Rate | Allowance] = field(default_factory=set)
    _keep_alive: asyncio.TimerHandle | None = None

    def share(self, shared: dict[str, Shared]) -> None:
        """These quotas hold for it from now on."""
        for one in self.shared.values():
            if shared.get(one.quota.id) is not one:
                one.meters.discard(self)
                if isinstance(one, Rate):
                    one.held.discard(self)
                    self.let_go(one)
        self.shared = shared
        for one in shared.values():
            if isinstance(one, Holding) and self.session is not None and self not in one.meters:
                one.most += self.session.held_bytes
            one.meters.add(self)
        of = list(shared.values())
        windowed = [one for one in of if isinstance(one, Allowance)]
        self._bytes = [(one, _SPENT_BY[one.resource]) for one in windowed if one.resource in _SPENT_BY]
        self._tokens = [one for one in windowed if one.resource is Resource.TOKENS_PER_MINUTE]
        self._rates = [one for one in of if isinstance(one, Rate)]
        blocks = [one.block for one, _ in self._bytes] + [one.block for one in self._rates]
        self._crumb = min([CRUMB_BYTES, *(block // CRUMBS for block in blocks)])
        self._holdings = [one for one in of if isinstance(one, Holding)]

    # -- what the data plane calls -------------------------------------------------------------------------------------

    def begin(self, session: Session) -> None:
        self.session = session

    def admit(self, tokens: int, nbytes: int, go_on: Callable[[], None]) -> None:
        for holding in self._holdings:
            holding.check(nbytes)
        self._settle()
        needed = [(one, tokens) for one in self._tokens] + [(one, 1) for one, _ in self._bytes]
        self._admit(needed, tokens, go_on)

    def _admit(self, needed: list[tuple[Allowance, int]], tokens: int, go_on: Callable[[], None]) -> None:
        for allowance, amount in needed:
            if allowance.enough(amount):
                continue
            if amount > allowance.quota.limit:
                raise ConfigurationError(
                    f"a pass of {amount} tokens is over the {allowance.quota.level}'s quota of "
                    f"{allowance.quota.limit} {allowance.quota.resource}; use smaller batches or shorter texts"
                )
            if allowance.spent_out:
                raise allowance.error()
            allowance.waiting.append((self, amount, lambda: self._try_again(needed, tokens, go_on)))
            allowance.ask(amount)
            return
        self.tokens += tokens
        for allowance in self._tokens:
            allowance.spend(tokens)
        go_on()

    def _try_again(self, needed: list[tuple[Allowance, int]], tokens: int, go_on: Callable[[], None]) -> None:
        try:
            self._admit(needed, tokens, go_on)
        except PrivateLoraError as error:
            self.end(error)

    def spend(self, bytes_up: int, bytes_down: int) -> None:
        self.bytes_up += bytes_up
        self.bytes_down += bytes_down
        if self.bytes_up + self.bytes_down - self._settled_up - self._settled_down >= self._crumb:
            self._settle()

    def _settle(self) -> None:
        """Take what was spent since the last time from what sessions share."""
        spent = (self.bytes_up - self._settled_up, self.bytes_down - self._settled_down)
        self._settled_up, self._settled_down = self.bytes_up, self.bytes_down
        self.unwritten.add(sum(spent))
        for allowance, which in self._bytes:
            allowance.spend(spent[which])
            if allowance.left <= 0 and allowance not in self._held_by and not self.closed:
                self._out_of(allowance)
        for rate in self._rates:
            rate.spend(sum(spent), self)

    def close(self, reason: str) -> None:
        if not self.closed:
            self.closed, self.end_reason, self.closed_at = True, reason, utc_now()
            self._settle()
            self._stop_telling()
            for one in self.shared.values():
                one.meters.discard(self)
                if isinstance(one, Rate):
                    one.held.discard(self)
            self.on_close(self)

    # -- what holds a device back --------------------------------------------------------------------------------------

    def attempt(self, go_on: Callable[[], None]) -> None:
        """Go on; what goes wrong with it ends this session only."""
        try:
            go_on()
        except Exception as error:  # noqa: BLE001 (it is this session's, which tells and logs it)
            self.end(error)

    def end(self, error: Exception) -> None:
        """End the session, or what it waits for before it begins."""
        if self.opening is not None and not self.opening.done():
            self.opening.set_exception(error)
        if self.session is not None and not self.closed:
            self.session.ended(error)

    def hold_back(self, reason: Rate | Allowance) -> None:
        """Read nothing more from the device while there is this reason, or any other."""
        self._held_by.add(reason)
        if len(self._held_by) == 1 and self.session is not None:
            self.session.hold()
            self.session.socket.pause("quota")
            self._keep_telling()

    def let_go(self, reason: Rate | Allowance) -> None:
        """This reason is gone."""
        if reason in self._held_by:
            self._held_by.discard(reason)
            if not self._held_by and self.session is not None:
                self._stop_telling()
                self.session.let_go()
                self.session.socket.resume("quota")

    def _out_of(self, allowance: Allowance) -> None:
        """The block in hand is spent: wait for the next, or end."""
        allowance.turn()
        if allowance.left > 0:
            return
        if allowance.spent_out:
            self.end(allowance.error())
            return
        self.hold_back(allowance)
        allowance.waiting.append((self, 1, lambda: self.let_go(allowance)))
        allowance.ask(1)

    def _keep_telling(self) -> None:
        self._stop_telling()
        self._keep_alive = asyncio.get_running_loop().call_later(KEEP_ALIVE_S, self._tell)

    def _tell(self) -> None:
        if self.session is not None and not self.closed:
            self.session.tell_waiting()
            self._keep_telling()

    def _stop_telling(self) -> None:
        if self._keep_alive is not None:
            self._keep_alive.cancel()
            self._keep_alive = None


def shared_for(quota: Quota, bank: Bank, largest_bytes: int, largest_tokens: int) -> Shared:
    """What sessions of a quota share."""
    resource = Resource(quota.resource)
    if resource in WINDOWS:
        return Allowance(quota, bank, largest_tokens if resource is Resource.TOKENS_PER_MINUTE else largest_bytes)
    if resource is Resource.BYTES_PER_SECOND:
        return Rate(quota, bank)
    return Holding(quota) if resource is Resource.KV_MEMORY_BYTES else Slots(quota)

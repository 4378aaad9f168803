"""A session's account on its backbone: the data plane's `Meter`. All of it is memory, and on the event loop.

`admit` and `spend` are on a token's path: a few additions, no call to anything outside. What is spent is taken from
what the sessions of a quota share (`shared.py`) with each pass, and within one as soon as it is more than a crumb.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from privatelora.cloud.session import Session
from privatelora.platform.shared import Allowance, Holding, Rate, Shared
from privatelora.platform.tables import Resource, utc_now
from privatelora.protocol.errors import ConfigurationError, PrivateLoraError

if TYPE_CHECKING:
    from privatelora.platform.keys import Caller

CRUMBS = 64  # of a block: what one session may have spent and not settled
CRUMB_BYTES = 64 << 10
KEEP_ALIVE_S = 15.0  # a device that is held back hears of it so often, and does not take it for silence

_SPENT_BY = {Resource.BYTES_UP_PER_DAY: 0, Resource.BYTES_DOWN_PER_DAY: 1}


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
        self._admit(tokens, go_on)

    def _admit(self, tokens: int, go_on: Callable[[], None]) -> None:
        short, amount = self._short(tokens)
        if short is not None:
            if amount > short.limit:
                raise ConfigurationError(
                    f"a pass of {amount} tokens is over the {short.quota.level}'s quota of {short.limit} "
                    f"{short.quota.resource}; use smaller batches or shorter texts"
                )
            if short.spent_out:
                raise short.error()
            short.waiting.append((self, amount, lambda: self._try_again(tokens, go_on)))
            short.ask(amount)
            return
        self.tokens += tokens
        for allowance in self._tokens:
            allowance.spend(tokens)
        go_on()

    def _short(self, tokens: int) -> tuple[Allowance | None, int]:
        """The first allowance that has not enough in hand for so many tokens, and how much that would be."""
        for allowance in self._tokens:
            if not allowance.enough(tokens):
                return allowance, tokens
        for allowance, _ in self._bytes:
            if not allowance.enough(1):
                return allowance, 1
        return None, 0

    def _try_again(self, tokens: int, go_on: Callable[[], None]) -> None:
        try:
            self._admit(tokens, go_on)
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

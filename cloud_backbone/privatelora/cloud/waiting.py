"""A line of those for whom there is no room yet: bounded, first come first served, each told its place.

`DataPlane` keeps one line of devices that wait for a session, and `Memory` one of passes that wait for memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from privatelora.protocol.errors import AdmissionError, PrivateLoraError

RETRY_S = 5.0  # after which one who found the line full may ask again


@dataclass(eq=False)
class Waiter:
    """One in a line.

    Parameters
    ----------
    fits : whether there is room for it now.
    enter : takes the room.
    refuse : is told why there will be none.
    tell : is told its place (1 is next), and how many wait.
    nbytes : that it waits for, where it waits for memory.
    told_at : when it was told its place, in seconds of `time.perf_counter`.
    """

    fits: Callable[[], bool]
    enter: Callable[[], None]
    refuse: Callable[[PrivateLoraError], None]
    tell: Callable[[int, int], None]
    nbytes: int = 0
    told_at: float = 0.0


class Line:
    """Whoever is first goes first, also where one further back would fit.

    Parameters
    ----------
    what : what is waited for, as a refusal names it.
    room : how many may wait.
    """

    def __init__(self, what: str, room: int) -> None:
        self.what, self.room = what, room
        self._waiters: list[Waiter] = []

    def __len__(self) -> int:
        return len(self._waiters)

    def join(self, waiter: Waiter) -> None:
        """Wait at the end; raises `AdmissionError` with a retry time where the line is full."""
        if len(self._waiters) >= self.room:
            raise AdmissionError(
                f"there is no room for {self.what}, and {self.room} wait already; try again later",
                retry_after_s=RETRY_S,
            )
        self._waiters.append(waiter)
        self._tell(waiter, len(self._waiters))

    def leave(self, *waiters: Waiter) -> None:
        """Those that no longer wait; they need not be in the line. Who stood behind them may fit."""
        before = len(self._waiters)
        self._waiters = [waiter for waiter in self._waiters if waiter not in waiters]
        if len(self._waiters) < before:
            self.advance()
            self.remind()

    def advance(self) -> None:
        """Let in who fits, from the front."""
        before = len(self._waiters)
        while self._waiters and self._waiters[0].fits():
            self._waiters.pop(0).enter()
        if len(self._waiters) < before:
            self.remind()

    def dismiss(self, error: PrivateLoraError) -> None:
        """Send everybody away."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.refuse(error)

    def first_bytes(self) -> int:
        """What the first waits for; 0 if nobody waits."""
        return self._waiters[0].nbytes if self._waiters else 0

    def remind(self, after_s: float = 0.0) -> None:
        """Tell the place again to those who were told nothing for so long, before a device takes it for silence."""
        now = time.perf_counter()
        for place, waiter in enumerate(list(self._waiters), 1):
            if now - waiter.told_at >= after_s:
                self._tell(waiter, place)

    def _tell(self, waiter: Waiter, place: int) -> None:
        waiter.told_at = time.perf_counter()
        waiter.tell(place, len(self._waiters))

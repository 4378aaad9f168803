"""Where units of work run: long ones on the compute thread, short ones where they are.

The endpoint submits work (a segment of some session's pass) and awaits its outcome. A unit of many rows goes to the one
compute thread, in order of arrival, and the sockets stay responsive meanwhile, since torch releases the interpreter
lock inside its kernels. A unit of a few rows, a token being decoded, takes less time than two thread switches are
worth, so it runs on the loop at once; that also keeps a chat from waiting behind somebody's training step.

`Waker` is for the moments between two such units: an event loop that went to sleep needs longer to wake than a device
on the same machine or network needs to answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

SHORT_ROWS = 8
"""Rows up to which a unit is short. On two cores a decoded token took 28 ms from a service of one thread and 33 from
one of two: the second needs the core of the sockets and the device."""


class Engine:
    """The compute of one process; `close` waits for the unit that is running."""

    def __init__(self, torch_threads: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        self._pool.submit(_use_threads, torch_threads or torch.get_num_threads()).result()
        _use_threads(1)  # the loop's own, after the pool has taken its number
        self._long = 0

    @staticmethod
    def is_short(rows: int) -> bool:
        """Whether a unit over `rows` rows of hidden states runs at once, on the loop."""
        return rows <= SHORT_ROWS

    @property
    def busy(self) -> bool:
        """Whether a long unit runs or waits."""
        return self._long > 0

    async def run(self, work: Callable[[], Result], rows: int) -> Result:
        """Run `work`, a unit over `rows` rows."""
        if self.is_short(rows):
            return work()
        self._long += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._long -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _use_threads(count: int) -> None:
    """Set how many threads torch uses in work of the calling thread."""
    torch.set_num_threads(count)
    torch.get_num_threads()  # a thread takes the setting at its first use of it, so later settings are not its own


class Waker:
    """Keeps the event loop from going to sleep while an answer is expected at any moment.

    Parameters
    ----------
    window_s : for how long to go without sleep after `expect`; 0 never does. Sessions share one window.
    busy : whether the cores have other work; then the loop sleeps.
    """

    def __init__(self, window_s: float, busy: Callable[[], bool] = lambda: False) -> None:
        self.window_s, self._busy = window_s, busy
        self._until = 0.0
        self._turning = False

    def expect(self) -> None:
        """An answer is due that should come within the window."""
        self._until = time.perf_counter() + self.window_s
        if not self._turning:
            self._turn()

    def _turn(self) -> None:
        self._turning = time.perf_counter() < self._until and not self._busy()
        if self._turning:  # a callback that is due at once lets the loop look at its sockets, but not wait for them
            asyncio.get_running_loop().call_soon(self._turn)

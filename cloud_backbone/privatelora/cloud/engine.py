"""Where units of work run: long ones on the compute thread, short ones where they are.

The endpoint submits work (a segment of some session's pass) and awaits its outcome. A unit of many rows goes to the one
compute thread, in order of arrival, and the sockets stay responsive meanwhile, since torch releases the interpreter
lock inside its kernels. A unit of a few rows, a token being decoded, takes less time than two thread switches are
worth, so it runs on the loop at once; that also keeps a chat from waiting behind somebody's training step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

SHORT_ROWS = 8
"""Rows up to which a unit is short. On two cores, with other work running, a decoded token took 38 ms from a service of
one thread and 43 from one of two: the second spins on the core that the sockets and the device need."""


class Engine:
    """The compute of one process; `close` waits for the unit that is running."""

    def __init__(self, torch_threads: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        self._pool.submit(_use_threads, torch_threads or torch.get_num_threads()).result()
        _use_threads(1)  # the loop's own, after the pool has taken its number

    @staticmethod
    def is_short(rows: int) -> bool:
        """Whether a unit over `rows` rows of hidden states runs at once, on the loop."""
        return rows <= SHORT_ROWS

    async def run(self, work: Callable[[], Result], rows: int) -> Result:
        """Run `work`, a unit over `rows` rows."""
        if self.is_short(rows):
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _use_threads(count: int) -> None:
    """Set how many threads torch uses in work of the calling thread."""
    torch.set_num_threads(count)
    torch.get_num_threads()  # a thread takes the setting at its first use of it, so later settings are not its own

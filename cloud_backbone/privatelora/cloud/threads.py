"""Threads that compute, each for as long as it has something to do.

libgomp, which torch's CPU build runs on, counts the threads of all of a process's teams; while there are more than
cores, the idle ones of every team sleep at once instead of looking for work for a moment, and an operator of a layer
that has to wake one takes twice as long. So a thread that has had nothing to do for `IDLE_S` ends, and its team with
it; the next unit of work starts another within 0.1 ms.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

IDLE_S = 0.2

_SETTING = threading.Lock()


def use_threads(count: int) -> None:
    """Set how many threads torch uses in work of the calling thread."""
    with _SETTING:
        torch.set_num_threads(count)
        torch.get_num_threads()  # a thread takes the setting at its first use of it, so later settings are not its own


class LaneThread:
    """One thread, which comes and goes; every method is called on the event loop."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._executor: ThreadPoolExecutor | None = None
        self._tasks = 0
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, torch_threads: int, function: Callable[..., T], *arguments: object) -> Future[T]:
        """Have it call the function with so many torch threads, once it has done what it was given before."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        self._tasks += 1
        return self._executor.submit(_with_threads, torch_threads, function, *arguments)

    def done(self) -> None:
        """One of the functions has returned."""
        self._tasks -= 1
        if not self._tasks:
            self._timer = asyncio.get_running_loop().call_later(IDLE_S, self.close, False)

    def close(self, wait: bool = True) -> None:
        """End it, once it has done what it does."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=wait, cancel_futures=True)


def _with_threads(torch_threads: int, function: Callable[..., T], *arguments: object) -> T:
    use_threads(torch_threads)
    return function(*arguments)

"""Threads that compute, each for as long as it has something to do, and an event loop that stays awake between them.

libgomp, which torch's CPU build runs on, counts the threads of all of a process's teams; while there are more than
cores, the idle ones of every team sleep at once instead of looking for work for a moment, and an operator of a layer
that has to wake one takes twice as long. So a thread that has had nothing to do for `IDLE_S` ends, and its team with
it; the next unit of work starts another within 0.1 ms. The event loop's own team goes with `end_team`.

`Waker` is for the moments between two units: an event loop that went to sleep needs longer to wake than a device on the
same machine or network needs to answer.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import torch

T = TypeVar("T")

IDLE_S = 0.2
SOFT_PAUSE = 1  # omp_pause_soft: settings are kept

_SETTING = threading.Lock()


def use_threads(count: int) -> None:
    """Set how many threads torch uses in work of the calling thread."""
    with _SETTING:
        torch.set_num_threads(count)
        torch.get_num_threads()  # a thread takes the setting at its first use of it, so later settings are not its own


def end_team() -> None:
    """End the OpenMP threads that work for the calling thread; when it next uses several, new ones start."""
    with suppress(AttributeError, TypeError):  # there is no OpenMP, or it cannot be asked
        openmp = ctypes.CDLL(None)  # torch has loaded it for all
        openmp.omp_pause_resource(SOFT_PAUSE, openmp.omp_get_initial_device())


class LaneThread:
    """One thread, which comes and goes; every method is called on the event loop."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._executor: ThreadPoolExecutor | None = None
        self._tasks = 0
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, torch_threads: int, function: Callable[..., T], *arguments: object) -> Future[T]:
        """Have it call the function with so many torch threads, once it has done what it was given before.

        Raises RuntimeError if no thread can be started.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        try:
            future = self._executor.submit(_with_threads, torch_threads, function, *arguments)
        except RuntimeError:  # no thread could be started, and this one may not do it later
            self._executor = None
            raise
        self._tasks += 1
        return future

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
            executor.shutdown(wait=wait)


def _with_threads(torch_threads: int, function: Callable[..., T], *arguments: object) -> T:
    use_threads(torch_threads)
    return function(*arguments)


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

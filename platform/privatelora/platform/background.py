"""Calls to the database and to Valkey from an event loop: in threads, and with an answer for when either is away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import structlog
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from privatelora.protocol.errors import AdmissionError, PrivateLoraError

log = structlog.get_logger("privatelora.platform")

Result = TypeVar("Result")
AWAY = (SQLAlchemyError, RedisError)
AWAY_S = 2.0  # after which a device may ask again that came while the database or Valkey was away
ANSWER_S = 8.0  # that someone waits for an answer
THREADS = 4  # for the database, and as many for Valkey


class Background:
    """The threads and tasks of one owner, which closes it.

    Valkey has threads of its own, so that a database that hangs does not hold up leases and slots.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "privatelora-database")
        self._valkey_threads = ThreadPoolExecutor(THREADS, "privatelora-valkey")
        self._tasks: set[asyncio.Task[None]] = set()

    async def call(self, work: Callable[[], Result]) -> Result:
        """`work` on the database, in a thread; raises what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def ask_valkey(self, work: Callable[[], Result]) -> Result:
        """`work` on Valkey, in a thread; raises what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._valkey_threads, work)

    async def answer(self, work: Callable[[], Result], timeout_s: float | None = ANSWER_S) -> Result:
        """What someone waits for; raises `AdmissionError` where the database is away, or hangs for so long.

        A write is given no time: what becomes of it must be known (`database.HANGS_MS` bounds it).
        """
        return await _answered(self.call(work), timeout_s)

    async def answer_of_valkey(self, work: Callable[[], Result]) -> Result:
        """The same of Valkey."""
        return await _answered(self.ask_valkey(work), ANSWER_S)

    async def attempt(self, work: Callable[[], object]) -> None:
        """What may be lost where the database is away."""
        await _attempted(self.call(work))

    async def attempt_valkey(self, work: Callable[[], object]) -> None:
        """The same of Valkey."""
        await _attempted(self.ask_valkey(work))

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin a task that nobody waits for before `close`."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)

    async def settle(self) -> None:
        """Wait for every task that was begun."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()
        self._valkey_threads.shutdown()

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the control plane failed", exc_info=error)


async def _answered(work: Awaitable[Result], timeout_s: float | None) -> Result:
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except (*AWAY, TimeoutError) as error:
        log.warning("control plane not reached", reason=type(error).__name__)
        raise AdmissionError(
            "the service cannot reach its database or its counters now; try again", retry_after_s=AWAY_S
        ) from None


async def _attempted(work: Awaitable[object]) -> None:
    try:
        await work
    except AWAY as error:
        log.warning("control plane not told", reason=type(error).__name__)


async def every(seconds: float, work: Callable[[], Awaitable[None]], failed: str) -> None:
    """Do this again and again; where the database or Valkey is away, try the next time."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except (*AWAY, PrivateLoraError) as error:
            log.warning(failed, reason=type(error).__name__)

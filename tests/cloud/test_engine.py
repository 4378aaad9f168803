"""The event loop stays awake for a device that answers at once, for as long as it was told and no longer."""

from __future__ import annotations

import asyncio
import selectors
import time

from privatelora.cloud.engine import Waker


class Watched(selectors.SelectSelector):
    """A selector that remembers for how long the loop was ready to sleep, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[float, float]] = []  # time.perf_counter, timeout in seconds

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.waits.append((time.perf_counter(), timeout if timeout is not None else float("inf")))
        return super().select(timeout)


def test_the_loop_does_not_sleep_within_the_window_and_does_after_it() -> None:
    slept = sleeps_of(Waker(0.05))
    assert slept
    assert min(at for at, _ in slept) >= 0.05  # and then the loop sleeps until the end, in one go
    assert sum(wait for _, wait in slept) > 0.1


def test_without_a_window_the_loop_sleeps_at_once() -> None:
    assert min(at for at, _ in sleeps_of(Waker(0.0))) < 0.05


def sleeps_of(waker: Waker) -> list[tuple[float, float]]:
    """When, in seconds after `expect`, and for how long the loop slept within the next 0.2 s."""
    selector = Watched()

    async def wait() -> float:
        started = time.perf_counter()
        waker.expect()
        await asyncio.sleep(0.2)
        return started

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        started = runner.run(wait())
    return [(at - started, wait) for at, wait in selector.waits if wait > 0 and 0 <= at - started < 0.2]

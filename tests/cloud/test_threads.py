"""Threads of the service are there while they have work, and its loop is awake while an answer is due, not longer."""

from __future__ import annotations

import asyncio
import selectors
import threading
import time
from pathlib import Path

import pytest
import torch

from privatelora.cloud import threads
from privatelora.cloud.threads import LaneThread, Waker


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


def test_a_thread_ends_when_it_has_nothing_to_do_and_another_takes_the_next_work() -> None:
    async def work() -> None:
        thread = LaneThread("lane")

        def doing(seconds: float) -> tuple[int, int]:
            time.sleep(seconds)
            return threading.get_ident(), torch.get_num_threads()

        def lanes() -> int:
            return sum(thread.name.startswith("lane") for thread in threading.enumerate())

        before = lanes()
        first, second = (thread.submit(count, doing, 0.02) for count in (3, 2))
        assert [(await asyncio.wrap_future(one))[1] for one in (first, second)] == [3, 2]
        assert first.result()[0] == second.result()[0]  # one thread, one after the other
        thread.done()
        await asyncio.sleep(1.5 * threads.IDLE_S)
        assert lanes() == before + 1  # the second has not been told to be done
        third = thread.submit(1, doing, 2 * threads.IDLE_S)  # longer than a thread without work may live
        thread.done()
        assert (await asyncio.wrap_future(third))[1] == 1
        thread.done()
        await asyncio.sleep(1.5 * threads.IDLE_S)
        assert lanes() == before
        assert (await asyncio.wrap_future(thread.submit(2, doing, 0.0)))[1] == 2
        thread.close()
        assert lanes() == before

    count = torch.get_num_threads()
    try:
        asyncio.run(work())
    finally:
        torch.set_num_threads(count)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux lists a process's threads")
def test_a_team_ends_when_it_is_told_and_comes_back_with_the_next_work() -> None:
    count = torch.get_num_threads()
    product = torch.ones(256, 256)

    def tasks() -> set[str]:
        return {task.name for task in Path("/proc/self/task").iterdir()}

    try:
        torch.set_num_threads(2)
        product @ product + product
        with_team = tasks()
        threads.end_team()
        deadline = time.monotonic() + 5
        while len(tasks() & with_team) == len(with_team) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(tasks()) < len(with_team)
        assert torch.get_num_threads() == 2
        product @ product + product
        assert len(tasks() - with_team) >= 1
    finally:
        torch.set_num_threads(count)

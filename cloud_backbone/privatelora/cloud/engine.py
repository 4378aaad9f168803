"""The compute thread: runs units of work one at a time, away from the event loop.

The endpoint submits work (a segment of some session's pass) and gets its outcome back on the loop. Work runs in order
of arrival; the sockets stay responsive meanwhile, since torch releases the interpreter lock inside its kernels.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Engine:
    """One thread that owns all matmuls of a process; `close` waits for the unit that is running."""

    def __init__(self, torch_threads: int | None = None) -> None:
        if torch_threads is not None:
            torch.set_num_threads(torch_threads)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")

    def run(self, work: Callable[[], Result]) -> asyncio.Future[Result]:
        """Queue `work`; the future belongs to the running loop."""
        return asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

"""Child processes that do a function of the test, to be killed at any time: forks, so that they start at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess


def child_of(work: Callable[[], object]) -> BaseProcess:
    """A started child process that does `work`."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


def exit_code_of(work: Callable[[], object]) -> int | None:
    """How a child that does `work` ended; minus the signal's number if one ended it."""
    child = child_of(work)
    child.join()
    return child.exitcode

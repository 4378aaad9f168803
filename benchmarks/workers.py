"""Complete devices in processes of their own, from the side of whoever tells them what to do.

    with hired(address, 8, cache_dir=...) as workers:      each is connected
        workers[0].train(steps=2)                          tell one to begin
        workers[0].wait()                                  and wait until it is done: `Work`

A process is `worker.py`, which answers each errand in one line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ENVIRONMENT
from benchmarks.fleet import failure, stop
from benchmarks.rows import ROOT, Unmeasured
from benchmarks.workbench import Address

SEQUENCES = 4  # of a training step


@dataclass(frozen=True)
class Work:
    """What a device did: begin and end of each step or token, and how many tokens went through the model."""

    times: Sequence[tuple[float, float]]
    tokens: int

    @property
    def seconds(self) -> float:
        """From its begin to its end."""
        return self.times[-1][1] - self.times[0][0]


class Worker:
    """One device's process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def train(self, steps: int = 0, sequences: int = SEQUENCES) -> None:
        """Let it take so many steps; with 0 it goes on until `enough`."""
        self._tell({"do": "train", "steps": steps, "sequences": sequences})

    def enough(self) -> None:
        """Let it stop after the step that it is at."""
        self._tell({"do": "nothing"})

    def chat(self, tokens: int) -> None:
        self._tell({"do": "chat", "tokens": tokens})

    def wait(self) -> Work:
        """Wait until it has done what it was told."""
        answer = self.answer()
        return Work([(begun, done) for begun, done in answer["done"]], answer["tokens"])

    def answer(self) -> dict[str, list[tuple[float, float]]]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Unmeasured(failure(self._process))
        return json.loads(line)

    def _tell(self, errand: dict[str, object]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(errand) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Unmeasured(failure(self._process)) from None


@contextmanager
def hired(address: Address, count: int, *, cache_dir: Path) -> Iterator[list[Worker]]:
    """So many devices, connected; whatever still runs at the end is killed."""
    processes: list[subprocess.Popen[str]] = []
    pipe = subprocess.PIPE
    options = ["--url", address.url, "--token", address.token, "--cache-dir", str(cache_dir)]
    try:
        for number in range(count):
            command = [sys.executable, "-m", "benchmarks.worker", *options, "--seed", str(number)]
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
            )
        workers = [Worker(process) for process in processes]
        for worker in workers:
            worker.answer()  # it is ready
        yield workers
    finally:
        for process in processes:
            stop(process)


def at_once(workers: Sequence[Worker], steps: int) -> float:
    """Tokens/s of all while each takes `steps` training steps, from the first one's begin to the last one's end."""
    for worker in workers:
        worker.train(steps)
    return rate([worker.wait() for worker in workers])


def rate(works: Sequence[Work]) -> float:
    """Tokens/s of works that were done side by side."""
    begun, done = min(work.times[0][0] for work in works), max(work.times[-1][1] for work in works)
    return sum(work.tokens for work in works) / (done - begun)

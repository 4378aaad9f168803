"""Fleets of devices in processes of their own, started and held together, and what their tokens' times say.

    with running(address, 32, "paper", tokens=45) as fleet:      every device has prefilled its prompt
        decoded = fleet.decode()                                 all decode at once; `Decoded`
        fleet.begin() ... fleet.end()                            the same in two halves, beside something else

A process is `loadgen.py`, many cheap devices, or `whole.py`, complete `DeviceSession`s: both print a line when they are
ready, begin at a line on stdin, end early at another, and print one JSON object. Their clocks are the machine's.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ENVIRONMENT
from benchmarks.rows import ROOT, Unmeasured
from benchmarks.workbench import STOP_S, Address

LOADGEN = ("-m", "benchmarks.loadgen")
WHOLE = ("-m", "benchmarks.whole")
WARMUP_TOKENS = 5  # of each device, before any counts

Times = list[tuple[float, float]]
"""(begun, done) of each token of a device, in seconds"""


@dataclass(frozen=True)
class Decoded:
    """What a fleet did; figures are of the span in which every device was decoding and warm."""

    devices: Sequence[Times]
    warmup: int
    exchanges: int
    cpu_s: float
    bytes_up: int
    bytes_down: int
    compiled_exchanges: int  # that the load generator's compiled code answered

    @classmethod
    def of(cls, reports: Sequence[dict[str, Any]]) -> Decoded:
        """From what the processes printed."""
        return cls(
            [[(begun, done) for begun, done in device["times"]] for report in reports for device in report["devices"]],
            reports[0]["warmup_tokens"],
            sum(report["exchanges"] for report in reports),
            sum(report["cpu_user_s"] + report["cpu_system_s"] for report in reports),
            sum(report["bytes_up"] for report in reports),
            sum(report["bytes_down"] for report in reports),
            sum(report.get("compiled_exchanges", 0) for report in reports),
        )

    @cached_property
    def span(self) -> tuple[float, float]:
        """From when the last device was warm to when the first one finished."""
        if min(len(times) for times in self.devices) <= self.warmup:
            raise Unmeasured(f"a device decoded no more than its {self.warmup} tokens of warm-up; give it more time")
        begin = max(times[self.warmup - 1][1] if self.warmup else times[0][0] for times in self.devices)
        end = min(times[-1][1] for times in self.devices)
        if end <= begin:
            raise Unmeasured("a device finished before another had begun; let each decode more tokens")
        return begin, end

    @cached_property
    def rates(self) -> list[float]:
        """Tokens/s of each device over the span; a token that was under way at an end counts for its part."""
        begin, end = self.span
        rates = []
        for times in self.devices:
            at = [times[0][0], *(done for _, done in times)]  # k tokens were done at at[k]
            rates.append(float(np.diff(np.interp([begin, end], at, range(len(at))))[0]) / (end - begin))
        return rates

    @property
    def tokens_per_s(self) -> float:
        """Of all devices together."""
        return sum(self.rates)

    @property
    def step_s(self) -> float:
        """Seconds in which every device gets a token."""
        return len(self.devices) / self.tokens_per_s

    @property
    def fairness(self) -> float:
        """The median device's rate over the slowest one's."""
        return statistics.median(self.rates) / min(self.rates)

    @cached_property
    def token_s(self) -> list[float]:
        """Seconds of each token that was done within the span, ascending."""
        begin, end = self.span
        return sorted(done - begun for times in self.devices for begun, done in times if begin < done <= end)

    def percentile_s(self, percent: float) -> float:
        """Seconds of a token at a percentile."""
        return float(np.percentile(self.token_s, percent))

    @property
    def cpu_us_per_exchange(self) -> float:
        """CPU time of the fleet's own processes."""
        return 1e6 * self.cpu_s / self.exchanges


class Fleet:
    """Processes whose devices are ready to decode."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def decode(self) -> Decoded:
        """Let every device decode all its tokens."""
        self.begin()
        return self._collect()

    def begin(self) -> None:
        """Let every device decode from now on."""
        self._tell("begin")

    def end(self) -> Decoded:
        """Stop the devices, and take what they did until now."""
        self._tell("end")
        return self._collect()

    def ready(self) -> None:
        """Wait until every device has prefilled its prompt."""
        for process in self._processes:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise Unmeasured(failure(process))

    def _tell(self, word: str) -> None:
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.write(word + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                raise Unmeasured(failure(process)) from None

    def _collect(self) -> Decoded:
        reports = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise Unmeasured(failure(process))
            reports.append(json.loads(line))
        return Decoded.of(reports)


@contextmanager
def running(
    address: Address,
    devices: int,
    placement: str,
    tokens: int,
    *,
    warmup_tokens: int = WARMUP_TOKENS,
    tokens_per_second: float = 0.0,
    processes: int = 1,
    program: Sequence[str] = LOADGEN,
    cache_dir: Path,
    seed: int = 0,
) -> Iterator[Fleet]:
    """A fleet of `devices` in `processes` that has prefilled; whatever still runs at the end is killed.

    `tokens` are those of each device after `warmup_tokens`.
    """
    started: list[subprocess.Popen[str]] = []
    try:
        for number in range(processes):
            share = devices // processes + (number < devices % processes)
            options = {
                "url": address.url, "token": address.token, "devices": share, "placement": placement, "tokens": tokens,
                "warmup-tokens": warmup_tokens, "tokens-per-second": tokens_per_second, "cache-dir": cache_dir,
                "seed": seed * processes + number,
            }  # fmt: skip
            command = [sys.executable, *program, "--gate"]
            for name, value in options.items():
                command += [f"--{name}", str(value)]
            pipe = subprocess.PIPE
            started.append(
                subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
            )
        fleet = Fleet(started)
        fleet.ready()
        yield fleet
    finally:
        for process in started:
            stop(process)


def stop(process: subprocess.Popen[str]) -> None:
    """A process that has printed its figures ends by itself; one that has not is killed."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    with suppress(BrokenPipeError):  # it has ended already
        process.stdin.close()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
    process.stderr.close()


def failure(process: subprocess.Popen[str]) -> str:
    """Why a process ended before its time."""
    assert process.stderr is not None
    said = process.stderr.read().strip()
    return f"a process of devices ended: {said[-1000:] or f'exit status {process.wait()}'}"

"""Processes that run together: each is started again when it dies, and all of them end with this one.

    Part -> Supervisor.start -> a child in a process group of its own, its lines on their way to `show`
    Supervisor.stop          -> SIGTERM in the order that was asked for, SIGKILL for what has not ended by then

A child that was started with a secret gets it in its environment or on its stdin, never as an argument. The kernel ends
every child when this process is killed (PR_SET_PDEATHSIG), so that nothing is left behind even then.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from privatelora.protocol.errors import ConfigurationError, ServiceError

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.2, 5.0  # before a part that has died is started again, doubling
DEATHS, WITHIN_S = 6, 60.0  # a part that dies so often in that time is given up
REFUSED = 2  # status with which our commands end for an error that a person has to mend
LINE_BYTES = 1 << 20  # of output; a longer line is cut
LAST_WORDS_S = 2.0  # for the rest of a dead child's output

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None

Show = Callable[[str, str], None]


@dataclass(frozen=True)
class Part:
    """One process that is to run.

    Parameters
    ----------
    announces : its stdout is one JSON line that it prints when it is ready; otherwise stdout is output like stderr.
    stdin : what it reads, such as a configuration with a secret.
    keeps : file descriptors that it inherits.
    grace_s : from SIGTERM to SIGKILL.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    announces: bool = True
    stdin: bytes = b""
    keeps: tuple[int, ...] = ()
    grace_s: float = 5.0


class Supervisor:
    """The parts that run; `show` is told each line of theirs, with the part's name.

    `failed` is called once, when a part has been given up, and says why.
    """

    def __init__(self, show: Show, failed: Callable[[ServiceError | ConfigurationError], None]) -> None:
        self._show, self._failed = show, failed
        self._children: dict[str, _Child] = {}

    async def start(self, part: Part) -> None:
        """Start a part and keep it running."""
        child = self._children[part.name] = _Child(part, self._show)
        await child.begin()
        child.keeper = asyncio.create_task(child.keep(), name=part.name)
        child.keeper.add_done_callback(self._ended)

    async def announced(self, name: str) -> dict[str, Any]:
        """What a part said when it was first ready."""
        return await asyncio.shield(self._children[name].announced)

    async def stop(self, order: Iterable[Sequence[str]], within_s: float) -> None:
        """End all parts: the groups of `order` one after another, those of a group together."""
        deadline = asyncio.get_running_loop().time() + within_s
        for group in order:
            there = [self._children[name] for name in group if name in self._children]
            await asyncio.gather(*(child.stop(deadline) for child in there))

    def kill(self) -> None:
        """End all parts at once."""
        for child in self._children.values():
            child.stopping = True
            child.signal_group(signal.SIGKILL)

    def _ended(self, keeper: asyncio.Task[None]) -> None:
        if keeper.cancelled():
            return
        error = keeper.exception()
        if isinstance(error, ServiceError | ConfigurationError):
            self._failed(error)
        elif error is not None:
            self._failed(ServiceError(f"{keeper.get_name()} cannot be run ({error})"))


class _Child:
    """A part's process, and after it has died the next one."""

    def __init__(self, part: Part, show: Show) -> None:
        self.part, self._show = part, show
        self.stopping = False
        self.announced: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.keeper: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._last_line = ""
        self._deaths: deque[float] = deque(maxlen=DEATHS)

    async def begin(self) -> None:
        part, parent = self.part, os.getpid()
        process = self._process = await asyncio.create_subprocess_exec(
            *part.command,
            stdin=asyncio.subprocess.PIPE if part.stdin else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=dict(part.environment),
            pass_fds=part.keeps,
            process_group=0,  # Ctrl-C on a terminal reaches the supervisor only
            preexec_fn=lambda: _end_with(parent),
            limit=LINE_BYTES,
        )
        self._readers = [
            asyncio.create_task(self._read(process.stderr, self._said)),
            asyncio.create_task(self._read(process.stdout, self._announce if part.announces else self._said)),
        ]
        if process.stdin is not None:
            with suppress(ConnectionError):  # it ended at once; `keep` says so
                process.stdin.write(part.stdin)
                await process.stdin.drain()
            process.stdin.close()

    async def keep(self) -> None:
        """Start the part again whenever it ends; raises what ended it for good."""
        loop = asyncio.get_running_loop()
        backoff_s = FIRST_BACKOFF_S
        while True:
            began = loop.time()
            status = await self._end()
            if self.stopping:
                return
            now, how = loop.time(), _how(status)
            if status == REFUSED and not self.announced.done():
                raise ConfigurationError(self._last_line.removeprefix("error: ") or f"{self.part.name} ended ({how})")
            self._deaths.append(now)
            if len(self._deaths) == DEATHS and now - self._deaths[0] < WITHIN_S:
                raise ServiceError(
                    f"{self.part.name} has ended {DEATHS} times in {now - self._deaths[0]:.0f} s, at last {how}; its "
                    f"last line was: {self._last_line or '(none)'}"
                )
            if now - began > WITHIN_S:
                backoff_s = FIRST_BACKOFF_S
            self._show(self.part.name, f"ended ({how}); it is started again in {backoff_s:.1f} s")
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
            await self.begin()

    async def stop(self, deadline: float) -> None:
        self.stopping = True
        process, keeper = self._process, self.keeper
        if process is None or keeper is None:
            return
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.terminate()
            left_s = max(0.5, min(self.part.grace_s, deadline - asyncio.get_running_loop().time()))
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), left_s)
            if process.returncode is None:
                self._show(self.part.name, f"did not end within {left_s:.1f} s; it is killed")
            self.signal_group(signal.SIGKILL)  # and whatever it started
            await asyncio.wait([keeper])
        keeper.cancel()  # it may be waiting to start the next one
        await asyncio.gather(keeper, return_exceptions=True)

    def signal_group(self, number: signal.Signals) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    async def _end(self) -> int:
        """Wait for the process's end; nothing of its group is left after it, and all that it said has been shown."""
        process = self._process
        if process is None:
            raise ServiceError(f"{self.part.name} was not started")
        status = await process.wait()
        self.signal_group(signal.SIGKILL)
        await asyncio.wait(self._readers, timeout=LAST_WORDS_S)
        for reader in self._readers:
            reader.cancel()
        return status

    async def _read(self, stream: asyncio.StreamReader | None, tell: Callable[[str], None]) -> None:
        while stream is not None:
            try:
                line = await stream.readline()
            except ValueError:
                tell(f"(a line of more than {LINE_BYTES} bytes)")
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            if text:
                tell(text)

    def _said(self, line: str) -> None:
        self._last_line = line
        self._show(self.part.name, line)

    def _announce(self, line: str) -> None:
        try:
            told = json.loads(line)
        except ValueError:
            self._said(line)
            return
        if not self.announced.done():
            self.announced.set_result(told)


def _end_with(parent: int) -> None:
    """In a new child: have the kernel end it with `parent`."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed in between
            os._exit(1)


def _how(status: int) -> str:
    return f"status {status}" if status >= 0 else f"by signal {-status}"

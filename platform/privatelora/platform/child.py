"""A service as a child process: `running_service` starts one on a free loopback port and always stops it again.

The child is `python -m privatelora.platform backbone --json`: its stdout says where it listens, its stderr what it is
doing and, if it fails, why.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from privatelora.protocol.errors import ServiceError

GRACE_S = 10.0  # for a clean stop; uvicorn waits 5 s for open connections
POLL_S = 0.2

# Settings of some other service of this machine, which a private one on loopback must not take over.
NOT_INHERITED = [
    f"PRIVATELORA_{name}"
    for name in (
        *("CERTFILE", "KEYFILE", "PLACEMENTS", "DEFAULT_PLACEMENT", "LOG_FORMAT"),
        *("DATABASE_URL", "VALKEY_URL", "BROKER_URL", "PUBLIC_URL"),
    )
]


@dataclass(frozen=True)
class ChildService:
    """A service that is ready."""

    url: str
    token: str
    pid: int


@contextmanager
def running_service(options: Sequence[str], progress: Callable[[str], None]) -> Iterator[ChildService]:
    """Run `privatelora backbone` with `options` for the length of the block; `progress` is told what its start does.

    Raises `ServiceError` with the child's own words if it ends before it is ready.
    """
    command = [sys.executable, "-m", "privatelora.platform", "backbone", "--host", "127.0.0.1", "--port", "0", "--json"]
    environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    with tempfile.TemporaryFile() as messages:
        child = subprocess.Popen(
            [*command, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=messages,
            env=environment,
            start_new_session=True,  # a group of its own: Ctrl-C reaches the parent only, which then stops the child
        )
        try:
            announced = json.loads(_first_line(child, messages.fileno(), progress))
            yield ChildService(announced["url"], Path(announced["token_file"]).read_text().strip(), child.pid)
        finally:
            _stop(child)


def _first_line(child: subprocess.Popen[bytes], messages: int, progress: Callable[[str], None]) -> bytes:
    """The child's announcement, once it is ready."""
    assert child.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            ready = selector.select(POLL_S)
            said = _last_line(messages)
            if ready:
                line: bytes = child.stdout.readline()
                if line:
                    return line
                raise ServiceError(
                    f"the service ended before it was ready (status {child.wait()}): {said.removeprefix('error: ')}"
                )
            if said:
                progress(said)


def _last_line(messages: int) -> str:
    """The newest line of the child's stderr, read without moving the position that the child writes at."""
    size = os.fstat(messages).st_size
    tail = os.pread(messages, 4096, max(0, size - 4096)).decode(errors="replace").strip()
    return tail.rsplit("\n", 1)[-1]


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End the child and whatever it started; a second Ctrl-C does not leave it behind."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child.terminate()
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if child.stdout is not None:
            child.stdout.close()
    finally:
        signal.signal(signal.SIGINT, before)

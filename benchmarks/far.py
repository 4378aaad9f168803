"""A network of a longer round trip between devices and a service on one machine: a TCP proxy that delays.

    python -m benchmarks.far --port 8765 --delay-ms 10        prints {"port": n}, where devices connect instead

What comes is read at once and sent on `--delay-ms` later, in either direction, however much is on its way: bandwidth is
not limited, and order is kept. This is what `tc netem delay` does on a link, for machines whose kernel has no netem or
whose user may not use it. One thread on epoll; epoll's own timeout counts in milliseconds, so it is waited for with
`select`, which counts in microseconds. An exchange cost it 75 us of CPU, 32 at once on a machine that was busy.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections import deque
from contextlib import suppress
from typing import Annotated

import typer

RECEIVE_BYTES = 1 << 18
LOOPBACK = "127.0.0.1"


class End:
    """One of the two sockets of a connection; `unsent` is due already, but was not taken."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.other = connected, self
        self.unsent = bytearray()
        self.open = True


class Proxy:
    """Every connection to `listener`, carried on to `port`, `delay_s` late in each direction."""

    def __init__(self, listener: socket.socket, port: int, delay_s: float) -> None:
        self.listener, self.port, self.delay_s = listener, port, delay_s
        self._epoll = select.epoll()
        self._epoll.register(listener, select.EPOLLIN)
        self._ends: dict[int, End] = {}
        self._travelling: deque[tuple[float, End, bytes]] = deque()  # due when, to whom; empty bytes end a connection

    def run(self) -> None:
        """Serve until the process is ended."""
        while True:
            patience = max(0.0, self._travelling[0][0] - time.perf_counter()) if self._travelling else None
            select.select([self._epoll], [], [], patience)
            for fd, event in self._epoll.poll(0):
                if fd == self.listener.fileno():
                    self._accept()
                elif fd in self._ends:
                    if event & select.EPOLLOUT:
                        self._send(self._ends[fd], b"")
                    if event & ~select.EPOLLOUT:
                        self._receive(self._ends[fd])
            now = time.perf_counter()
            while self._travelling and self._travelling[0][0] <= now:
                _, end, data = self._travelling.popleft()
                if data:
                    self._send(end, data)
                else:
                    self._close(end)

    def _accept(self) -> None:
        near = End(self.listener.accept()[0])
        far = End(socket.create_connection((LOOPBACK, self.port)))
        near.other, far.other = far, near
        for end in (near, far):
            self._ends[end.socket.fileno()] = end
            self._epoll.register(end.socket, select.EPOLLIN)

    def _receive(self, end: End) -> None:
        try:
            data = end.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._epoll.unregister(end.socket)
        self._travelling.append((time.perf_counter() + self.delay_s, end.other, data))

    def _send(self, end: End, data: bytes) -> None:
        if not end.open:
            return
        waited = bool(end.unsent)
        if waited:
            data = bytes(end.unsent + data)
        try:
            n = end.socket.send(data)
        except BlockingIOError:
            n = 0
        except OSError:
            return  # it is gone, which reading tells as well
        end.unsent = bytearray(data[n:])
        if waited != bool(end.unsent):
            with suppress(OSError):  # it is read no more
                self._epoll.modify(end.socket, select.EPOLLIN | (select.EPOLLOUT if end.unsent else 0))

    def _close(self, end: End) -> None:
        """The other end was closed before; both are over."""
        for one in (end, end.other):
            if one.open:
                one.open = False
                self._ends.pop(one.socket.fileno())
                one.socket.close()


def main(
    port: Annotated[int, typer.Option(help="Of the service, on this machine.")],
    delay_ms: Annotated[float, typer.Option(min=0, help="In each direction.")] = 10,
) -> None:
    """Stand between devices and a service."""
    with socket.create_server((LOOPBACK, 0), backlog=256) as listener:
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        with suppress(KeyboardInterrupt):
            Proxy(listener, port, delay_ms / 1e3).run()


if __name__ == "__main__":
    typer.run(main)

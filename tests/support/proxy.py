"""A TCP proxy between a device and a service that breaks the connection at an exact message.

    with Proxy(running.port) as proxy:
        me = DeviceSession(proxy.url, ...)
        proxy.cut(nth(3, Kind.GRAD_DELTA))               # the third dL/dv never arrives, and the connection is gone
        proxy.cut(nth(1, Kind.HIDDEN), then=running.kill)
        proxy.before(nth(1, Kind.OPENED), frames)         # the service seems to say these first

HTTP passes untouched. On a data plane connection every WebSocket message is read just far enough to know which exchange
it is. Threads own one direction of one connection each and end with the proxy.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeVar

from privatelora.protocol.frames import HEADER, Frame, Kind, Phase
from privatelora.protocol.messages import DATA_PLANE_PATH

END_OF_HEAD = b"\r\n\r\n"


@dataclass(frozen=True)
class Message:
    """One frame on its way; `up` is towards the service."""

    up: bool
    kind: Kind
    phase: Phase
    layer: int


When = Callable[[Message], bool]
Event = TypeVar("Event", "Fault", "Insertion")


def nth(count: int, kind: Kind, phase: Phase | None = None, layer: int | None = None, up: bool | None = None) -> When:
    """True at message number `count` (from 1) of a kind, and of a phase, layer and direction if given."""
    seen = 0

    def when(message: Message) -> bool:
        nonlocal seen
        fits = message.kind is kind and phase in (None, message.phase) and layer in (None, message.layer)
        seen += fits and up in (None, message.up)
        return seen == count

    return when


@dataclass
class Fault:
    """What happens at the first message that `when` is true of; each happens once."""

    when: When
    then: Callable[[], object]
    deliver: bool  # the message itself still arrives
    silent: bool  # nothing is closed; no byte passes any more
    happened: bool = False


@dataclass
class Insertion:
    """Frames for the device that pass, `pause_s` apart, before the first message that `when` is true of."""

    when: When
    frames: Sequence[Frame]
    pause_s: float
    happened: bool = False


@dataclass(eq=False)
class Link:
    """One device's connection and the proxy's own to the service."""

    device: socket.socket
    service: socket.socket
    silent: bool = False

    def close(self) -> None:
        for end in (self.device, self.service):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads it
            end.close()


@dataclass
class Proxy:
    """Listens on a port of its own and passes everything on to `target_port` of this machine."""

    target_port: int
    arrivals: list[float] = field(default_factory=list)  # time of each data plane connection
    _faults: list[Fault] = field(default_factory=list)
    _insertions: list[Insertion] = field(default_factory=list)
    _links: list[Link] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._start(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut_now()
        for thread in self._threads:
            thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def faults_left(self) -> int:
        """Faults that were asked for and have not happened."""
        return sum(not fault.happened for fault in self._faults)

    def cut(
        self, when: When, then: Callable[[], object] = lambda: None, deliver: bool = False, silent: bool = False
    ) -> None:
        """Break the connection at the first message that `when` is true of, then do `then`."""
        self._faults.append(Fault(when, then, deliver, silent))

    def before(self, when: When, frames: Sequence[Frame], pause_s: float = 0.0) -> None:
        """Give the device frames, each after a pause, before the service's first message that `when` is true of."""
        self._insertions.append(Insertion(when, frames, pause_s))

    def cut_now(self) -> None:
        """Break every connection."""
        with self._lock:
            links, self._links = self._links, []
        for link in links:
            link.close()

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                device, _ = self._listener.accept()
            except OSError:  # the proxy ends
                return
            try:
                service = socket.create_connection(("127.0.0.1", self.target_port))
            except OSError:  # the service is down: the device sees its connection end
                self.arrivals.append(time.monotonic())
                device.close()
                continue
            for end in (device, service):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = Link(device, service)
            with self._lock:
                self._links.append(link)
            self._start(lambda link=link: self._pump(link, up=True))  # type: ignore[misc]  # mypy infers no default
            self._start(lambda link=link: self._pump(link, up=False))  # type: ignore[misc]  # mypy infers no default

    def _pump(self, link: Link, up: bool) -> None:
        source, target = (link.device, link.service) if up else (link.service, link.device)
        try:
            head = _read_head(source)
            if up and DATA_PLANE_PATH.encode() in head:
                self.arrivals.append(time.monotonic())
            target.sendall(head)
            if (DATA_PLANE_PATH.encode() in head) if up else head.startswith(b"HTTP/1.1 101"):
                while self._pass_message(link, source, target, up):
                    pass
            else:
                while data := source.recv(1 << 16):
                    target.sendall(data)
        except (OSError, EOFError):
            pass  # one side ended, so the other does
        finally:
            link.close()

    def _pass_message(self, link: Link, source: socket.socket, target: socket.socket, up: bool) -> bool:
        """Pass one WebSocket frame on, or let a fault happen; False ends the connection."""
        data, content = _read_websocket_frame(source)
        message = _message(content, up)
        fault = self._first(self._faults, message)
        if link.silent:
            return True
        insertion = None if up else self._first(self._insertions, message)
        if insertion is not None:
            for frame in insertion.frames:
                time.sleep(insertion.pause_s)
                target.sendall(_websocket_frame(frame.pack()))
        if fault is None or fault.deliver:
            target.sendall(data)
        if fault is None:
            return True
        fault.then()
        link.silent = fault.silent
        return fault.silent

    def _first(self, events: Sequence[Event], message: Message | None) -> Event | None:
        """The event that happens at this message, if one does."""
        if message is None:
            return None
        with self._lock:
            for event in events:
                if not event.happened and event.when(message):
                    event.happened = True
                    return event
        return None


def _message(content: bytes, up: bool) -> Message | None:
    if len(content) < HEADER.size:
        return None
    fields = HEADER.unpack_from(content)
    return Message(up, Kind(fields[2]), Phase(fields[3]), layer=fields[10])


def _websocket_frame(content: bytes) -> bytes:
    """A short binary message as a service writes it: whole, without a mask."""
    size = len(content)
    return bytes([0x82, size] if size < 126 else [0x82, 126, *size.to_bytes(2, "big")]) + content


def _read_head(source: socket.socket) -> bytes:
    """An HTTP head and what came with it: for an upgrade nothing, since neither side speaks before the other's head."""
    head = b""
    while END_OF_HEAD not in head:
        data = source.recv(1 << 16)
        if not data:
            raise EOFError
        head += data
    return head


def _read_websocket_frame(source: socket.socket) -> tuple[bytes, bytes]:
    """The bytes of one WebSocket frame (RFC 6455, section 5.2), and the beginning of its unmasked content."""
    head = _read_exactly(source, 2)
    length = head[1] & 0x7F
    if length >= 126:
        more = _read_exactly(source, 2 if length == 126 else 8)
        head, length = head + more, int.from_bytes(more, "big")
    mask = _read_exactly(source, 4) if head[1] & 0x80 else b""
    payload = _read_exactly(source, length)
    content = payload[: HEADER.size]
    if mask:
        content = bytes(byte ^ mask[i % 4] for i, byte in enumerate(content))
    is_message = head[0] & 0x0F == 2
    return head + mask + payload, content if is_message else b""


def _read_exactly(source: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = source.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)

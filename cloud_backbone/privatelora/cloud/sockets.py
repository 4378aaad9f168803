"""Many sessions' sockets, read and written in bulk by compiled code (sockets.c) without the interpreter lock.

    event loop -> Sockets.read -> Socket.message(data)        one call for all that are readable
    write(socket, head, body) ... flush()                     one call for all that is to be sent
    post(volley) ... volley.take(rows)                        a batch's messages, and the answers that are due to them

asyncio reads and writes one socket at a time and holds the interpreter lock meanwhile. A service of 32 sessions has a
thousand messages a token to read and to write, so that took longer than the layers. What is not one whole masked binary
frame goes on to the socket's own protocol as it came, and what a socket does not take at once to its own transport.
Without the library, and for TLS, the transports do all of it.
"""

from __future__ import annotations

import asyncio
import ctypes
import select
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import structlog

from privatelora.decoder.compiled import load
from privatelora.protocol.frames import HEADER

log = structlog.get_logger("privatelora.cloud")

# Frames of RFC 6455, 5.2
BINARY, MASKED = 0x82, 0x80  # first byte of a binary message in one frame; the second byte's flag
TWO_BYTES, EIGHT_BYTES = 126, 127  # the second byte's length where it stands for one that follows

CHUNK_BYTES = 1 << 18  # that are read of a socket at once
SPACE_BYTES = 4 * CHUNK_BYTES
ARRIVALS = 1024  # of one call
NAPS = (
    4  # of 20 us and what the clock adds, while eight answers or more are missing: else each wakes the loop by itself
)
NAP_WITHIN_S = 0.005  # of a volley; later naps would be for devices that are silent or far away
MESSAGE, BYTES, END, ANSWER = range(4)


class _Due(ctypes.Structure):
    """`Due` of sockets.c."""

    _fields_ = (
        ("header", ctypes.c_uint8 * HEADER.size),
        ("answer", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("nbytes", "volley", "row")),
    )


class Socket(Protocol):
    """One session's socket; none of these raises."""

    @property
    def transport(self) -> asyncio.Transport: ...

    @property
    def file(self) -> int:
        """Its file, if `Sockets` reads and writes it and nothing else is to be written before; else -1."""

    def message(self, data: bytes) -> None:
        """A whole binary message has come."""

    def raw(self, data: bytes) -> bool:
        """Bytes as they came; returns whether what follows them cannot be understood without them."""

    def end(self) -> None:
        """Nothing more can be read here; the transport tells why once it reads itself."""

    def pause(self, reason: str) -> None:
        """Read nothing while there is this reason, or any other."""

    def resume(self, reason: str) -> None:
        """This reason is gone."""

    def answered(self) -> None:
        """What is due of it in a volley has come another way."""


@dataclass(eq=False)
class Volley:
    """Messages of one size that go to many sockets at once, and the answers that are due, of one size as well.

    headers, data, due_headers : of all, end to end.
    take : is told the rows that have been answered, some at a time; their payloads are rows of `answers`.
    """

    sockets: Sequence[Socket]
    files: Sequence[int]
    headers: bytes
    data: memoryview | bytes
    due_headers: bytes
    due_bytes: int
    take: Callable[[Volley, list[int]], None]
    answers: bytearray = field(init=False)
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.missing = len(self.files)
        self.answers = bytearray(self.missing * self.due_bytes)


class Sockets:
    """The sockets of a process's open sessions; every method is called on the event loop.

    Parameters
    ----------
    largest : payload bytes of a message; longer ones are handed on as they came, to be refused.
    """

    def __init__(self, library: ctypes.CDLL, largest: int) -> None:
        self._library, self._largest = library, largest
        self._epoll = select.epoll()
        self._sockets: dict[int, Socket] = {}  # by file
        self._raw = (ctypes.c_uint8 * 0)()  # by file, whether bytes are handed on as they come
        self._dues = (_Due * 0)()  # by file
        self._receiving: tuple[object, ...] = ()  # what sockets_receive is called with
        self._volleys: dict[int, Volley] = {}
        self._posted = 0
        self._missing, self._posted_at = 0, -NAP_WITHIN_S  # answers to volleys, and when the last was sent
        self._clogged: set[int] = set()  # files for which a transport may have something to write
        self._space = bytearray(SPACE_BYTES)
        self._view = memoryview(self._space)
        self._arrivals = array("q", bytes(8 * 4 * ARRIVALS))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._writers: list[Socket] = []
        self._files: list[int] = []
        self._parts: list[bytes | memoryview] = []
        self._lengths: list[int] = []

    @classmethod
    def create(cls, largest: int) -> Sockets | None:
        """None where the library could not be compiled."""
        library = _library()
        return None if library is None else cls(library, largest)

    # -- reading -------------------------------------------------------------------------------------------------------

    def add(self, socket: Socket, file: int) -> None:
        """Read the socket `file` from now on, in place of its transport, which must have paused."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._epoll.fileno(), self.read)
        if file >= len(self._raw):
            self._make_room(file + 1)
        self._sockets[file], self._raw[file] = socket, 0
        self._epoll.register(file, select.EPOLLIN)

    def _make_room(self, files: int) -> None:
        raw, dues = self._raw, self._dues
        self._raw, self._dues = (ctypes.c_uint8 * files)(), (_Due * files)()
        ctypes.memmove(self._raw, raw, ctypes.sizeof(raw))
        ctypes.memmove(self._dues, dues, ctypes.sizeof(dues))
        self._receiving = (
            self._epoll.fileno(), ctypes.addressof(self._raw), ctypes.addressof(self._dues), self._largest,
            _address(self._space), SPACE_BYTES, CHUNK_BYTES, self._arrivals.buffer_info()[0], ARRIVALS,
        )  # fmt: skip

    def remove(self, file: int) -> None:
        """Read it no longer."""
        del self._sockets[file]
        self._clogged.discard(file)
        self.answered(file)
        with suppress(FileNotFoundError):  # it is paused
            self._epoll.unregister(file)

    def answered(self, file: int) -> None:
        """Nothing is due of this socket any more."""
        due = self._dues[file]
        if due.answer:
            due.answer = None
            self._settle(due.volley, 1)

    def pause(self, file: int) -> None:
        """Read nothing of it until `resume`."""
        with suppress(FileNotFoundError):
            self._epoll.unregister(file)

    def resume(self, file: int) -> None:
        with suppress(FileExistsError):
            self._epoll.register(file, select.EPOLLIN)

    def read(self) -> None:
        """Hand on what has come."""
        fresh = time.perf_counter() - self._posted_at < NAP_WITHIN_S  # else it is silent devices that are waited for
        count = self._library.sockets_receive(*self._receiving, self._missing if fresh else 0, NAPS)
        answered: dict[int, list[int]] = {}
        came = iter(self._arrivals[: 4 * count])
        for file, what, at, length in zip(came, came, came, came, strict=True):
            if what == ANSWER:
                answered.setdefault(at, []).append(length)
                continue
            self._take(answered)  # which came before this, if it is of the same socket
            socket = self._sockets.get(file)
            if socket is None:  # closed by something that came just now
                continue
            try:
                if what == MESSAGE:
                    socket.message(bytes(self._view[at : at + length]))
                elif what == BYTES:
                    self._raw[file] = socket.raw(bytes(self._view[at : at + length]))
                else:
                    socket.end()
            except Exception:  # what came of the others is read already, and must reach them
                log.exception("socket failed")
                socket.transport.abort()
        self._take(answered)

    def _take(self, answered: dict[int, list[int]]) -> None:
        """Tell whoever posted volleys which rows of theirs were answered."""
        for number, rows in answered.items():
            volley = self._volleys[number]
            self._settle(number, len(rows))
            volley.take(volley, rows)
        answered.clear()

    def _settle(self, number: int, count: int) -> None:
        volley = self._volleys[number]
        volley.missing -= count
        self._missing -= count
        if not volley.missing:
            del self._volleys[number]

    # -- writing -------------------------------------------------------------------------------------------------------

    def write(self, socket: Socket, file: int, head: bytes, body: bytes | memoryview) -> None:
        """Send both, at the next `flush` or before the loop waits again."""
        if not self._writers and self._loop is not None:
            self._loop.call_soon(self.flush)
        self._writers.append(socket)
        self._files.append(file)
        self._parts += (head, body)
        self._lengths.append(len(head) + len(body))

    def clog(self, file: int) -> None:
        """The socket's transport was given something to write."""
        self._clogged.add(file)

    def clogged(self, socket: Socket, file: int) -> bool:
        """Whether the transport has something to write before anything else."""
        if file in self._clogged and not socket.transport.get_write_buffer_size():
            self._clogged.discard(file)
        return file in self._clogged

    def post(self, volley: Volley) -> None:
        """Send a volley; each socket is open, not clogged, and nothing else is due of it."""
        self.flush()
        self._posted += 1
        self._volleys[self._posted] = volley
        self._missing += volley.missing
        self._posted_at = time.perf_counter()
        count, files = len(volley.files), array("i", volley.files)
        left = array("q", bytes(8 * count))
        row_bytes = len(volley.data) // count
        start = frame_start(HEADER.size + row_bytes)
        incomplete = self._library.sockets_post(
            count, files.buffer_info()[0], self._dues, self._posted, start, len(start), volley.headers,
            _start_of(volley.data), row_bytes, volley.due_headers, _address(volley.answers), volley.due_bytes,
            left.buffer_info()[0],
        )  # fmt: skip
        if incomplete:
            for row, rest in enumerate(left):
                if rest:
                    header = volley.headers[row * HEADER.size : (row + 1) * HEADER.size]
                    message = b"".join((start, header, volley.data[row * row_bytes : (row + 1) * row_bytes]))
                    self._leave(volley.sockets[row], volley.files[row], message[len(message) - rest :])

    def _leave(self, socket: Socket, file: int, rest: bytes) -> None:
        """What a socket did not take is its transport's to write."""
        if not socket.transport.is_closing():
            self.clog(file)
            socket.transport.write(rest)

    def flush(self) -> None:
        """Send what was written."""
        if not self._writers:
            return
        writers, data, lengths = self._writers, b"".join(self._parts), self._lengths
        if len(writers) == 1:
            self._leave(writers[0], self._files[0], data)
            self._writers, self._files, self._parts, self._lengths = [], [], [], []
            return
        files, left = array("i", self._files), array("q", lengths)
        self._writers, self._files, self._parts, self._lengths = [], [], [], []
        if self._library.sockets_send(len(writers), files.buffer_info()[0], data, left.buffer_info()[0]):
            end = 0
            for writer, file, length, rest in zip(writers, files, lengths, left, strict=True):
                end += length
                if rest:
                    self._leave(writer, file, data[end - rest : end])


def frame_start(length: int) -> bytes:
    """What stands before a binary message of so many bytes that a server sends in one frame (RFC 6455, 5.2)."""
    if length < TWO_BYTES:
        return bytes((BINARY, length))
    if length < 1 << 16:
        return bytes((BINARY, TWO_BYTES)) + length.to_bytes(2, "big")
    return bytes((BINARY, EIGHT_BYTES)) + length.to_bytes(8, "big")


def _address(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _start_of(data: memoryview | bytes) -> int:
    return np.frombuffer(data, np.uint8).ctypes.data  # which takes what may not be written to as well


@cache
def _library() -> ctypes.CDLL | None:
    library = load(Path(__file__).with_name("sockets.c"))
    if library is not None:
        number, pointer, long, text = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
        library.sockets_receive.argtypes = (
            number, pointer, pointer, long, pointer, long, long, pointer, number, long, number
        )  # fmt: skip
        library.sockets_post.argtypes = (
            number, pointer, pointer, long, text, number, text, pointer, long, text, pointer, long, pointer
        )  # fmt: skip
        library.sockets_send.argtypes = (number, pointer, ctypes.c_char_p, pointer)
    return library

"""uvicorn's two protocols with the limits that they lack, against peers that are slow, endless, or never read, and a
direct way for messages once a session is open.

`endpoint.server` hands both to uvicorn. Nothing here knows what the bytes mean; `session.py` checks that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Set
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import apply_mask  # type: ignore[attr-defined]  # its C form where there is one
from websockets.http11 import Request

from privatelora.cloud.sockets import BINARY, MASKED, TWO_BYTES, Sockets, frame_start

HANDSHAKE_TIMEOUT_S = 10.0  # for a request to arrive, for OPEN after an upgrade, and for a last message to be taken
BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
MAX_REQUEST_BYTES = 64 * 1024  # head and body together; no route takes a body


class GuardedHttp(HttpToolsProtocol):
    """HTTP whose requests must arrive whole within a time and a size: the first of a connection and every later one."""

    _arrived = 0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own has it
        super().connection_made(transport)
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        if self._deadline is None:
            self._expect_request()
        self._arrived += len(data)
        if self._arrived > MAX_REQUEST_BYTES:
            self.transport.abort()
        else:
            super().data_received(data)

    def on_message_complete(self) -> None:
        self._forget_request()
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        if all(value.isascii() for _, value in self.headers):
            super().handle_websocket_upgrade()
        else:  # uvicorn would fail at it, and count the connection for ever
            self.send_400_response("Headers of a WebSocket must be ASCII.")

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_request()
        super().connection_lost(exc)

    def _expect_request(self) -> None:
        self._deadline = self.loop.call_later(HANDSHAKE_TIMEOUT_S, self.transport.abort)

    def _forget_request(self) -> None:
        self._arrived = 0
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


SOCKET = "privatelora.socket"  # key of an ASGI scope under which a WebSocket's protocol object is found

MASK_BYTES = 4  # of RFC 6455, 5.2


class GuardedWebSocket(WebSocketsSansIOProtocol):
    """A WebSocket that writes no more than its peer reads, and is gone soon after its session.

    What comes is cut into frames here. After `attach` a message goes straight to a function, and `write` sends one: no
    queue, no task and no ASGI event between the socket and the session. Only a binary message in one frame, as nearly
    every one is, is unpacked here; any other frame is handed to `websockets`, whole.
    """

    _deliver: Callable[[bytes], None] | None = None
    _most_untaken, _untaken = 1, 0  # messages that the peer has not taken
    _pauses: Set[str] = frozenset()  # why nothing is read from the peer
    _cuts = False  # whether what comes is cut into frames: once the handshake is over
    _partial = bytearray()  # the beginning of a frame
    _sockets: Sockets | None = None  # which reads and writes in place of the transport
    _file = -1

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if self.handshake_initiated and not self.handshake_complete:
            cast(dict[str, Any], self.scope)[SOCKET] = self

    def attach(self, deliver: Callable[[bytes], None], untaken: int, sockets: Sockets | None = None) -> None:
        """Give every message to `deliver` from now on, what has come already first; it must not raise.

        `sockets` reads and writes in place of the transport from then on, if it is given and there is no TLS.

        A peer that has not taken `untaken` messages is not read before it does: it may send while it takes nothing, but
        not for ever.
        """
        self._deliver, self._most_untaken = deliver, untaken
        waiting = [self.queue.get_nowait() for _ in range(self.queue.qsize())]
        for event in waiting:
            message = event["bytes"] if event["type"] == "websocket.receive" and "bytes" in event else None
            if message is not None:
                deliver(message)
            else:
                self.queue.put_nowait(event)
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        if sockets is not None and self.transport.get_extra_info("sslcontext") is None and not self._partial:
            self.transport.pause_reading()
            self._file = self.transport.get_extra_info("socket").fileno()
            sockets.add(self, self._file)
            self._sockets = sockets

    def message(self, data: bytes) -> None:
        if not self.transport.is_closing() and self._deliver is not None:
            self._deliver(data)

    def raw(self, data: bytes) -> bool:
        if not self.transport.is_closing():
            self.data_received(data)
        return bool(self._partial) or self.conn.current_size is not None or not self._cuts

    def end(self) -> None:
        self._leave_sockets()

    @property
    def file(self) -> int:
        """Of its socket, if `Sockets` reads and writes it and nothing else is to be written before; else -1."""
        if self._sockets is None or self.transport.is_closing() or self._sockets.clogged(self, self._file):
            return -1
        return self._file

    def answered(self) -> None:
        """What was due has come another way."""
        if self._sockets is not None:
            self._sockets.answered(self._file)

    def _leave_sockets(self) -> None:
        if self._sockets is not None:
            self._sockets.remove(self._file)
            self._sockets = None
            if not self._pauses and not self.transport.is_closing():
                self.transport.resume_reading()

    def pause(self, reason: str) -> None:
        """Read nothing from the peer while there is this reason, or any other."""
        self._pauses |= {reason}
        if self._sockets is not None:
            self._sockets.pause(self._file)
        else:
            self.transport.pause_reading()

    def resume(self, reason: str) -> None:
        """This reason is gone."""
        if reason in self._pauses:
            self._pauses -= {reason}
            if not self._pauses and not self.transport.is_closing():
                if self._sockets is not None:
                    self._sockets.resume(self._file)
                else:
                    self.transport.resume_reading()

    def write(self, head: bytes, body: bytes | memoryview) -> None:
        """Send one binary message, once the peer takes it."""
        if self.transport.is_closing():
            return
        start = frame_start(len(head) + len(body))
        if self._sockets is not None and not self._sockets.clogged(self, self._file):
            self._sockets.write(self, self._file, start + head, body)
            return
        self.transport.write(b"".join((start, head, body)))
        if not self.writable.is_set():
            self._untaken += 1
            if self._untaken >= self._most_untaken:
                self.pause("untaken")

    def data_received(self, data: bytes) -> None:
        if not self._cuts:
            super().data_received(data)
            self._cuts = self.handshake_initiated
            if self.conn.handshake_exc is not None and not self.handshake_initiated:  # uvicorn would wait for ever
                self.transport.write(BAD_REQUEST)
                self.transport.close()
            return
        if self._partial:
            self._partial += data
            data = self._partial  # type: ignore[assignment]  # sliced like bytes
        at, size = 0, len(data)
        while size - at >= 2 and (end := at + self._frame_bytes(data, at)) <= size and self._cuts:
            self._take(data, at, end)
            at = end
            if self.transport.is_closing():  # by this frame: nothing that comes after it counts
                return
        if not self._cuts:
            super().data_received(bytes(data[at:]))
        elif at or not self._partial:
            self._partial = bytearray(data[at:])

    def _frame_bytes(self, data: bytes, at: int) -> int:
        """Length of the frame that begins at `at`, or of as much of it as must be there to tell; one that `websockets`
        will refuse by its header stops the cutting."""
        length, head = data[at + 1] & ~MASKED, 2 + MASK_BYTES
        if length >= TWO_BYTES:
            extended = 2 if length == TWO_BYTES else 8
            head += extended
            if len(data) < at + 2 + extended:
                return head
            length = int.from_bytes(data[at + 2 : at + 2 + extended], "big")
        if length + (self.conn.current_size or 0) > self.config.ws_max_size or not data[at + 1] & MASKED:
            self._cuts = False
        return head + length

    def _take(self, data: bytes, at: int, end: int) -> None:
        """One frame."""
        if self._deliver is None or data[at] != BINARY or self.conn.current_size is not None:
            super().data_received(bytes(data[at:end]))
            return
        length = data[at + 1] ^ MASKED
        body = at + 2 + MASK_BYTES + (0 if length < TWO_BYTES else 2 if length == TWO_BYTES else 8)
        self._deliver(apply_mask(bytes(data[body:end]), bytes(data[body - MASK_BYTES : body])))

    def send_receive_event_to_app(self) -> None:
        if self._deliver is not None and self.curr_msg_data_type == "bytes":
            self._deliver(bytes(self.bytes))
        else:
            self._leave_sockets()
            super().send_receive_event_to_app()

    def shutdown(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def pause_writing(self) -> None:
        self.writable.clear()  # which `send` waits for

    def resume_writing(self) -> None:
        self.writable.set()
        self._untaken = 0
        self.resume("untaken")

    def handle_ping(self) -> None:
        if self.writable.is_set():
            if self._sockets is not None:
                self._sockets.flush()  # what was written before
                self._sockets.clog(self._file)
            super().handle_ping()
        else:
            self.conn.data_to_send()  # the pong; a peer that does not read gets none

    def connection_lost(self, exc: Exception | None) -> None:
        self.writable.set()  # nobody waits for a peer that is gone
        self._leave_sockets()
        super().connection_lost(exc)

    async def run_asgi(self) -> None:
        await super().run_asgi()
        self.loop.call_later(HANDSHAKE_TIMEOUT_S, self.transport.abort)  # if what was written last is never read

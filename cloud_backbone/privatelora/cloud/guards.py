"""uvicorn's two protocols with the limits that they lack, against peers that are slow, endless, or never read.

`endpoint.server` hands both to uvicorn. Nothing here knows what the bytes mean; `session.py` checks that.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

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


class GuardedWebSocket(WebSocketsSansIOProtocol):
    """A WebSocket that writes no more than its peer reads, and is gone soon after its session."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated:  # uvicorn would wait for ever
            self.transport.write(BAD_REQUEST)
            self.transport.close()

    def shutdown(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def pause_writing(self) -> None:
        self.writable.clear()  # which `send` waits for

    def resume_writing(self) -> None:
        self.writable.set()

    def handle_ping(self) -> None:
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()  # the pong; a peer that does not read gets none

    def connection_lost(self, exc: Exception | None) -> None:
        self.writable.set()  # nobody waits for a peer that is gone
        super().connection_lost(exc)

    async def run_asgi(self) -> None:
        await super().run_asgi()
        self.loop.call_later(HANDSHAKE_TIMEOUT_S, self.transport.abort)  # if what was written last is never read

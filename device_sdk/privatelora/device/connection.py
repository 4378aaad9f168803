"""One blocking WebSocket to a service: frames out, frames in, bytes counted.

The protocol state machine is the `websockets` package's sans-I/O client on a plain socket: a device does one thing at a
time, and no event loop or reader thread stands between it and the next frame. Every way in which the network can fail
surfaces as `ConnectionLostError`; an ERROR frame surfaces as the error that the service raised, and QUEUED goes to the
owner's `on_wait` while the wait goes on.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidState, InvalidStatus
from websockets.frames import Frame as WsFrame
from websockets.frames import Opcode
from websockets.http11 import Response
from websockets.uri import parse_uri

from privatelora.protocol.errors import ConnectionLostError, PrivateLoraError, ProtocolError
from privatelora.protocol.frames import Frame, Kind
from privatelora.protocol.messages import ErrorInfo, Queued, parse

RECEIVE_BYTES = 1 << 18
LAST_WORDS_S = 1.0  # for which what the service said before it closed the connection is looked for

OnWait = Callable[[int, int], None]
"""place (1 is next) and how many wait, whenever the service says that there is no room yet"""


@dataclass
class ByteCount:
    """What crossed the socket: tensor bytes of exchanges, and everything else in the messages that carried them."""

    payload_up: int = 0
    payload_down: int = 0
    overhead_up: int = 0
    overhead_down: int = 0

    @property
    def total(self) -> int:
        return self.payload_up + self.payload_down + self.overhead_up + self.overhead_down

    @property
    def overhead(self) -> int:
        return self.overhead_up + self.overhead_down


class Connection:
    """A WebSocket that is open from construction to `close`.

    Parameters
    ----------
    url : ws:// or wss:// URL of the data plane.
    count : where bytes are added up; it outlives the connection.
    timeout_s : the longest silence while an answer is due; QUEUED ends a silence.
    """

    def __init__(
        self,
        url: str,
        token: str,
        count: ByteCount,
        timeout_s: float,
        max_message_bytes: int,
        tls: ssl.SSLContext | None = None,
        on_wait: OnWait | None = None,
    ) -> None:
        self.count, self._on_wait = count, on_wait
        self._protocol = ClientProtocol(parse_uri(url), max_size=max_message_bytes)
        self._messages: list[bytes] = []
        self._partial = bytearray()
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "wss" else 80)
        try:
            self._socket = socket.create_connection((host, port), timeout=timeout_s)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if parts.scheme == "wss":
                context = tls or ssl.create_default_context()
                self._socket = context.wrap_socket(self._socket, server_hostname=host)
        except ssl.SSLCertVerificationError as error:
            raise ConnectionLostError(
                f"the certificate of {host}:{port} is not trusted ({error.verify_message}); pass ca_file= with the "
                "authority that signed it"
            ) from None
        except OSError as error:
            raise ConnectionLostError(f"{host}:{port} cannot be reached ({error}); is the service running?") from None
        try:
            self._handshake(token)
        except BaseException:
            self._socket.close()
            raise

    def send(self, frame: Frame) -> None:
        """Send one frame; raises `ConnectionLostError`, or what the service said before it closed the connection."""
        try:
            self._write(frame)
        except ConnectionLostError:
            self._heed()
            raise

    def receive(self) -> Frame:
        """Wait for the next frame, in a queue if need be; an ERROR frame is raised as the error that it carries."""
        while (frame := self._next()).kind is Kind.QUEUED:
            queued = parse(frame.payload, Queued)
            if self._on_wait is not None:
                self._on_wait(queued.place, queued.waiting)
        if frame.kind is Kind.ERROR:
            raise parse(frame.payload, ErrorInfo).to_error()
        return frame

    def close(self) -> None:
        """Say goodbye if the socket still works, and close it."""
        try:
            self._socket.settimeout(1.0)
            self._write(Frame(Kind.CLOSE))
            self._protocol.send_close(1000)
            self._flush()
        except (PrivateLoraError, OSError):
            pass  # the other end is gone, which is what closing is for
        finally:
            self._socket.close()

    def _write(self, frame: Frame) -> None:
        data = frame.pack()
        try:
            self._protocol.send_binary(data)
        except InvalidState:
            raise ConnectionLostError("the service closed the connection") from None
        self._flush()
        self.count.payload_up += frame.payload_bytes
        self.count.overhead_up += len(data) - frame.payload_bytes

    def _next(self) -> Frame:
        """The next frame of any kind, counted."""
        while not self._messages:
            self._pump()
        data = self._messages.pop(0)
        frame = Frame.unpack(data)
        self.count.payload_down += frame.payload_bytes
        self.count.overhead_down += len(data) - frame.payload_bytes
        return frame

    def _handshake(self, token: str) -> None:
        request = self._protocol.connect()
        request.headers["Authorization"] = f"Bearer {token}"
        self._protocol.send_request(request)
        self._flush()
        while self._protocol.handshake_exc is None and self._protocol.state.name == "CONNECTING":
            self._pump()
        error = self._protocol.handshake_exc
        if isinstance(error, InvalidStatus):
            raise _refusal(error.response)
        if error is not None and isinstance(error.__cause__, EOFError):
            raise ConnectionLostError("the service closed the connection before it was open")
        if error is not None:
            raise ProtocolError(f"the other end does not speak this protocol ({error}); is the URL right?")

    def _heed(self) -> None:
        """Nothing can be sent any more: raise the ERROR that the service sent before, if there is one."""
        until = time.monotonic() + LAST_WORDS_S
        with suppress(ConnectionLostError, OSError):
            while (left := until - time.monotonic()) > 0:
                self._socket.settimeout(left)
                if not self._read():
                    break
        while self._messages:
            if (frame := self._next()).kind is Kind.ERROR:
                raise parse(frame.payload, ErrorInfo).to_error() from None

    def _pump(self) -> None:
        """Turn what the socket has into messages, and answer pings and closes."""
        more = self._read()
        try:
            self._flush()
        except ConnectionLostError:
            if not self._messages:  # among which may be why
                raise
        if not more and self._protocol.handshake_exc is None and not self._messages:
            raise ConnectionLostError("the service closed the connection")

    def _read(self) -> bool:
        """Turn what the socket has into messages; returns whether more may come."""
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except TimeoutError:
            raise ConnectionLostError(
                f"the service sent nothing for {self._socket.gettimeout():g} s; it may be overloaded or gone"
            ) from None
        except OSError as error:
            raise ConnectionLostError(f"the connection broke ({error})") from None
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        for event in self._protocol.events_received():
            if isinstance(event, WsFrame):
                self._take(event)
        return bool(data)

    def _take(self, event: WsFrame) -> None:
        if event.opcode in (Opcode.BINARY, Opcode.CONT):
            self._partial += event.data
            if event.fin:
                self._messages.append(bytes(self._partial))
                self._partial.clear()
        elif event.opcode is Opcode.TEXT:
            raise ProtocolError("the service sent text; every message of this protocol is binary")

    def _flush(self) -> None:
        try:
            for data in self._protocol.data_to_send():
                if data:
                    self._socket.sendall(data)
        except OSError as error:
            raise ConnectionLostError(f"the connection broke ({error})") from None


def _refusal(response: Response) -> PrivateLoraError:
    """The error in a refused upgrade: the service answers with `ErrorInfo`."""
    try:
        return parse(bytes(response.body or b""), ErrorInfo).to_error()
    except ProtocolError:
        return ConnectionLostError(f"the service refused the connection with HTTP status {response.status_code}")

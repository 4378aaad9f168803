"""What a service said before it closed the connection is what the device raises, however abruptly that closed."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from privatelora.device.adapters import AdapterSettings
from privatelora.device.connection import LAST_WORDS_S, ByteCount, Connection
from privatelora.device.exchange import RemoteLayers
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.errors import AdmissionError, ConnectionLostError
from privatelora.protocol.frames import Frame, Kind, Phase
from privatelora.protocol.messages import ErrorInfo, Opened, Queued, control_frame
from privatelora.protocol.placement import Placement

REASON = control_frame(Kind.ERROR, ErrorInfo(code="admission", message="no room", retry_after_s=1.0)).pack()
LARGE = Frame(Kind.HIDDEN, 1, Phase.SCORE).with_array(np.zeros((1 << 10, 1 << 10), np.float32), WireDtype.FLOAT32)


def reset(websocket: ServerConnection) -> None:
    """As when a service ends a session that still sends: unread bytes make the kernel answer with a reset."""
    websocket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    websocket.socket.shutdown(socket.SHUT_RDWR)
    websocket.socket.close()


@contextmanager
def serving(handle: Callable[[ServerConnection], None]) -> Iterator[str]:
    """The URL of a server that does this with a connection."""
    with serve(handle, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}/"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def connected(says: bytes | None, ends: Callable[[ServerConnection], None]) -> Iterator[Connection]:
    """A connection whose service says something and ends it at once; when the block begins, it has."""
    ended = threading.Event()

    def end(websocket: ServerConnection) -> None:
        if says is not None:
            websocket.send(says)
        ends(websocket)
        ended.set()

    with serving(end) as url:
        connection = Connection(url, "token", ByteCount(), 5.0, 1 << 20)
        try:
            assert ended.wait(5)
            yield connection
        finally:
            connection.close()


@pytest.mark.parametrize("ends", [reset, lambda websocket: websocket.close_socket()], ids=["reset", "closed"])
@pytest.mark.parametrize("sends", [0, 1, 3])
def test_a_reason_that_came_before_the_end_is_raised(ends: Callable[[ServerConnection], None], sends: int) -> None:
    with connected(REASON, ends) as connection, pytest.raises(AdmissionError, match="no room"):
        for _ in range(sends):
            connection.send(LARGE)
        connection.receive()


def test_without_a_reason_the_connection_is_lost() -> None:
    with connected(None, reset) as connection, pytest.raises(ConnectionLostError):
        for _ in range(3):
            connection.send(LARGE)


def test_a_session_that_was_ended_meanwhile_is_no_trouble_to_who_is_done() -> None:
    def end(websocket: ServerConnection) -> None:
        websocket.recv()
        for said in (control_frame(Kind.OPENED, Opened(session=7)).pack(), REASON):
            websocket.send(said)
        websocket.close_socket()
        ended.set()

    ended = threading.Event()
    with serving(end) as url:
        info = SimpleNamespace(
            limits=SimpleNamespace(max_message_bytes=1 << 20), model=SimpleNamespace(sha256="0" * 64)
        )
        service: Any = SimpleNamespace(info=info, data_plane_url=url, token="token", timeout_s=5.0, tls=None)
        settings = AdapterSettings()
        remote = RemoteLayers(service, Placement(), settings, None, WireDtype.FLOAT32, torch.float32)
        remote.connect()
        assert ended.wait(5)
        for sequence in range(3):  # the first one may still find room in the socket
            remote.release([sequence])
            time.sleep(0.05)
        assert remote.session == 0


def test_a_service_that_goes_on_talking_does_not_hold_up_who_cannot_send() -> None:
    def talk(websocket: ServerConnection) -> None:
        with suppress(ConnectionClosed, OSError):
            for _ in range(100):
                websocket.send(control_frame(Kind.QUEUED, Queued(place=1, waiting=1)).pack())
                time.sleep(0.1)

    with serving(talk) as url:
        connection = Connection(url, "token", ByteCount(), 5.0, 1 << 20)
        connection._protocol.send_close(1000)  # after which nothing more can be sent
        began = time.monotonic()
        with pytest.raises(ConnectionLostError):
            connection.send(LARGE)
        assert time.monotonic() - began < 3 * LAST_WORDS_S  # of the ten seconds
        connection.close()

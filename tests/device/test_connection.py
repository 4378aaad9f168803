"""What a service said before it closed the connection is what the device raises, however abruptly that closed."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from websockets.sync.server import ServerConnection, serve

from privatelora.device.connection import ByteCount, Connection
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.errors import AdmissionError, ConnectionLostError
from privatelora.protocol.frames import Frame, Kind, Phase
from privatelora.protocol.messages import ErrorInfo, control_frame

REASON = control_frame(Kind.ERROR, ErrorInfo(code="admission", message="no room", retry_after_s=1.0)).pack()
LARGE = Frame(Kind.HIDDEN, 1, Phase.SCORE).with_array(np.zeros((1 << 10, 1 << 10), np.float32), WireDtype.FLOAT32)


def reset(websocket: ServerConnection) -> None:
    """As when a service ends a session that still sends: unread bytes make the kernel answer with a reset."""
    websocket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    websocket.socket.shutdown(socket.SHUT_RDWR)
    websocket.socket.close()


@contextmanager
def connected(says: bytes | None, ends: Callable[[ServerConnection], None]) -> Iterator[Connection]:
    """A connection whose service says something and ends it at once; when the block begins, it has."""
    ended = threading.Event()

    def end(websocket: ServerConnection) -> None:
        if says is not None:
            websocket.send(says)
        ends(websocket)
        ended.set()

    with serve(end, "127.0.0.1", 0) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        port = server.socket.getsockname()[1]
        connection = Connection(f"ws://127.0.0.1:{port}/", "token", ByteCount(), 5.0, 1 << 20)
        try:
            assert ended.wait(5)
            yield connection
        finally:
            connection.close()
            server.shutdown()
            serving.join()


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

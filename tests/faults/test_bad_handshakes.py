"""What is no request, or no proper WebSocket, is refused at once, leaves nothing behind, and harms nobody."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx2
import pytest
from tests.faults.conftest import LIMITS, TOKENS, Bystander, Target
from tests.support.wire import Wire

from privatelora.protocol.errors import ProtocolError
from privatelora.protocol.messages import DATA_PLANE_PATH, INFO_PATH

MOST_CONNECTIONS = 4 * LIMITS["max_sessions"] + 64  # beyond which the service answers 503
MALLORY = f"Authorization: Bearer {TOKENS['mallory']}\r\n".encode()


@pytest.fixture(autouse=True)
def nobody_else_notices(bystander: Bystander) -> Iterator[None]:
    yield
    bystander.assert_untouched()


def upgrade(more: bytes = b"", path: bytes = DATA_PLANE_PATH.encode(), method: bytes = b"GET") -> bytes:
    return (
        method + b" " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n" + MALLORY + more + b"\r\n"
    )


HANDSHAKES = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64 + b"\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a header that is not ASCII": upgrade(b"X-Name: caf\xe9\r\n"),
    "a token that is not ASCII": upgrade().replace(MALLORY, b"Authorization: Bearer \xff\r\n"),
    "a path that is not ASCII": upgrade(path=b"/v1/\xff"),
    "another path": upgrade(path=b"/v2/sessions"),
    "another method": upgrade(method=b"POST"),
    "no key": upgrade().replace(b"Sec-WebSocket-Key", b"X-Key"),
    "two keys": upgrade(b"Sec-WebSocket-Key: BBBBBBBBBBBBBBBBBBBBBB==\r\n"),
    "another version": upgrade().replace(b"Version: 13", b"Version: 99"),
    "a body": upgrade(b"Content-Length: 5\r\n") + b"hello",
    "a body in chunks": upgrade(b"Transfer-Encoding: chunked\r\n") + b"5\r\nhello\r\n0\r\n\r\n",
    "a very long header": upgrade(b"X-Long: " + b"y" * 20_000 + b"\r\n"),
    "very many headers": upgrade(b"X-Many: y\r\n" * 300),
    "a wrong token": upgrade().replace(MALLORY, b"Authorization: Bearer wrong\r\n"),
    "no token": upgrade().replace(MALLORY, b""),
}


@pytest.mark.parametrize("handshake", HANDSHAKES.values(), ids=list(HANDSHAKES))
def test_a_bad_handshake_is_refused_at_once_and_leaves_nothing(target: Target, handshake: bytes) -> None:
    for _ in range(MOST_CONNECTIONS + 20):  # one that stayed would keep others out
        with socket.create_connection(("127.0.0.1", target.running.port), timeout=5) as raw:
            raw.sendall(handshake)
            answer = b""
            while data := raw.recv(65536):
                answer += data
        assert answer.startswith(b"HTTP/1.1 4"), answer[:80]
    authorization = {"Authorization": f"Bearer {TOKENS['mallory']}"}
    assert httpx2.get(target.url + INFO_PATH, headers=authorization).status_code == 200
    with Wire(target.url, TOKENS["mallory"]) as wire:
        wire.open(target.info)


BROKEN_FRAMES = {
    "without a mask": (b"\x82\x01x", 1002),
    "with a reserved bit": (b"\xc2\x81\0\0\0\0x", 1002),
    "of an unknown opcode": (b"\x83\x81\0\0\0\0x", 1002),
    "that goes on with nothing": (b"\x80\x81\0\0\0\0x", 1002),
    "that begins within another": (b"\x02\x81\0\0\0\0x\x82\x81\0\0\0\0x", 1002),
    "of a ping in fragments": (b"\x09\x81\0\0\0\0x", 1002),
    "of a long ping": (b"\x89\xfe\x01\x00\0\0\0\0" + b"x" * 256, 1002),
    "of text that is not UTF-8": (b"\x81\x81\0\0\0\0\xff", 1007),
}


@pytest.mark.parametrize(("frame", "code"), BROKEN_FRAMES.values(), ids=list(BROKEN_FRAMES))
def test_a_broken_websocket_frame_ends_the_connection_with_its_code(target: Target, frame: bytes, code: int) -> None:
    with Wire(target.url, TOKENS["mallory"]) as wire:
        wire.open(target.info)
        wire.socket.socket.sendall(frame)
        assert wire.close_code() == code


def test_a_connection_reset_in_mid_frame_frees_its_session(target: Target) -> None:
    deadline = time.monotonic() + 10
    opened = 0
    while opened < 3 * LIMITS["max_sessions"]:
        assert time.monotonic() < deadline
        with Wire(target.url, TOKENS["mallory"]) as wire, suppress(ProtocolError):
            wire.open(target.info)  # refused while the last ones are being closed
            wire.socket.socket.sendall(b"\x82\xfe\xff\xff\0\0\0\0half of it")
            opened += 1

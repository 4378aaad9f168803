"""What the service's WebSocket gives to a session: the messages that `websockets` alone would give, however the bytes
come."""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.server import ServerState
from websockets.frames import CloseCode, Frame, Opcode
from websockets.server import ServerProtocol

from privatelora.cloud.guards import GuardedWebSocket

MAX_BYTES = 70_000
KEY = b"\x01\x82\xf3\x04"
REQUEST = (
    b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


class Transport(asyncio.Transport):
    """Remembers what was written, and whether it is closed or paused."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closing = self.paused = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def close(self) -> None:
        self.closing = True

    abort = close

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


@dataclass
class Ours:
    """A protocol object after its handshake, with a session attached to it."""

    messages: list[bytes] = field(default_factory=list)
    others: list[dict[str, Any]] = field(default_factory=list)  # what is left to ASGI

    async def open(self, before: bytes = b"") -> None:
        """`before` comes in one segment with the request."""

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            accepted.set()
            await self.over.wait()

        accepted, self.over = asyncio.Event(), asyncio.Event()
        config = uvicorn.Config(
            app, ws=GuardedWebSocket, ws_max_size=MAX_BYTES, ws_per_message_deflate=False, log_config=None
        )
        config.load()
        config.loaded_app = app
        self.protocol = GuardedWebSocket(config, ServerState(), {})
        self.transport = Transport()
        self.protocol.connection_made(self.transport)
        self.protocol.data_received(REQUEST + before)
        await accepted.wait()
        del self.transport.written[:]

    def attach(self) -> None:
        self.protocol.attach(self.messages.append, 16)

    def feed(self, segments: Sequence[bytes]) -> None:
        for segment in segments:
            if self.transport.closing:  # as a real transport does
                break
            self.protocol.data_received(segment)

    async def end(self) -> None:
        self.closed = self.transport.closing  # by what came
        queue = cast("asyncio.Queue[dict[str, Any]]", self.protocol.queue)
        while not queue.empty():
            self.others.append(queue.get_nowait())
        self.over.set()
        await asyncio.gather(*self.protocol.tasks)


def ours(segments: Sequence[bytes], before: bytes = b"") -> Ours:
    """What comes of some bytes."""

    async def run() -> Ours:
        found = Ours()
        await found.open(before)
        found.attach()
        found.feed(segments)
        await found.end()
        return found

    return asyncio.run(run())


@dataclass
class Theirs:
    """What `websockets` gives for the same bytes in one piece: messages, and the code with which it ended them."""

    messages: list[bytes] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    code: int | None = None
    pongs: int = 0

    @classmethod
    def of(cls, data: bytes) -> Theirs:
        found, parts = cls(), bytearray()
        text = False
        protocol = ServerProtocol(max_size=MAX_BYTES)
        protocol.receive_data(REQUEST)
        (request,) = protocol.events_received()
        protocol.send_response(protocol.accept(cast(Any, request)))
        protocol.data_to_send()
        protocol.receive_data(data)
        for frame in protocol.events_received():
            assert isinstance(frame, Frame)
            if frame.opcode in (Opcode.BINARY, Opcode.TEXT, Opcode.CONT):
                text = frame.opcode is Opcode.TEXT if frame.opcode is not Opcode.CONT else text
                parts += frame.data
                if frame.fin:
                    if text:
                        found.texts.append(parts.decode())
                    else:
                        found.messages.append(bytes(parts))
                    parts.clear()
            found.pongs += frame.opcode is Opcode.PING
        found.code = protocol.close_sent.code if protocol.close_sent else None
        return found


def frame(opcode: int, content: bytes, fin: bool = True, masked: bool = True, length_bytes: int | None = None) -> bytes:
    """A client's frame; `length_bytes` 0, 2 or 8 where it is not the shortest that fits."""
    size = len(content)
    if length_bytes is None:
        length_bytes = 0 if size < 126 else 2 if size < 1 << 16 else 8
    short = {0: size, 2: 126, 8: 127}[length_bytes]
    head = bytes([opcode | 0x80 * fin, short | 0x80 * masked])
    head += {0: b"", 2: struct.pack(">H", size & 0xFFFF), 8: struct.pack(">Q", size)}[length_bytes]
    if not masked:
        return head + content
    return head + KEY + bytes(byte ^ KEY[i % 4] for i, byte in enumerate(content))


def assert_same(found: Ours, data: bytes) -> None:
    theirs = Theirs.of(data)
    assert found.messages == theirs.messages
    assert [event["text"] for event in found.others if "text" in event] == theirs.texts
    assert not any("bytes" in event for event in found.others)
    ended = [event["code"] for event in found.others if event["type"] == "websocket.disconnect"]
    assert ended == ([theirs.code] if theirs.code is not None else [])
    assert found.closed == (theirs.code is not None)
    assert found.transport.written.count(b"\x8a\x01p") == theirs.pongs


SMALL = frame(2, b"seven bits")
MEDIUM = frame(2, bytes(range(256)) * 2)
LARGE = frame(2, bytes(range(256)) * 260)
PING = frame(9, b"p")
STREAMS = {
    "7 bit length": SMALL,
    "16 bit length": MEDIUM,
    "empty": frame(2, b"") + SMALL,
    "125 and 126": frame(2, b"x" * 125) + frame(2, b"y" * 126),
    "length longer than it must be": frame(2, b"x" * 9, length_bytes=8) + frame(2, b"z", length_bytes=2) + SMALL,
    "fragments": frame(2, b"one ", fin=False) + frame(0, b"two ", fin=False) + frame(0, b"three") + SMALL,
    "pings between": SMALL + PING + frame(2, b"one ", fin=False) + PING + frame(0, b"two") + PING + SMALL,
    "text between": SMALL + frame(1, b"words") + SMALL,
    "close": SMALL + frame(8, struct.pack(">H", 1000)) + SMALL,
    "unmasked": SMALL + frame(2, b"bare", masked=False) + SMALL,
    "reserved bits": SMALL + bytes([0xC2]) + SMALL[1:] + SMALL,
    "unknown opcode": SMALL + frame(5, b"x") + SMALL,
    "begun twice": frame(2, b"one", fin=False) + SMALL + SMALL,
    "continued from nothing": SMALL + frame(0, b"x") + SMALL,
    "long ping": SMALL + frame(9, b"x" * 126) + SMALL,
    "pong that nobody asked for": SMALL + frame(10, b"x") + SMALL,
}


@pytest.mark.parametrize("name", STREAMS)
def test_bytes_cut_anywhere_give_the_same_messages(name: str) -> None:
    data = STREAMS[name]

    async def run() -> Iterator[Ours]:
        cuts = [[data], [data[i : i + 1] for i in range(len(data))]]
        cuts += [[data[:at], data[at:]] for at in range(1, min(len(data), 160))]
        cuts += [[data[:at], data[at : at + 1], data[at + 1 :]] for at in range(1, min(len(data), 60))]
        found = []
        for segments in cuts:
            one = Ours()
            await one.open()
            one.attach()
            one.feed(segments)
            await one.end()
            found.append(one)
        return iter(found)

    for one in asyncio.run(run()):
        assert_same(one, data)


@pytest.mark.parametrize("step", [1 << 10, 4093, 1 << 16])
def test_a_long_message_comes_in_segments(step: int) -> None:
    data = SMALL + LARGE + SMALL + LARGE
    assert_same(ours([data[at : at + step] for at in range(0, len(data), step)]), data)


@pytest.mark.parametrize("size", [MAX_BYTES, MAX_BYTES + 1])
def test_a_message_over_the_limit_is_refused_by_its_header(size: int) -> None:
    data = SMALL + frame(2, b"\0" * size)
    assert_same(ours([data]), data)
    head = len(SMALL) + 2 + 8  # up to its length
    found = ours([data[:head]])
    assert found.messages == [b"seven bits"]
    assert found.closed == (size > MAX_BYTES)
    if size > MAX_BYTES:
        assert found.transport.written[2:4] == struct.pack(">H", CloseCode.MESSAGE_TOO_BIG)


def test_fragments_over_the_limit_are_refused() -> None:
    part = b"\0" * (MAX_BYTES // 2)
    data = frame(2, part, fin=False) + frame(0, part, fin=False) + frame(0, b"x") + SMALL
    assert_same(ours([data[:100], data[100:]]), data)


def test_what_came_before_a_session_was_attached_comes_first() -> None:
    async def run() -> Ours:
        found = Ours()
        await found.open(before=SMALL)  # in the request's own segment
        found.feed([MEDIUM[:7]])
        found.attach()
        found.feed([MEDIUM[7:] + SMALL])
        await found.end()
        return found

    found = asyncio.run(run())
    assert found.messages == [b"seven bits", bytes(range(256)) * 2, b"seven bits"]
    assert not found.transport.paused


FRAMES = st.one_of(
    st.binary(max_size=300).map(lambda content: frame(2, content)),
    st.binary(max_size=40).map(lambda content: frame(2, content, length_bytes=8)),
    st.lists(st.binary(max_size=20), min_size=2, max_size=4).map(
        lambda parts: b"".join(
            frame(0 if i else 2, part, fin=i == len(parts) - 1) + PING * (i % 2) for i, part in enumerate(parts)
        )
    ),
    st.just(PING),
    st.just(frame(10, b"x")),
    st.just(frame(1, b"words")),
)
ENDS = st.sampled_from(
    [b"", b"", b"", frame(8, struct.pack(">H", 1001)), frame(2, b"x", masked=False), frame(3, b""), LARGE[:50],
     frame(2, b"\0" * (MAX_BYTES + 1)), frame(0, b"x"), frame(2, b"x", fin=False) + SMALL]
)  # fmt: skip


@given(st.lists(FRAMES, max_size=8), ENDS, st.data())
def test_any_frames_in_any_segments_give_what_websockets_gives(
    frames: list[bytes], end: bytes, data: st.DataObject
) -> None:
    stream = b"".join(frames) + end + (SMALL if end else b"")
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=12)))
    places = [0, *cuts, len(stream)]
    segments = [stream[a:b] for a, b in itertools.pairwise(places) if b > a]
    assert_same(ours(segments), stream)


@given(st.lists(st.integers(0, 70_000), max_size=6))
def test_what_is_written_is_what_a_device_reads(sizes: list[int]) -> None:
    async def run() -> bytes:
        found = Ours()
        await found.open()
        found.attach()
        for size in sizes:
            found.protocol.write(b"head" * min(1, size), memoryview(bytes(size)))
        await found.end()
        return bytes(found.transport.written)

    written = asyncio.run(run())
    at = 0
    for size in sizes:
        content = b"head" * min(1, size) + bytes(size)
        expected = Frame(Opcode.BINARY, content).serialize(mask=False)
        assert written[at : at + len(expected)] == expected
        at += len(expected)
    assert at == len(written)

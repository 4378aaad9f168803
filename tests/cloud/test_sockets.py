"""Messages of many sockets in one call: each comes whole to whom it belongs, however its bytes come and go."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cloud.conftest import Serving
from tests.support.fleet import DEPTH
from tests.support.player import Player, answer_to
from tests.support.service import ServiceProcess
from tests.support.wire import RANK
from websockets.frames import Frame as WebSocketFrame
from websockets.frames import Opcode

from privatelora.cloud import sockets as module
from privatelora.cloud.sockets import CHUNK_BYTES, Sockets, Volley, frame_start
from privatelora.decoder.compiled import load
from privatelora.protocol.frames import HEADER, Frame, Kind, Phase

LARGEST = 1 << 20
SOURCE = Path(module.__file__).with_name("sockets.c")
BUILT = SOURCE.with_name("libsockets.so")

compiled = pytest.mark.skipif(load(SOURCE) is None, reason="sockets.c was not compiled (no C compiler)")


class Transport(asyncio.Transport):
    """What is left to a transport: kept, and written when a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.left = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.left += data

    def get_write_buffer_size(self) -> int:
        return len(self.left)

    def is_closing(self) -> bool:
        return False


class End:
    """A session's socket, and the device's end of it."""

    def __init__(self, sockets: Sockets) -> None:
        self.sockets, self._transport = sockets, Transport()
        self.own, self.device = socket.socketpair()
        self.own.setblocking(False)
        self.device.setblocking(False)
        self.messages: list[bytes] = []
        self.bytes = bytearray()
        self.ended = 0
        sockets.add(self, self.file)

    @property
    def transport(self) -> asyncio.Transport:
        return self._transport

    @property
    def file(self) -> int:
        return self.own.fileno()

    def message(self, data: bytes) -> None:
        self.messages.append(data)

    def raw(self, data: bytes) -> bool:
        self.bytes += data
        return True

    def end(self) -> None:
        self.ended += 1
        self.sockets.remove(self.file)

    def pause(self, reason: str) -> None:
        self.sockets.pause(self.file)

    def resume(self, reason: str) -> None:
        self.sockets.resume(self.file)

    def answered(self) -> None:
        self.sockets.answered(self.file)

    def came(self) -> bytes:
        """What the device can read, once what the socket did not take has been written too."""
        data = bytearray()
        while True:
            with suppress(BlockingIOError):
                while part := self.device.recv(1 << 20):
                    data += part
            if not self._transport.left:
                return bytes(data)
            del self._transport.left[: self.own.send(self._transport.left)]


def sent_by_device(payload: bytes) -> bytes:
    return WebSocketFrame(Opcode.BINARY, payload).serialize(mask=True)


def header(number: int) -> bytes:
    return struct.pack("<Q", number) * (HEADER.size // 8)


Test = Callable[[Sockets], Coroutine[Any, Any, None]]


def run(test: Test) -> None:
    async def running() -> None:
        sockets = Sockets.create(LARGEST)
        assert sockets is not None
        await asyncio.wait_for(test(sockets), 20)

    asyncio.run(running())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (the condition is no event)
            await asyncio.sleep(0.001)


def volley(ends: list[End], row_bytes: int, due_bytes: int, took: list[tuple[int, bytes]]) -> Volley:
    """Row i is told header i and i again and again; its answer has header 100 + i."""

    def take(answered: Volley, rows: list[int]) -> None:
        took.extend((row, bytes(answered.answers[row * due_bytes : (row + 1) * due_bytes])) for row in rows)

    rows = range(len(ends))
    return Volley(
        ends,
        [end.file for end in ends],
        b"".join(map(header, rows)),
        b"".join(bytes([row]) * row_bytes for row in rows),
        b"".join(header(100 + row) for row in rows),
        due_bytes,
        take,
    )


@compiled
@pytest.mark.parametrize("size", [0, 1, 125, 126, 300, 65535, 65536, 100_000])
def test_a_message_comes_whole(size: int) -> None:
    async def test(sockets: Sockets) -> None:
        end, payloads = End(sockets), [os.urandom(size) for _ in range(2)]
        end.device.setblocking(True)
        sender = threading.Thread(target=end.device.sendall, args=(b"".join(map(sent_by_device, payloads)),))
        sender.start()
        whole = sum(len(sent_by_device(payload)) for payload in payloads)
        await until(lambda: sum(map(len, end.messages)) + len(end.bytes) >= 2 * size and not sender.is_alive())
        await asyncio.sleep(0.01)
        if end.bytes:  # cut by the socket: what could not be understood was handed on as it came, and all after it
            taken = b"".join(map(sent_by_device, end.messages))
            assert len(taken) + len(end.bytes) == whole
        assert end.messages == payloads[: len(end.messages)]

    run(test)


@compiled
def test_what_is_no_whole_binary_message_is_handed_on_as_it_came_and_what_follows_it_too() -> None:
    async def test(sockets: Sockets) -> None:
        for odd in (
            sent_by_device(b"x" * 200)[:50],
            WebSocketFrame(Opcode.TEXT, b"text").serialize(mask=True),
            WebSocketFrame(Opcode.PING, b"").serialize(mask=True),
            WebSocketFrame(Opcode.BINARY, b"not masked").serialize(mask=False),
            WebSocketFrame(Opcode.BINARY, b"a part", fin=False).serialize(mask=True),
            b"\x82\xff" + struct.pack(">Q", 1 << 63) + b"mask" + b"x",  # longer than anything
            b"\x82\xff" + struct.pack(">Q", LARGEST + 1) + b"mask" + b"x",
        ):
            end = End(sockets)
            end.device.send(sent_by_device(b"first") + odd)
            await until(lambda end=end, odd=odd: len(end.bytes) >= len(odd))
            end.device.send(sent_by_device(b"last"))
            await until(lambda end=end, odd=odd: len(end.bytes) > len(odd))
            assert end.messages == [b"first"]
            assert end.bytes.startswith(odd)

    run(test)


def posted(sockets: Sockets, count: int) -> tuple[list[End], list[tuple[int, bytes]]]:
    """So many sockets of which answers of five bytes are due, and what `take` is told of them."""
    ends, took = [End(sockets) for _ in range(count)], list[tuple[int, bytes]]()
    sockets.post(volley(ends, 8, 5, took))
    return ends, took


@compiled
def test_a_volley_is_told_to_each_and_its_answers_taken_in_any_order() -> None:
    async def test(sockets: Sockets) -> None:
        ends, took = posted(sockets, 40)
        for row, end in enumerate(ends):
            payload = header(row) + bytes([row]) * 8
            assert end.came() == frame_start(len(payload)) + payload
        answers = {row: bytes([row, 1, 2, 3, 4]) for row in range(len(ends))}
        for row in sorted(answers, key=lambda row: (row % 7, row)):
            ends[row].device.send(sent_by_device(header(100 + row) + answers[row]))
        await until(lambda: len(took) == len(ends))
        assert dict(took) == answers
        assert not any(end.messages or end.bytes for end in ends)
        assert not sockets._volleys and not sockets._missing

    run(test)


@compiled
@pytest.mark.parametrize(
    "wrong",
    [header(7) + b"12345", header(100) + b"1234", header(100) + b"123456", b""],
    ids=["another header", "too short", "too long", "empty"],
)
def test_what_is_not_the_answer_is_a_message_and_the_answer_is_due_still(wrong: bytes) -> None:
    async def test(sockets: Sockets) -> None:
        (end,), took = posted(sockets, 1)
        end.device.send(sent_by_device(wrong))
        await until(lambda: end.messages == [wrong])
        end.device.send(sent_by_device(header(100) + b"right") + sent_by_device(header(100) + b"again"))
        await until(lambda: len(end.messages) == 2)
        assert took == [(0, b"right")]
        assert end.messages[1] == header(100) + b"again"  # nothing is due of it any more

    run(test)


@compiled
def test_an_answer_that_came_another_way_or_never_will_is_not_waited_for() -> None:
    async def test(sockets: Sockets) -> None:
        ends, took = posted(sockets, 3)
        cut = sent_by_device(header(100) + b"piece")
        ends[0].device.send(cut[:20])
        await until(lambda: len(ends[0].bytes) == 20)
        ends[0].device.send(cut[20:])
        await until(lambda: len(ends[0].bytes) == len(cut))
        ends[0].answered()
        ends[1].device.close()
        await until(lambda: ends[1].ended == 1)
        assert sockets._missing == 1
        sockets.remove(ends[2].file)
        assert not sockets._volleys and not sockets._missing and not took

    run(test)


@compiled
def test_what_follows_the_beginning_of_a_frame_is_never_taken_for_another() -> None:
    async def test(sockets: Sockets) -> None:
        ends, _ = posted(sockets, 8)  # so that a read goes on for a moment, as eight answers are missing
        payload = b"\x82" * (2 * CHUNK_BYTES)  # messages of two bytes, wherever one begins to read
        wire = b"\x82\xff" + struct.pack(">Q", len(payload)) + bytes(4) + payload
        ends[0].device.setblocking(True)
        sender = threading.Thread(target=ends[0].device.sendall, args=(wire,))
        sender.start()
        await until(lambda: len(ends[0].bytes) == len(wire))
        sender.join()
        assert ends[0].bytes == wire
        assert not ends[0].messages

    run(test)


@compiled
@pytest.mark.parametrize("rows", [1, 3])
def test_what_a_socket_does_not_take_is_left_to_its_transport_in_order(rows: int) -> None:
    async def test(sockets: Sockets) -> None:
        ends, took = [End(sockets) for _ in range(rows)], list[tuple[int, bytes]]()
        for end in ends:
            end.own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sockets.post(volley(ends, 200_000, 5, took))
        full = ends[-1]
        assert full.transport.get_write_buffer_size() > 0
        assert sockets.clogged(full, full.file)
        payload = header(rows - 1) + bytes([rows - 1]) * 200_000
        assert full.came() == frame_start(len(payload)) + payload
        assert not sockets.clogged(full, full.file)

    run(test)


@compiled
def test_messages_to_one_socket_stay_in_order_though_it_is_full() -> None:
    async def test(sockets: Sockets) -> None:
        full, other = End(sockets), End(sockets)
        full.own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for number, end in ((1, full), (2, other), (3, full), (4, full)):
            sockets.write(end, end.file, b"head", bytes([number]) * 100_000)
        await until(lambda: full.transport.get_write_buffer_size() > 0)  # before the loop waited again
        assert full.came() == b"".join(b"head" + bytes([number]) * 100_000 for number in (1, 3, 4))
        assert other.came() == b"head" + b"\x02" * 100_000

    run(test)


@compiled
def test_a_paused_socket_is_not_read() -> None:
    async def test(sockets: Sockets) -> None:
        paused, other = End(sockets), End(sockets)
        paused.pause("a test")
        paused.pause("again")
        for end in (paused, other):
            end.device.send(sent_by_device(b"hello"))
        await until(lambda: other.messages == [b"hello"])
        assert not paused.messages
        paused.resume("a test")
        await until(lambda: paused.messages == [b"hello"])

    run(test)


@compiled
def test_a_flood_on_one_socket_keeps_no_other_from_being_read() -> None:
    async def test(sockets: Sockets) -> None:
        flooded, other = End(sockets), End(sockets)
        with suppress(BlockingIOError):
            while True:
                flooded.device.send(sent_by_device(b"x" * 10) * 100)
        other.device.send(sent_by_device(b"hello"))
        sockets.read()
        assert other.messages == [b"hello"] or len(flooded.messages) * 16 <= CHUNK_BYTES
        await until(lambda: other.messages == [b"hello"])

    run(test)


def test_without_its_library_or_with_that_of_another_source_there_is_none(tmp_path: Path) -> None:
    source = tmp_path / SOURCE.name
    assert load(source) is None
    if BUILT.exists():
        shutil.copy(BUILT, tmp_path)
        source.write_text("/* edited since */")
        assert load(source) is None


def test_both_packages_compile_in_the_same_way() -> None:
    root = Path(__file__).parents[2]
    hooks = [(root / project / "hatch_build.py").read_text() for project in ("decoder", "cloud_backbone")]
    assert hooks[0] == hooks[1]


# -- in a service -----------------------------------------------------------------------------------------------------

SESSIONS, TOKENS = 8, 3


@pytest.fixture(scope="module")
def running(serving: Serving) -> Iterator[ServiceProcess]:
    with serving() as started:
        yield started


class Slicing(Player):
    """Sends every message in pieces, as a network may."""

    def send(self, message: Frame | bytes | str) -> None:
        if not isinstance(message, Frame):
            super().send(message)
            return
        message.session = message.session or self.session
        data = sent_by_device(message.pack())
        plain = self.socket.socket
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in (data[:3], data[3:40], data[40:]):
            plain.sendall(piece)


def decoded_together(running: ServiceProcess, players: list[Player]) -> list[list[np.ndarray[Any, Any]]]:
    """What each came to, a layer at a time: nobody answers before all have been told."""
    results: list[list[np.ndarray[Any, Any]]] = [[] for _ in players]
    for number, player in enumerate(players):
        results[number] += player.run(Phase.GENERATE, (0, 0, 5 + number))[-1:]
    for token in range(TOKENS):
        for number, player in enumerate(players):
            player.begin(Phase.GENERATE, (0, 5 + number + token, 1))
        going = list(enumerate(players))
        while going:
            told = [(number, player, player.next()) for number, player in going]
            going = []
            for number, player, frame in told:
                answer = answer_to(frame)
                if answer is None:
                    results[number].append(frame.array())
                else:
                    player.send(answer)
                    going.append((number, player))
    return results


def test_answers_that_come_in_pieces_among_others_are_theirs(running: ServiceProcess) -> None:
    with ExitStack() as stack:
        kinds = [Slicing if number % 3 == 0 else Player for number in range(SESSIONS)]
        players = [stack.enter_context(kind(running.url, running.token)) for kind in kinds]
        for player in players:
            player.enter()
        together = decoded_together(running, players)
    for number, mine in enumerate(together):
        with Player(running.url, running.token) as alone:
            alone.enter()
            own = [*alone.run(Phase.GENERATE, (0, 0, 5 + number))[-1:], *alone.decode(0, 5 + number, TOKENS)]
        assert len(mine) == len(own) == 1 + TOKENS
        for found, due in zip(mine, own, strict=True):
            assert np.linalg.norm(found - due) < 1e-5 * np.linalg.norm(due)


@pytest.mark.parametrize("kind", [Player, Slicing])
def test_every_payload_is_charged_once_whatever_way_it_came(serving: Serving, kind: type[Player]) -> None:
    with serving() as running, ExitStack() as stack:
        players = [stack.enter_context(kind(running.url, running.token)) for _ in range(SESSIONS)]
        for player in players:
            player.enter()
        decoded_together(running, players)
        running.stop()  # which says what was charged
        charged = json.loads(running.log.read_text().splitlines()[-1])["spent"]
    layers, d, float_bytes = DEPTH, 64, 4
    u, v = RANK * float_bytes, 3 * RANK * float_bytes
    rows = [5 + number + TOKENS for number in range(SESSIONS)]
    assert list(charged.values()) == [[sum(rows) * (d * float_bytes + layers * way) for way in (v, u)]]


def all_told(running: ServiceProcess, stack: ExitStack) -> tuple[list[Player], list[Frame]]:
    """Sessions that decode, and u of layer 0 that each was told; none has answered."""
    players = [stack.enter_context(Player(running.url, running.token)) for _ in range(SESSIONS)]
    for player in players:
        player.enter()
        player.run(Phase.GENERATE, (0, 0, 5))
        player.begin(Phase.GENERATE, (0, 5, 1))
    return players, [player.next() for player in players]


def others_go_on(players: list[Player], told: list[Frame]) -> None:
    """All but the first answer, and get their token."""
    for player, frame in list(zip(players, told, strict=True))[1:]:
        answer = answer_to(frame)
        assert answer is not None
        player.send(answer)
        assert player.go_on()[-1].shape == (1, 64)


def test_a_wrong_answer_among_others_ends_that_session_only(running: ServiceProcess) -> None:
    with ExitStack() as stack:
        players, told = all_told(running, stack)
        assert {frame.kind for frame in told} == {Kind.ENCODED}
        wrong = answer_to(told[0])
        assert wrong is not None
        wrong.layer = 1
        players[0].send(wrong)
        error = players[0].ended()
        assert error.code == "protocol"
        assert "DELTA of layer 0 in GENERATE is due" in str(error)
        others_go_on(players, told)


def test_an_answer_that_comes_twice_ends_that_session_only(running: ServiceProcess) -> None:
    with ExitStack() as stack:
        players, told = all_told(running, stack)
        twice = answer_to(told[0])
        assert twice is not None
        twice.session = players[0].session
        players[0].socket.socket.sendall(2 * sent_by_device(twice.pack()))
        error = players[0].ended()
        assert error.code == "protocol"
        assert "must not be repeated" in str(error)
        others_go_on(players, told)

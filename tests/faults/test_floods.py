"""Too much, too long and too slow: the service's memory stays bounded, and a healthy session beside it notices nothing.

The attacks run in threads of this process for a few seconds while alice's session (the `bystander` of conftest.py)
works and its numbers are compared; the service's peak of resident memory is the kernel's.
"""

from __future__ import annotations

import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from urllib.parse import urlsplit

import pytest
from tests.faults.conftest import LIMITS, TOKENS, Bystander, Target
from tests.support.fleet import Fleet
from tests.support.service import ServiceProcess, plane
from tests.support.wire import HIDDEN_SIZE, Wire, announced, begin, open_frame
from websockets.exceptions import ConnectionClosed, InvalidStatus

from privatelora.protocol.errors import AdmissionError, ProtocolError
from privatelora.protocol.frames import Frame, Kind
from privatelora.protocol.messages import DATA_PLANE_PATH, INFO_PATH, Opened, parse

MIB = 1 << 20
ATTACK_S = 2.0
HANDSHAKE_TIMEOUT_S = 10.0  # of cloud/guards.py
HALF_A_REQUEST = f"GET {INFO_PATH} HTTP/1.1\r\nHost: x\r\n".encode()


@contextmanager
def memory_stays_bounded(target: Target, bystander: Bystander, room: int = 48 * MIB) -> Iterator[None]:
    """While the block runs, the service may take so much; its buffers and a pass or three are some of that."""
    bystander.assert_untouched()
    target.running.forget_peak()
    before = target.running.memory_bytes()
    yield
    bystander.assert_untouched()
    grown = target.running.memory_bytes(peak=True) - before
    assert grown < room, f"{grown / MIB:.0f} MiB"


@contextmanager
def attack(
    bystander: Bystander, work: Callable[[float], int], at_least: int, seconds: float = ATTACK_S
) -> Iterator[None]:
    """Run `work` until a time in a thread, with the bystander at work beside it; it must have sent so many bytes."""
    sent: list[int] = []
    attacker = threading.Thread(target=lambda: sent.append(work(time.monotonic() + seconds)))
    attacker.start()
    try:
        while attacker.is_alive():
            bystander.assert_untouched()
        yield
    finally:
        attacker.join()
    assert sent and sent[0] >= at_least, sent  # else it was no flood


@pytest.fixture(scope="module", autouse=True)
def used_before(target: Target) -> None:
    """The allocator of a service that has served as much as it may before."""
    with Wire(target.url, TOKENS["mallory"]) as wire:
        wire.open(target.info, placement={"first": 2, "last": 2})
        for step in range(1, 10):
            assert wire.answer(big_pass(step)).shape == (2048, HIDDEN_SIZE)


# -- floods -----------------------------------------------------------------------------------------------------------


def big_pass(step: int, session: int = 0) -> Frame:
    """2048 tokens, half a MiB each way."""
    return begin([(s, 0, 512) for s in range(4)], step=step, session=session)


def test_who_never_reads_is_not_computed_for_without_end(target: Target, bystander: Bystander) -> None:
    """Passes without inline layers are one request and one answer: the answers must not pile up in the service."""

    def flood(until: float) -> int:
        with bare_session(target, placement={"first": 2, "last": 2}) as (raw, session):
            return send_until(until, raw, lambda sent: websocket(big_pass(step=sent + 1, session=session).pack()))

    with memory_stays_bounded(target, bystander), attack(bystander, flood, at_least=2 * MIB, seconds=4.0):
        pass


def test_pings_without_end_are_not_answered_without_end(target: Target, bystander: Bystander) -> None:
    pings = websocket(b"x" * 125, opcode=9) * 500

    def flood(until: float) -> int:
        with bare_session(target) as (raw, _):
            return send_until(until, raw, lambda sent: pings)

    with memory_stays_bounded(target, bystander, room=8 * MIB), attack(bystander, flood, at_least=4 * MIB):
        pass


def send_until(until: float, raw: socket.socket, message: Callable[[int], bytes]) -> int:
    """Send messages, by their number, as fast as they are taken and read nothing; how many bytes went out."""
    raw.settimeout(0.2)
    total = number = 0
    while time.monotonic() < until:
        data = memoryview(message(number))
        number += 1
        while data and time.monotonic() < until:
            with suppress(TimeoutError):
                count = raw.send(data)
                data, total = data[count:], total + count
    return total


@pytest.mark.parametrize("name", ["header", "headers", "url", "body"])
def test_a_request_without_end_is_cut(target: Target, bystander: Bystander, name: str) -> None:
    beginning, part = {
        "header": (HALF_A_REQUEST + b"X-Endless: ", b"x" * 65536),
        "headers": (HALF_A_REQUEST, b"X-Another: y\r\n" * 4096),
        "url": (b"GET /", b"x" * 65536),
        "body": (HALF_A_REQUEST + b"Content-Length: 1000000000\r\n\r\n", b"x" * 65536),
    }[name]

    def flood(until: float) -> int:
        sent = 0
        while time.monotonic() < until:
            with bare_socket(target) as raw, suppress(OSError):
                raw.sendall(beginning)
                while time.monotonic() < until:
                    raw.sendall(part)
                    sent += len(part)
        return sent

    with memory_stays_bounded(target, bystander), attack(bystander, flood, at_least=MIB, seconds=1.0):
        pass


def test_an_oversize_message_is_refused_before_it_is_whole(target: Target, bystander: Bystander) -> None:
    limit = target.info.limits.max_message_bytes
    with memory_stays_bounded(target, bystander):
        with bare_session(target) as (raw, _):
            raw.sendall(websocket_head(limit + 1))  # only says that it will be too long
            assert close_code(raw) == 1009
        for _ in range(5):
            with bare_session(target) as (raw, _), suppress(OSError):
                raw.sendall(websocket(b"\0" * (16 * limit)))


def test_an_oversize_message_in_fragments_is_refused(target: Target, bystander: Bystander) -> None:
    limit, part = target.info.limits.max_message_bytes, 65_536
    with memory_stays_bounded(target, bystander), bare_session(target) as (raw, _):
        for number in range(limit // part):
            raw.sendall(websocket_head(part, opcode=0 if number else 2, last=False) + b"\0" * part)
        raw.sendall(websocket_head(part, opcode=0))
        assert close_code(raw) == 1009


def test_frames_without_waiting_are_served_or_refused(target: Target, bystander: Bystander) -> None:
    def flood(until: float) -> int:
        sent = 0
        while time.monotonic() < until:
            with Wire(target.url, TOKENS["mallory"]) as wire, suppress(ConnectionClosed):
                wire.open(target.info)
                for step in range(1, 100):
                    wire.send(big_pass(step))
                    sent += big_pass(step).payload_bytes
        return sent

    with memory_stays_bounded(target, bystander), attack(bystander, flood, at_least=8 * MIB):
        pass


def test_sessions_beyond_the_limit_are_told_when_to_come_back(target: Target, bystander: Bystander) -> None:
    with ExitStack() as opened:
        for _ in range(LIMITS["max_sessions"] - 1):  # alice has one
            opened.enter_context(Wire(target.url, TOKENS["mallory"])).open(target.info)
        late = opened.enter_context(Wire(target.url, TOKENS["mallory"]))
        late.send(open_frame(target.info))
        refused = late.refusal()
        assert refused.code == AdmissionError.code
        assert refused.retry_after_s is not None
        assert "try again" in refused.message
        bystander.assert_untouched()
    wait_for(lambda: can_open(target))  # the others have left


def test_a_device_waits_for_room_as_long_as_it_was_told(fleet: Fleet, target: Target, bystander: Bystander) -> None:
    with ExitStack() as opened:
        for _ in range(LIMITS["max_sessions"] - 1):
            opened.enter_context(Wire(target.url, TOKENS["mallory"])).open(target.info)
        late = {"token": TOKENS["alice"], "rank": 8, "placement": "one-trip"}
        with (
            fleet.connect(target.running, retry_s=0.0, **late) as hasty,
            pytest.raises(AdmissionError, match="try again"),
        ):
            hasty.generate("hello", max_new_tokens=2)
        leaving = threading.Timer(1.0, opened.close)
        leaving.start()
        begun = time.monotonic()
        with fleet.connect(target.running, **late) as patient:
            assert patient.generate("hello", max_new_tokens=2)
        assert time.monotonic() - begun >= 5
        leaving.join()
    bystander.assert_untouched()


def test_connections_without_a_session_are_limited_too(target: Target, bystander: Bystander) -> None:
    with memory_stays_bounded(target, bystander), ExitStack() as opened:
        answers = []
        for _ in range(150):
            raw = opened.enter_context(bare_socket(target))
            answers.append(upgrade(raw))
        accepted = [answer for answer in answers if b" 101 " in answer]
        refused = [answer for answer in answers if b" 429 " in answer]
        assert len(accepted) + len(refused) == 150
        assert 20 <= len(accepted) <= LIMITS["max_sessions"] + 64
        assert all(b"retry-after: 5" in answer.lower() for answer in refused)
        bystander.assert_untouched()
    wait_for(lambda: can_open(target))


def test_hundreds_of_connections_that_say_nothing_harm_nobody(target: Target, bystander: Bystander) -> None:
    with memory_stays_bounded(target, bystander), ExitStack() as opened:
        for _ in range(400):
            opened.enter_context(bare_socket(target))
        bystander.assert_untouched()
        with Wire(target.url, TOKENS["mallory"]) as wire:  # others still come in
            wire.open(target.info)


def can_open(target: Target) -> bool:
    try:
        with Wire(target.url, TOKENS["mallory"]) as wire:
            return wire.open(target.info) > 0
    except (InvalidStatus, ProtocolError):  # refused at the door, or answered by ERROR
        return False


# -- too slow ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def impatient(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service that ends a session after a second and a half of silence."""
    fleet.service("llama")
    data_dir = tmp_path_factory.mktemp("impatient") / "data"
    shutil.copytree(fleet.data_dir("llama"), data_dir)
    with plane(fleet.source("llama"), data_dir, TOKENS, idle_timeout_s=1.5) as running:
        yield running


def test_a_silent_session_is_ended_and_told_so(impatient: ServiceProcess) -> None:
    with Wire(impatient.url, TOKENS["mallory"]) as wire:
        wire.open(announced(impatient.url, TOKENS["mallory"]))
        begun = time.monotonic()
        refused = wire.refusal()
        assert 1.0 < time.monotonic() - begun < 5
        assert refused.code == "connection_lost"  # which an honest device answers by connecting again
        assert "connect again" in refused.message


def test_a_message_that_never_ends_is_not_waited_for(impatient: ServiceProcess) -> None:
    with Wire(impatient.url, TOKENS["mallory"]) as wire:
        wire.open(announced(impatient.url, TOKENS["mallory"]))
        raw = wire.socket.socket
        raw.sendall(b"\x82\xff" + struct.pack(">Q", MIB) + b"\0\0\0\0")
        begun = time.monotonic()
        with suppress(OSError):
            while time.monotonic() - begun < 5:  # a byte now and then keeps TCP alive, but is no message
                raw.sendall(b"\0")
                time.sleep(0.1)
        assert 1.0 < time.monotonic() - begun < 4


def test_a_device_that_was_silent_for_too_long_goes_on(impatient: ServiceProcess, fleet: Fleet) -> None:
    with fleet.connect(impatient, token=TOKENS["alice"], placement="paper", rank=8) as me:
        text = me.generate("once upon", max_new_tokens=20)
        stream = me.stream("once upon", max_new_tokens=20)
        begun = next(stream)
        time.sleep(2.5)  # its user reads
        assert begun + "".join(stream) == text
        time.sleep(2.5)
        assert me.forward_backward(me.examples(["some text"]).examples).loss > 0


def test_slow_requests_are_cut_at_the_deadline(target: Target, bystander: Bystander) -> None:
    """Six ways to hold a connection for ever, side by side."""
    beginnings = {
        "nothing": b"",
        "half a head": HALF_A_REQUEST,
        "half a head after a whole request": HALF_A_REQUEST + b"\r\n" + HALF_A_REQUEST,
        "half a body": HALF_A_REQUEST + b"Content-Length: 100\r\n\r\nx",
        "no OPEN after the upgrade": UPGRADE,
        "half a frame after the upgrade": b"",
    }
    drips = {"half a head": b"X-A: b\r\n", "half a head after a whole request": b"X-A: b\r\n", "half a body": b"x"}
    ended: dict[str, float] = {}
    begun = time.monotonic()

    def hold(name: str) -> None:
        with bare_socket(target) as raw:
            raw.settimeout(0.5)
            if name == "half a frame after the upgrade":
                upgrade(raw)
                raw.sendall(websocket_head(MIB))
            else:
                raw.sendall(beginnings[name])
            with suppress(OSError):
                while time.monotonic() - begun < 3 * HANDSHAKE_TIMEOUT_S:
                    if name in drips:
                        raw.sendall(drips[name])
                    with suppress(TimeoutError):
                        if not raw.recv(65536):
                            break
        ended[name] = time.monotonic() - begun

    holders = [threading.Thread(target=hold, args=(name,)) for name in beginnings]
    for holder in holders:
        holder.start()
    while any(holder.is_alive() for holder in holders):
        bystander.assert_untouched()
        time.sleep(0.2)
    assert ended.keys() == beginnings.keys()
    late = {name: seconds for name, seconds in ended.items() if not seconds < HANDSHAKE_TIMEOUT_S + 3}
    assert late == {}


# -- bare sockets: nothing reads or answers behind the test's back ----------------------------------------------------

UPGRADE = (
    f"GET {DATA_PLANE_PATH} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    f"Authorization: Bearer {TOKENS['mallory']}\r\n\r\n"
).encode()


def bare_socket(running: Target | ServiceProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", urlsplit(running.url).port), timeout=10)


@contextmanager
def bare_session(running: Target | ServiceProcess, **changes: object) -> Iterator[tuple[socket.socket, int]]:
    """A session on a socket that is read from no more, and its number."""
    with bare_socket(running) as raw:
        upgrade(raw)
        raw.sendall(websocket(open_frame(announced(running.url, TOKENS["mallory"]), **changes).pack()))
        answer = raw.recv(65536)  # shorter than 126 bytes: two of head
        assert answer[1] == len(answer) - 2
        opened = Frame.unpack(answer[2:])
        assert opened.kind is Kind.OPENED
        yield raw, parse(opened.payload, Opened).session


def upgrade(raw: socket.socket) -> bytes:
    """Ask for a WebSocket; the answer."""
    raw.sendall(UPGRADE)
    return raw.recv(65536)


def websocket_head(length: int, opcode: int = 2, last: bool = True) -> bytes:
    """The beginning of a WebSocket frame (RFC 6455, section 5.2), with a mask of zeros."""
    return bytes([opcode | (0x80 if last else 0), 0xFF]) + struct.pack(">Q", length) + b"\0\0\0\0"


def websocket(content: bytes, opcode: int = 2) -> bytes:
    if opcode == 9:  # control frames have short lengths
        return bytes([0x80 | opcode, 0x80 | len(content)]) + b"\0\0\0\0" + content
    return websocket_head(len(content), opcode) + content


def close_code(raw: socket.socket) -> int:
    """The code of the service's closing frame, which must be all that comes."""
    answer = raw.recv(65536)
    assert answer[0] == 0x88
    return int.from_bytes(answer[2:4], "big")


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_passes_of_these_floods_are_as_large_as_they_say() -> None:
    assert big_pass(1).payload_bytes == 2048 * HIDDEN_SIZE * 4

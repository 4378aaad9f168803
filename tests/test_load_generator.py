"""The load generator's device speaks the wire as a device of the SDK does: the same v, whatever way the bytes come.

Every test runs with the compiled code and without.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from benchmarks import light_device
from benchmarks.light_device import Devices, LightDevice
from websockets.frames import Frame as WsFrame
from websockets.frames import Opcode
from websockets.protocol import OPEN, SERVER, Protocol

from privatelora.protocol.adapter import AdapterSpec, ModelShape
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.errors import AdmissionError, ConnectionLostError, ProtocolError
from privatelora.protocol.frames import Frame, Kind, Phase, Selection
from privatelora.protocol.messages import ErrorInfo, control_frame
from privatelora.protocol.placement import Placement

SESSION, D, VOCABULARY, PROMPT, DECODED = 77, 48, 20, 5, 3
SPEC = AdapterSpec("calibrated", 64, 64)
PLACEMENT = Placement(inline=(1, 3))


@pytest.fixture(params=["compiled", "python"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(light_device, "_library", lambda: None)
    elif light_device._library() is None:
        pytest.skip("no C compiler here")


class Peer:
    """A load of one device, and the service's end of its socket."""

    def __init__(self, placement: Placement = PLACEMENT) -> None:
        near, self.socket = socket.socketpair()
        near.setblocking(False)
        self.socket.settimeout(5)
        self.random = np.random.default_rng(3)
        self.embedding = self.random.integers(0, 1 << 14, (VOCABULARY, D)).astype("<u2")
        m = [self.random.standard_normal((64, 192)).astype(np.float32) for _ in placement.inline]
        self.tokens = self.random.integers(0, VOCABULARY, PROMPT + DECODED)
        self.finished: list[str] = []
        self.shared = Devices(SPEC)
        info = SimpleNamespace(model=SimpleNamespace(shape=ModelShape(D, 4, D, D, D)))
        load: Any = SimpleNamespace(
            info=info, placement=placement, spec=SPEC, shared=self.shared,
            embedding=self.embedding, decoded=DECODED, open=lambda: (near, SESSION),
            prefilled=lambda device: self.finished.append("prefill"), next_token=LightDevice.decode,
            done=lambda device: self.finished.append("done"),
        )  # fmt: skip
        self.device = LightDevice(load, 0, m, self.tokens)
        self._websocket = Protocol(SERVER, state=OPEN)

    def receive(self) -> Frame:
        """What the device sent, by an independent reading of the WebSocket."""
        events: list[Any] = []
        while not events:
            self._websocket.receive_data(self.socket.recv(1 << 18))
            events = self._websocket.events_received()
        assert isinstance(events[0], WsFrame) and events[0].opcode is Opcode.BINARY
        return Frame.unpack(bytes(events[0].data))

    def send(self, frame: Frame, pieces: int = 1) -> None:
        """Send a frame to the device in that many writes, each of which it reads by itself."""
        data = frame.pack()
        message = (
            struct.pack(">BB", 0x82, len(data)) if len(data) < 126 else struct.pack(">BBH", 0x82, 126, len(data))
        ) + data
        for piece in np.array_split(np.frombuffer(message, np.uint8), pieces):
            self.socket.sendall(piece.tobytes())
            self.shared.serve(0)

    def run_pass(self, step: int, n: int, pieces: int) -> None:
        """One pass over n tokens, every answer checked."""
        held = int(self.device.held) - n
        begin = self.receive()
        assert (begin.kind, begin.session, begin.phase, begin.step) == (Kind.HIDDEN, SESSION, Phase.GENERATE, step)
        assert begin.selection is Selection.LAST and begin.spans.tolist() == [[1, held, n]]
        assert np.array_equal(begin.array(), self.embedding[self.tokens[held : held + n]])
        for stage, layer in enumerate(PLACEMENT.inline):
            u = self.random.standard_normal((n, 1, 64)).astype(np.float32).view(np.uint32) >> 16
            frame = Frame(Kind.ENCODED, SESSION, Phase.GENERATE, step, 0, layer)
            self.send(frame.with_array(u.astype("<u2"), WireDtype.BFLOAT16), pieces)
            answer = self.receive()
            assert (answer.kind, answer.step, answer.layer, answer.shape) == (Kind.DELTA, step, layer, (n, 3, 64))
            exact = (u << 16).view(np.float32)[:, 0] @ self.device.m[stage]
            came = (answer.array().astype(np.uint32) << 16).view(np.float32).reshape(n, -1)
            assert np.allclose(came, exact, rtol=2**-8, atol=1e-5)
        h = Frame(Kind.HIDDEN, SESSION, Phase.GENERATE, step)
        self.send(h.with_array(np.zeros((1, D), "<u2"), WireDtype.BFLOAT16), pieces)


@pytest.mark.parametrize("pieces", [1, 2, 50])
def test_light_device_answers_with_its_m_times_u(pieces: int) -> None:
    peer = Peer()
    peer.device.prefill()
    peer.run_pass(1, PROMPT, pieces)
    assert peer.finished == ["prefill"]
    peer.device.decode()
    for step in range(2, 2 + DECODED):
        peer.run_pass(step, 1, pieces)
    assert peer.finished == ["prefill", "done"]
    assert len(peer.device.times) == DECODED
    compiled = peer.shared.compiled and pieces == 1
    assert peer.device.state.exchanges == compiled * peer.device.exchanges
    assert all(begun <= done for begun, done in peer.device.times)


def test_light_device_raises_what_the_service_says() -> None:
    peer = Peer()
    peer.device.decode()
    with pytest.raises(AdmissionError, match="no room"):
        peer.send(control_frame(Kind.ERROR, ErrorInfo(code="admission", message="no room"), SESSION))


def test_light_device_refuses_a_frame_that_is_not_due() -> None:
    peer = Peer()
    peer.device.decode()
    wrong = Frame(Kind.ENCODED, SESSION, Phase.GENERATE, 1, 0, 3).with_array(
        np.ones((1, 1, 64), "<u2"), WireDtype.BFLOAT16
    )
    with pytest.raises(ProtocolError, match="u of layer 1"):
        peer.send(wrong)


def test_light_device_names_a_closed_connection() -> None:
    peer = Peer()
    peer.device.decode()
    peer.socket.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionLostError, match="closed"):
        peer.shared.serve(0)


def test_a_token_that_is_due_is_not_kept_waiting_by_others_exchanges() -> None:
    peer = Peer(Placement(inline=tuple(range(200))))
    peer.device.decode()
    peer.receive()

    def answer_slowly() -> None:
        for layer in range(200):
            frame = Frame(Kind.ENCODED, SESSION, Phase.GENERATE, 1, 0, layer)
            data = frame.with_array(np.ones((1, 1, 64), "<u2"), WireDtype.BFLOAT16).pack()
            peer.socket.sendall(struct.pack(">BBH", 0x82, 126, len(data)) + data)
            peer.receive()
            time.sleep(1e-3)

    answering = threading.Thread(target=answer_slowly)
    answering.start()
    due = time.monotonic() + 0.05
    while time.monotonic() < due:
        peer.shared.serve(5.0, due)
    assert peer.device.state.stage < 150  # of 200 exchanges, which take 0.2 s and more
    while peer.device.state.stage < 200 and answering.is_alive():
        peer.shared.serve(0.01)
    answering.join()
    assert peer.device.state.stage == 200
    peer.device.decode(due)
    assert peer.device.begun_at == due

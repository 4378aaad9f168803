"""A device without manners: it says anything on the data plane, and reports how the service ended it.

`Wire` is one WebSocket. `begin`, `delta` and their like build the frames of an honest device, for tests to spoil; OPEN
and its variations come from what the service announces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from privatelora.device.service import Service
from privatelora.protocol.adapter import AdapterSpec
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.frames import NO_LAYER, Frame, Kind, Phase
from privatelora.protocol.messages import DATA_PLANE_PATH, ErrorInfo, Opened, OpenRequest, ServiceInfo, parse
from privatelora.protocol.placement import Placement

HIDDEN_SIZE = 64  # of the tiny models
RANK = 8
ANSWER_TIMEOUT_S = 20.0


class Wire:
    """A WebSocket to the data plane of `url`, with `session` once `open` was answered."""

    def __init__(self, url: str, token: str | None, headers: Mapping[str, str] | None = None) -> None:
        bearer = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._connecting = connect(
            url.replace("http", "ws", 1) + DATA_PLANE_PATH,
            additional_headers=bearer | dict(headers or {}),
            compression=None,
            max_size=None,
            ping_interval=None,
            open_timeout=ANSWER_TIMEOUT_S,
        )
        self.session = 0
        self.moved = [0, 0]  # payload bytes up and down

    def __enter__(self) -> Self:
        self.socket = self._connecting.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.socket.close_socket()

    def open(self, info: ServiceInfo, **changes: Any) -> int:
        """OPEN, and the number of the session."""
        self.send(open_frame(info, **changes))
        self.session = parse(self.receive().payload, Opened).session
        return self.session

    def send(self, message: Frame | bytes | str) -> None:
        if isinstance(message, Frame):
            message.session = message.session or self.session
            self.moved[0] += message.payload_bytes
            message = message.pack()
        self.socket.send(message)

    def receive(self) -> Frame:
        data = self.socket.recv(timeout=ANSWER_TIMEOUT_S)
        assert isinstance(data, bytes)
        frame = Frame.unpack(data)
        self.moved[1] += frame.payload_bytes
        return frame

    def answer(self, message: Frame) -> Frame:
        self.send(message)
        return self.receive()

    def refusal(self) -> ErrorInfo:
        """The ERROR that ends this session; everything that comes before it is read away."""
        while (frame := self.receive()).kind is not Kind.ERROR:
            pass
        info = parse(frame.payload, ErrorInfo)
        try:
            self.socket.recv(timeout=ANSWER_TIMEOUT_S)
        except ConnectionClosed as closed:
            assert closed.rcvd is not None
            assert (closed.rcvd.code, closed.rcvd.reason) == (1008, info.code)
            return info
        raise AssertionError("the service said more after ERROR")

    def close_code(self) -> int:
        """The WebSocket code with which the service ends this connection without a word."""
        try:
            while True:
                self.socket.recv(timeout=ANSWER_TIMEOUT_S)
        except ConnectionClosed as closed:
            assert closed.rcvd is not None, "the connection ended without a code"
            return closed.rcvd.code


def announced(url: str, token: str) -> ServiceInfo:
    service = Service(url, token)
    service.close()
    return service.info


def open_frame(info: ServiceInfo, **changes: Any) -> Frame:
    """OPEN as an honest device sends it, with some fields changed."""
    request = OpenRequest(
        model_hash=info.model.sha256,
        set_hash=info.default_sets["calibrated"],
        spec=AdapterSpec("calibrated", RANK, RANK),
        placement=Placement.parse("paper", info.model.shape.layers),
        wire_dtype="float32",
    )
    return json_frame(msgspec.to_builtins(request) | changes)


def json_frame(content: Any) -> Frame:
    payload = msgspec.json.encode(content)
    return Frame(Kind.OPEN, shape=(len(payload),), payload=payload)


def tensor(*shape: int, dtype: WireDtype = WireDtype.FLOAT32) -> np.ndarray[Any, Any]:
    """Random numbers of a wire type (bfloat16 is not needed)."""
    values = np.random.default_rng(0).standard_normal(shape)
    return values.astype(np.float16 if dtype is WireDtype.FLOAT16 else np.float32)


def begin(
    spans: Sequence[tuple[int, int, int]] = ((0, 0, 3),),
    phase: Phase = Phase.SCORE,
    step: int = 1,
    stream: int = 0,
    shape: tuple[int, ...] | None = None,
    dtype: WireDtype = WireDtype.FLOAT32,
    **fields: Any,
) -> Frame:
    """h_first of a pass over `spans` (sequence, start, length)."""
    rows = sum(length for _, _, length in spans)
    frame = Frame(Kind.HIDDEN, phase=phase, step=step, stream=stream, layer=NO_LAYER)
    frame.spans = np.array(spans, np.uint32).reshape(-1, 3)
    frame.with_array(tensor(*(shape or (rows, HIDDEN_SIZE)), dtype=dtype), dtype)
    for name, value in fields.items():
        setattr(frame, name, value)
    return frame


def reply(to: Frame, kind: Kind, *shape: int, phase: Phase | None = None, layer: int | None = None) -> Frame:
    """An answer of this kind to a frame that came."""
    frame = Frame(kind, phase=to.phase if phase is None else phase, step=to.step, stream=to.stream)
    frame.layer = to.layer if layer is None else layer
    return frame.with_array(tensor(*shape), WireDtype.FLOAT32)


def delta(to: Frame, **fields: Any) -> Frame:
    """v for a u that came."""
    return reply(to, Kind.DELTA, to.shape[0], 3, RANK, **fields)

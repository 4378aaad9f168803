"""A device at the level of frames that plays by the rules, and stops wherever a test wants it to.

What it computes follows from the frame that came, so that a pass has one result whoever else is served.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tests.support.wire import RANK, Wire, announced, begin, open_frame
from websockets.exceptions import ConnectionClosed

from privatelora.protocol.codec import WireDtype
from privatelora.protocol.errors import ConnectionLostError, PrivateLoraError, error_from_code
from privatelora.protocol.frames import Frame, Kind, Phase, Selection
from privatelora.protocol.messages import ErrorInfo, Opened, Queued, ServiceInfo, parse

Stop = Callable[[Frame], bool]
"""whether to leave a frame that came unanswered"""


class Player(Wire):
    """One session, with the places that it was told and the steps that it began."""

    def __init__(self, url: str, token: str, info: ServiceInfo | None = None) -> None:
        super().__init__(url, token)
        self.info = info or announced(url, token)
        self.places: list[tuple[int, int]] = []
        self.step = 0
        self.kept: Frame | None = None  # the answer that `stop` kept back

    def enter(self, **changes: Any) -> int:
        """A session, after a wait if need be."""
        self.send(open_frame(self.info, **changes))
        self.session = parse(self.next().payload, Opened).session
        return self.session

    def send(self, message: Frame | bytes | str) -> None:
        """Send a message; where the service has closed the connection, raise its reason."""
        try:
            super().send(message)
        except ConnectionClosed as closed:
            raise _reason(closed) from None

    def receive(self) -> Frame:
        """Whatever frame comes next; where the service has closed the connection, its reason is raised."""
        try:
            return super().receive()
        except ConnectionClosed as closed:
            raise _reason(closed) from None

    def next(self) -> Frame:
        """The next frame that is no QUEUED; an ERROR is raised."""
        while (frame := self.receive()).kind is Kind.QUEUED:
            queued = parse(frame.payload, Queued)
            self.places.append((queued.place, queued.waiting))
        if frame.kind is Kind.ERROR:
            raise parse(frame.payload, ErrorInfo).to_error()
        return frame

    def wait_place(self) -> tuple[int, int]:
        """The next frame, which is a QUEUED."""
        frame = self.receive()
        assert frame.kind is Kind.QUEUED, frame
        queued = parse(frame.payload, Queued)
        self.places.append((queued.place, queued.waiting))
        return self.places[-1]

    def begin(self, phase: Phase, *spans: tuple[int, int, int], **fields: Any) -> None:
        """h_first of a pass in a step of its own."""
        self.step += 1
        self.send(begin(spans, phase, self.step, **fields))

    def go_on(self, stop: Stop = lambda _: False) -> list[np.ndarray[Any, Any]]:
        """Answer what comes until the pass is over, or a frame that is to be left unanswered has come."""
        came = []
        while True:
            frame = self.next()
            came.append(frame.array())
            answer = answer_to(frame)
            if stop(frame):
                self.kept = answer
                return came
            if answer is None:
                return came
            self.send(answer)

    def run(self, phase: Phase, *spans: tuple[int, int, int], stop: Stop = lambda _: False) -> list[Any]:
        """A pass: the tensors that came."""
        self.begin(phase, *spans)
        return self.go_on(stop)

    def decode(self, sequence: int, start: int, count: int) -> list[Any]:
        """A token a pass."""
        return [self.run(Phase.GENERATE, (sequence, start + i, 1))[-1] for i in range(count)]

    def release(self, *sequences: int) -> None:
        frame = Frame(Kind.RELEASE)
        frame.spans = np.array([(s, 0, 0) for s in sequences], np.uint32)
        self.send(frame)

    def close(self) -> None:
        """CLOSE: the device has no more to do."""
        self.send(Frame(Kind.CLOSE))

    def ended(self) -> PrivateLoraError:
        """The error with which the service ends this session; frames that come before are read away."""
        try:
            while True:
                self.next()
        except PrivateLoraError as error:
            return error


def _reason(closed: ConnectionClosed) -> PrivateLoraError:
    if closed.rcvd is None:
        return ConnectionLostError(f"the service closed without a word: {closed}")
    return error_from_code(closed.rcvd.reason, "the service closed the connection")


def answer_to(frame: Frame) -> Frame | None:
    """What is due for a frame in placement `paper` or without inline layers; None: the pass is over."""
    came = frame.array()
    n = came.shape[0]
    if frame.kind is Kind.ENCODED:
        return made(frame, Kind.DELTA, np.resize(np.tanh(came), (n, 3, RANK)))
    if frame.kind is Kind.HIDDEN and frame.phase is Phase.TRAIN:
        return made(frame, Kind.GRAD_HIDDEN, np.cos(came), Phase.BACKWARD)
    if frame.kind is Kind.GRAD_DELTA and frame.layer > 0:
        return made(frame, Kind.GRAD_ENCODED, np.resize(np.tanh(came), (n, 1, RANK)))
    return None


def made(to: Frame, kind: Kind, array: np.ndarray[Any, Any], phase: Phase | None = None) -> Frame:
    frame = Frame(kind, phase=phase or to.phase, step=to.step, stream=to.stream, layer=to.layer)
    frame.selection = Selection.ALL
    return frame.with_array(np.ascontiguousarray(array, np.float32), WireDtype.FLOAT32)


def at(layer: int, kind: Kind = Kind.ENCODED) -> Stop:
    """Stop at this exchange."""
    return lambda frame: frame.kind is kind and frame.layer == layer

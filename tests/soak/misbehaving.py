"""Devices of the soak that misbehave: each vanishes, stalls, sends garbage or floods, at some point of a session.

`KINDS` names them. A device that must be refused reads until the service's last word: an ERROR with a code of the
protocol's tree, which the code of the closing frame repeats. One that vanishes says nothing and reads nothing.
SIGKILLed devices are honest ones that `crowd.py` kills.
"""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from tests.soak.honest import Findings, Place
from tests.support.wire import HIDDEN_SIZE, RANK, Wire, announced, begin, delta, open_frame, reply
from websockets.exceptions import ConnectionClosed

from privatelora.protocol.codec import WireDtype
from privatelora.protocol.errors import (
    AdmissionError,
    ConnectionLostError,
    IncompatibleError,
    PrivateLoraError,
    ProtocolError,
)
from privatelora.protocol.frames import NO_LAYER, Frame, Kind, Phase
from privatelora.protocol.messages import ErrorInfo, ServiceInfo, parse

SPANS = ((1, 0, 16),)
ONE_TRIP = {"first": 2, "last": 2}
FLOOD_S = 1.0
LOST, BROKEN = ConnectionLostError.code, ProtocolError.code
EVICTED = AdmissionError.code  # a silent device whose memory was given to others


class Stranger(Wire):
    """A device without manners, which waits in a line where it must."""

    expects_refusal = False

    def receive(self) -> Frame:
        while (frame := super().receive()).kind is Kind.QUEUED:
            pass
        if frame.kind is Kind.ERROR and not self.expects_refusal:
            raise parse(frame.payload, ErrorInfo).to_error()
        return frame

    def vanish(self) -> None:
        """Gone at once, without a goodbye: the service's kernel is told by RST, if by anything."""
        with suppress(OSError):  # the service was faster
            self.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close_socket()

    def send_raw(self, content: bytes) -> None:
        """Bytes below the WebSocket."""
        self.socket.socket.sendall(content)


Kinds = dict[str, Callable[[Stranger, ServiceInfo, random.Random], tuple[str, ...]]]

KINDS: Kinds = {}
"""What a device does, by name; which codes may end it, none where it has left before."""


def misbehave(place: Place, kind: str, seed: int) -> Findings:
    """Be one of `KINDS`."""
    found = Findings()
    with Stranger(place.url, place.token) as wire:
        try:
            codes = KINDS[kind](wire, announced(place.url, place.token), random.Random(seed))
        except PrivateLoraError as error:  # it had no chance to misbehave
            found.refused(error.code, error.message)
            return found
        if codes:
            _await_refusal(wire, kind, codes, found)
    return found


def _await_refusal(wire: Stranger, kind: str, codes: tuple[str, ...], found: Findings) -> None:
    wire.expects_refusal = True
    try:
        told = wire.refusal()
    except (AssertionError, TimeoutError, ConnectionClosed, OSError) as ended:
        found.uncoded.append(f"{kind}: {type(ended).__name__} {ended}")
        return
    if told.code in codes:
        found.refused(told.code, told.message)
    else:
        found.uncoded.append(f"{kind}: {told.code} where {' or '.join(codes)} is due: {told.message}")


def _kind(do: Callable[[Stranger, ServiceInfo, random.Random], tuple[str, ...]]) -> Any:
    KINDS[do.__name__] = do
    return do


# -- those that vanish -------------------------------------------------------------------------------------------------


@_kind
def vanishes_between_two_tokens(wire: Stranger, info: ServiceInfo, chance: random.Random) -> tuple[str, ...]:
    wire.open(info)
    _forward(wire, begin(SPANS, Phase.GENERATE))
    wire.vanish()
    return ()


@_kind
def vanishes_in_mid_layer(wire: Stranger, info: ServiceInfo, chance: random.Random) -> tuple[str, ...]:
    wire.open(info)
    came = wire.answer(begin(SPANS, chance.choice((Phase.GENERATE, Phase.TRAIN))))
    for _ in range(chance.randrange(info.model.shape.layers)):
        came = wire.answer(delta(came))
    wire.vanish()
    return ()


@_kind
def vanishes_while_it_is_computed_for(wire: Stranger, info: ServiceInfo, chance: random.Random) -> tuple[str, ...]:
    wire.open(info, placement=ONE_TRIP)
    wire.send(_large(1))
    time.sleep(chance.uniform(0, 0.02))
    wire.vanish()
    return ()


@_kind
def vanishes_in_the_way_back(wire: Stranger, info: ServiceInfo, chance: random.Random) -> tuple[str, ...]:
    wire.open(info)
    came = _way_back(wire)
    for _ in range(chance.randrange(info.model.shape.layers - 1)):
        came = wire.answer(reply(came, Kind.GRAD_ENCODED, came.shape[0], 1, RANK))
    wire.vanish()
    return ()


@_kind
def vanishes_in_mid_message(wire: Stranger, info: ServiceInfo, chance: random.Random) -> tuple[str, ...]:
    wire.open(info)
    wire.send_raw(_half_a_message())
    wire.vanish()
    return ()


@_kind
def vanishes_before_it_is_let_in(wire: Stranger, info: ServiceInfo, chance: random.Random) -> tuple[str, ...]:
    wire.send(open_frame(info))
    wire.vanish()
    return ()


# -- those that stall --------------------------------------------------------------------------------------------------


@_kind
def stalls_in_mid_layer(wire: Stranger, info: ServiceInfo, chance: random.Random) -> tuple[str, ...]:
    wire.open(info)
    wire.answer(begin(SPANS, Phase.GENERATE))
    return (LOST, EVICTED)


@_kind
def stalls_in_the_way_back(wire: Stranger, info: ServiceInfo, chance: random.Random) -> tuple[str, ...]:
    wire.open(info)
    _way_back(wire)
    return (LOST, EVICTED)


@_kind
def stalls_in_mid_message(wire: Stranger, info: ServiceInfo, chance: random.Random) -> tuple[str, ...]:
    wire.open(info)
    wire.send_raw(_half_a_message())
    return (LOST,)


@_kind
def stalls_before_open(wire: Stranger, info: ServiceInfo, chance: random.Random) -> tuple[str, ...]:
    return (LOST,)


# -- those that send what is no frame ----------------------------------------------------------------------------------


@_kind
def opens_with_garbage(wire: Stranger, info: ServiceInfo, chance: random.Random) -> tuple[str, ...]:
    wire.send(chance.randbytes(chance.randint(0, 4096)))
    return (BROKEN,)


@_kind
def sends_garbage(wire: Stranger, info: ServiceInfo, chance: random.Random) -> tuple[str, ...]:
    wire.open(info)
    wire.answer(begin(SPANS, Phase.GENERATE))
    wire.send(chance.randbytes(chance.randint(0, 4096)))
    return (BROKEN,)


@_kind
def sends_text(wire: Stranger, info: ServiceInfo, chance: random.Random) -> tuple[str, ...]:
    wire.open(info)
    wire.send("{}")
    return (BROKEN,)


@_kind
def cuts_a_frame_short(wire: Stranger, info: ServiceInfo, chance: random.Random) -> tuple[str, ...]:
    wire.open(info)
    came = wire.answer(begin(SPANS, Phase.TRAIN))
    answer = _packed(wire, delta(came))
    wire.send(answer[: chance.randrange(len(answer))])
    return (BROKEN,)


@_kind
def changes_a_byte_of_a_header(wire: Stranger, info: ServiceInfo, chance: random.Random) -> tuple[str, ...]:
    """Which may be refused at once, or mean something else that goes on until the device is silent."""
    wire.open(info)
    came = wire.answer(begin(SPANS, Phase.TRAIN))
    answer = bytearray(_packed(wire, delta(came)))
    answer[chance.randrange(48)] ^= 1 << chance.randrange(8)
    wire.send(bytes(answer))
    return (BROKEN, IncompatibleError.code, LOST, EVICTED)


# -- those that send the wrong frame -----------------------------------------------------------------------------------


@_kind
def answers_with_the_wrong_frame(wire: Stranger, info: ServiceInfo, chance: random.Random) -> tuple[str, ...]:
    wire.open(info)
    came = wire.answer(begin(SPANS, Phase.TRAIN))
    rows = came.shape[0]
    not_finite = delta(came)
    values = np.full((rows, 3, RANK), np.nan, np.float32)
    wrong = (
        delta(came, layer=came.layer + 1),
        reply(came, Kind.DELTA, rows + 1, 3, RANK),
        reply(came, Kind.GRAD_HIDDEN, rows, HIDDEN_SIZE, phase=Phase.BACKWARD, layer=NO_LAYER),
        begin(SPANS, Phase.TRAIN),  # again
        delta(came, phase=Phase.GENERATE),
        not_finite.with_array(values, WireDtype.FLOAT32),
        _release(1),  # which is under way
        begin(SPANS, step=2, session=wire.session + 1),
    )
    wire.send(chance.choice(wrong))
    return (BROKEN,)


@_kind
def begins_where_its_cache_does_not_end(wire: Stranger, info: ServiceInfo, chance: random.Random) -> tuple[str, ...]:
    wire.open(info)
    _forward(wire, begin(SPANS, Phase.GENERATE))
    wire.send(begin([(1, chance.choice((0, 15, 17)), 1)], Phase.GENERATE, step=2))
    return (BROKEN,)


# -- those that flood --------------------------------------------------------------------------------------------------


@_kind
def floods_and_reads_nothing(wire: Stranger, info: ServiceInfo, chance: random.Random) -> tuple[str, ...]:
    wire.open(info, placement=ONE_TRIP)
    _flood(wire, lambda number: _large(number + 1))
    wire.vanish()
    return ()


@_kind
def floods_with_releases(wire: Stranger, info: ServiceInfo, chance: random.Random) -> tuple[str, ...]:
    wire.open(info)
    _flood(wire, _release)
    wire.vanish()
    return ()


@_kind
def begins_more_than_it_may(wire: Stranger, info: ServiceInfo, chance: random.Random) -> tuple[str, ...]:
    wire.open(info)
    for stream in range(info.limits.max_streams + 1):
        wire.send(begin([(stream, 0, 16)], Phase.GENERATE, stream=stream))
    return (BROKEN,)


def _flood(wire: Stranger, frame: Callable[[int], Frame]) -> None:
    """Frames as fast as they are taken, for a second."""
    wire.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(FLOOD_S), 0))
    until, number = time.monotonic() + FLOOD_S, 0
    with suppress(OSError, ConnectionClosed):  # no more was taken
        while time.monotonic() < until:
            wire.send(frame(number))
            number += 1


# -- what an honest device would send ----------------------------------------------------------------------------------


def _forward(wire: Stranger, first: Frame) -> Frame:
    """A whole forward pass of a placement with every layer inline; the last frame."""
    came = wire.answer(first)
    while came.kind is Kind.ENCODED:
        came = wire.answer(delta(came))
    return came


def _way_back(wire: Stranger) -> Frame:
    """A TRAIN pass forth, and the first dL/dv of its way back."""
    came = _forward(wire, begin(SPANS, Phase.TRAIN))
    return wire.answer(reply(came, Kind.GRAD_HIDDEN, *came.shape, phase=Phase.BACKWARD))


def _packed(wire: Stranger, frame: Frame) -> bytes:
    frame.session = wire.session
    return frame.pack()


def _large(step: int) -> Frame:
    """A pass of 2048 tokens, half a MiB each way."""
    return begin([(s, 0, 512) for s in range(4)], step=step)


def _release(sequence: int) -> Frame:
    frame = Frame(Kind.RELEASE)
    frame.spans = np.array([(sequence, 0, 0)], np.uint32)
    return frame


def _half_a_message() -> bytes:
    """The head of a WebSocket message of 64 KiB (RFC 6455, 5.2) and the first of its bytes."""
    return b"\x82\xff" + struct.pack(">Q", 1 << 16) + b"\0\0\0\0" + b"PL\1"

"""One WebSocket message is one frame: a fixed header, two small tables, and raw tensor bytes. Never pickle.

    header (48 bytes, little-endian)
      0 magic "PL"     2 version u8   3 kind u8    4 phase u8   5 dtype u8   6 ndim u8   7 selection u8
      8 session u64   16 step u32    20 stream u16              22 layer u16
     24 shape 4 x u32                40 spans u32               44 outputs u32
    spans    spans x 3 u32     (sequence, start, length) of each sequence in the ragged batch
    outputs  outputs x u32     rows whose result is wanted (Selection.LISTED)
    payload  tensor bytes by dtype and shape, or UTF-8 JSON for control frames

Device and service both write frames with `Frame.pack` and read them with `Frame.unpack`, which checks every length
against the bytes that came before anything is allocated. What a frame *means* (is this the exchange that is due?) is
the session's business, at either end.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from privatelora.protocol.codec import Array, WireDtype, decode, encode
from privatelora.protocol.errors import IncompatibleError, ProtocolError

VERSION = 1
MAGIC = b"PL"
HEADER = struct.Struct("<2sBBBBBBQIHH4III")
KIND_AT = 3  # where the kind stands in the header
ADDRESS = struct.Struct("<QIH")  # session, step and stream, as they stand in the header
ADDRESS_AT, ROWS_AT = 8, 24  # where they and the shape's first number stand
NO_LAYER = 0xFFFF
MAX_DIMS = 4
MAX_CONTROL_BYTES = 64 * 1024

Uint32s = NDArray[np.uint32]
_NO_SPANS: Uint32s = np.empty((0, 3), np.uint32)
_NO_OUTPUTS: Uint32s = np.empty(0, np.uint32)


class Kind(IntEnum):
    """What a frame carries. Up: device to service. Down: service to device."""

    OPEN = 1  # up, JSON `OpenRequest`
    OPENED = 2  # down, JSON `Opened`
    ERROR = 3  # down, JSON `ErrorInfo`; the session ends
    CLOSE = 4  # either way, empty; the session ends in peace
    RELEASE = 5  # up, spans name sequences whose KV cache is dropped
    QUEUED = 6  # down, JSON `Queued`; what the device waits for comes later
    HIDDEN = 16  # up h_first, down h_{L-last}, (n, d)
    ENCODED = 17  # down u, (n, E, r_down)
    DELTA = 18  # up v, (n, 3, r_up)
    GRAD_HIDDEN = 19  # up dL/dh_{L-last}, down dL/dh_first, (n, d)
    GRAD_DELTA = 20  # down dL/dv, (n, 3, r_up)
    GRAD_ENCODED = 21  # up dL/du, (n, E, r_down)


class Phase(IntEnum):
    """Which pass through the layers an exchange belongs to."""

    NONE = 0
    GENERATE = 1  # prefill and decode: appends to the KV caches of its sequences
    SCORE = 2  # whole sequences, nothing kept
    TRAIN = 3  # whole sequences, activations kept for the backward pass
    BACKWARD = 4


class Selection(IntEnum):
    """Which rows of h_{L-last} the device needs."""

    ALL = 0
    LAST = 1  # the last token of each sequence
    LISTED = 2  # the rows in `outputs`


@dataclass(slots=True)
class Frame:
    """One message of the data plane; tensors are numpy arrays as `codec` describes them."""

    kind: Kind
    session: int = 0
    phase: Phase = Phase.NONE
    step: int = 0
    stream: int = 0
    layer: int = NO_LAYER
    dtype: WireDtype = WireDtype.NONE
    shape: tuple[int, ...] = ()
    payload: memoryview | bytes = b""
    selection: Selection = Selection.ALL
    spans: Uint32s = field(default_factory=lambda: _NO_SPANS)
    outputs: Uint32s = field(default_factory=lambda: _NO_OUTPUTS)

    def with_array(self, array: Array, dtype: WireDtype) -> Frame:
        """Set the payload from an array that `codec.encode` accepts; returns self."""
        self.dtype, self.shape, self.payload = dtype, tuple(array.shape), encode(array, dtype)
        return self

    def array(self) -> Array:
        """The payload as an array; raises `ProtocolError` on a wrong length or a non-finite element."""
        return decode(memoryview(self.payload), self.dtype, self.shape)

    @property
    def payload_bytes(self) -> int:
        """Tensor bytes of an exchange; control frames count as overhead."""
        return len(self.payload) if self.kind >= Kind.HIDDEN else 0

    def pack(self) -> bytes:
        """The frame as bytes."""
        header = pack_header(
            self.kind, self.phase, self.dtype, self.shape, self.session, self.step, self.stream, self.layer,
            self.selection, len(self.spans), len(self.outputs),
        )  # fmt: skip
        if not len(self.spans) and not len(self.outputs):
            return b"".join((header, self.payload))
        spans, outputs = self.spans.astype("<u4", copy=False), self.outputs.astype("<u4", copy=False)
        return b"".join((header, spans.tobytes(), outputs.tobytes(), self.payload))

    @classmethod
    def unpack(cls, data: bytes) -> Frame:
        """Read one frame; the payload stays a view of `data`.

        Raises
        ------
        IncompatibleError : another protocol version.
        ProtocolError : anything else that is wrong with the bytes, with the numbers that disagree.
        """
        if len(data) < HEADER.size:
            raise ProtocolError(f"a frame of {len(data)} bytes is shorter than the {HEADER.size}-byte header")
        (magic, version, kind, phase, dtype, ndim, selection, session, step, stream, layer, *rest) = HEADER.unpack_from(
            data
        )
        if magic != MAGIC:
            raise ProtocolError("the message does not begin with this protocol's magic bytes; is the URL right?")
        if version != VERSION:
            raise IncompatibleError(
                f"the other end speaks protocol version {version}, this one {VERSION}; install the same release on both"
            )
        shape, spans, outputs = tuple(rest[:ndim]), rest[MAX_DIMS], rest[MAX_DIMS + 1]
        if ndim > MAX_DIMS or any(rest[ndim:MAX_DIMS]):
            raise ProtocolError(f"a tensor of {ndim} dimensions with sizes {rest[:MAX_DIMS]} breaks the header's rules")
        try:
            frame = cls(Kind(kind), session, Phase(phase), step, stream, layer, WireDtype(dtype), shape)
            frame.selection = Selection(selection)
        except ValueError as error:
            raise ProtocolError(f"the frame's header holds an unknown value: {error}") from None
        carries_tensor = frame.kind >= Kind.HIDDEN
        if carries_tensor != (frame.dtype is not WireDtype.NONE) or (carries_tensor and not math.prod(shape or (0,))):
            raise ProtocolError(f"a {frame.kind.name} frame cannot carry {frame.dtype.name} of shape {shape}")
        start = HEADER.size + 12 * spans + 4 * outputs
        expected = frame.dtype.nbytes(shape) if carries_tensor else sum(shape)
        if len(data) != start + expected:
            raise ProtocolError(
                f"a {frame.kind.name} frame with {spans} spans, {outputs} outputs and shape {shape} has "
                f"{start + expected} bytes, but {len(data)} came"
            )
        if not carries_tensor and expected > MAX_CONTROL_BYTES:
            raise ProtocolError(f"a control message of {expected} bytes is over the limit of {MAX_CONTROL_BYTES}")
        if spans:
            frame.spans = np.frombuffer(data, "<u4", 3 * spans, HEADER.size).reshape(spans, 3)
        if outputs:
            frame.outputs = np.frombuffer(data, "<u4", outputs, HEADER.size + 12 * spans)
        frame.payload = memoryview(data)[start:]
        return frame


def pack_header(
    kind: Kind,
    phase: Phase,
    dtype: WireDtype,
    shape: tuple[int, ...],
    session: int,
    step: int,
    stream: int,
    layer: int,
    selection: Selection = Selection.ALL,
    spans: int = 0,
    outputs: int = 0,
) -> bytes:
    """A frame's first 48 bytes: all of an exchange's that both ends know before it comes."""
    sizes = (*shape, 0, 0, 0, 0)[:MAX_DIMS]
    return HEADER.pack(
        MAGIC, VERSION, kind, phase, dtype, len(shape), selection, session, step, stream, layer, *sizes, spans, outputs
    )


def pack_headers(
    kind: Kind,
    phase: Phase,
    dtype: WireDtype,
    rows: Sequence[int],
    width: tuple[int, ...],
    addresses: Sequence[bytes],
    layer: int,
) -> list[bytes]:
    """`pack_header` of one exchange with many: shapes are (rows[i], *width), addresses those of `ADDRESS`."""
    header = pack_header(kind, phase, dtype, (rows[0], *width), 0, 0, 0, layer)
    head, tail = header[:ADDRESS_AT], header[ADDRESS_AT + ADDRESS.size :]
    if rows.count(rows[0]) == len(rows):
        return [head + address + tail for address in addresses]
    layer_bytes, rest = header[ADDRESS_AT + ADDRESS.size : ROWS_AT], header[ROWS_AT + 4 :]
    return [
        head + address + layer_bytes + n.to_bytes(4, "little") + rest
        for address, n in zip(addresses, rows, strict=True)
    ]

"""The wire format: every frame survives the way there, and no bytes at all can do more than raise a coded error."""

from __future__ import annotations

import math
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from privatelora.protocol.codec import WireDtype
from privatelora.protocol.errors import IncompatibleError, PrivateLoraError, ProtocolError
from privatelora.protocol.frames import (
    ADDRESS,
    HEADER,
    MAX_CONTROL_BYTES,
    NO_LAYER,
    VERSION,
    Frame,
    Kind,
    Phase,
    Selection,
    pack_header,
    pack_headers,
)

UINT16, UINT32, UINT64 = 2**16 - 1, 2**32 - 1, 2**64 - 1
TENSOR_KINDS = [kind for kind in Kind if kind >= Kind.HIDDEN]
CONTROL_KINDS = [kind for kind in Kind if kind < Kind.HIDDEN]
TENSOR_DTYPES = [dtype for dtype in WireDtype if dtype is not WireDtype.NONE]

# where a field lies in the header (the table at the top of frames.py)
VERSION_AT, KIND_AT, PHASE_AT, DTYPE_AT, NDIM_AT, SELECTION_AT = 2, 3, 4, 5, 6, 7
SHAPE_AT, SPANS_AT, OUTPUTS_AT = 24, 40, 44


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    """Any frame that either end may write, exchanges and control messages alike."""
    frame = Frame(
        draw(st.sampled_from(list(Kind))),
        session=draw(st.integers(0, UINT64)),
        phase=draw(st.sampled_from(list(Phase))),
        step=draw(st.integers(0, UINT32)),
        stream=draw(st.integers(0, UINT16)),
        layer=draw(st.integers(0, NO_LAYER)),
        selection=draw(st.sampled_from(list(Selection))),
    )
    frame.spans = uint32s(draw(st.lists(st.integers(0, UINT32), max_size=4).map(lambda row: row * 3))).reshape(-1, 3)
    frame.outputs = uint32s(draw(st.lists(st.integers(0, UINT32), max_size=6)))
    if frame.kind >= Kind.HIDDEN:
        frame.dtype = draw(st.sampled_from(TENSOR_DTYPES))
        frame.shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
        size = frame.dtype.nbytes(frame.shape)
    else:
        size = draw(st.integers(0, 64))
        frame.shape = (size,)
    frame.payload = draw(st.binary(min_size=size, max_size=size))
    return frame


@given(frames())
def test_a_frame_survives_the_way_there(sent: Frame) -> None:
    data = sent.pack()
    came = Frame.unpack(data)
    for name in ("kind", "session", "phase", "step", "stream", "layer", "dtype", "shape", "selection", "payload_bytes"):
        assert getattr(came, name) == getattr(sent, name), name
    assert bytes(came.payload) == sent.payload
    assert np.array_equal(came.spans, sent.spans)
    assert np.array_equal(came.outputs, sent.outputs)
    assert came.pack() == data


@given(
    st.sampled_from(TENSOR_KINDS),
    st.sampled_from(list(Phase)),
    st.sampled_from(TENSOR_DTYPES),
    st.lists(
        st.tuples(st.integers(1, UINT32), *(st.integers(0, most) for most in (UINT64, UINT32, UINT16))), min_size=1
    ),
    st.lists(st.integers(1, UINT32), max_size=3).map(tuple),
    st.integers(0, NO_LAYER),
    st.booleans(),
)
def test_headers_of_one_exchange_with_many_are_those_of_each(
    kind: Kind,
    phase: Phase,
    dtype: WireDtype,
    told: list[tuple[int, int, int, int]],
    width: tuple[int, ...],
    layer: int,
    equal: bool,
) -> None:
    rows = [told[0][0] if equal else n for n, *_ in told]
    addresses = [ADDRESS.pack(*address) for _, *address in told]
    each = [
        pack_header(kind, phase, dtype, (n, *width), *address, layer)
        for n, (_, *address) in zip(rows, told, strict=True)
    ]
    assert pack_headers(kind, phase, dtype, rows, width, addresses, layer) == each


@given(frames(), st.data())
def test_a_truncated_frame_is_refused(frame: Frame, data: st.DataObject) -> None:
    whole = frame.pack()
    with pytest.raises(ProtocolError):
        Frame.unpack(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(frames(), st.binary(min_size=1, max_size=64))
def test_an_over_long_frame_is_refused(frame: Frame, more: bytes) -> None:
    with pytest.raises(ProtocolError, match="bytes"):
        Frame.unpack(frame.pack() + more)


@given(frames(), st.binary(min_size=2, max_size=2))
def test_bytes_of_another_protocol_are_refused(frame: Frame, magic: bytes) -> None:
    assume(magic != b"PL")
    with pytest.raises(ProtocolError, match="magic"):
        Frame.unpack(magic + frame.pack()[2:])


@given(frames(), st.integers(0, 255))
def test_another_version_is_incompatible(frame: Frame, version: int) -> None:
    assume(version != VERSION)
    with pytest.raises(IncompatibleError, match="install"):
        Frame.unpack(changed(frame.pack(), VERSION_AT, version))


@pytest.mark.parametrize(
    ("field", "known"),
    [(KIND_AT, Kind), (PHASE_AT, Phase), (DTYPE_AT, WireDtype), (SELECTION_AT, Selection)],
    ids=["kind", "phase", "dtype", "selection"],
)
@given(frame=frames(), value=st.integers(0, 255))
def test_an_unknown_value_in_the_header_is_refused(field: int, known: type[Any], frame: Frame, value: int) -> None:
    assume(value not in list(known))
    with pytest.raises(ProtocolError, match="unknown value"):
        Frame.unpack(changed(frame.pack(), field, value))


@given(frames(), st.integers(5, 255))
def test_more_dimensions_than_the_header_has_are_refused(frame: Frame, ndim: int) -> None:
    with pytest.raises(ProtocolError, match="dimensions"):
        Frame.unpack(changed(frame.pack(), NDIM_AT, ndim))


@given(st.sampled_from(TENSOR_KINDS), st.sampled_from(TENSOR_DTYPES), st.integers(1, 3), st.integers(1, UINT32))
def test_sizes_beyond_the_dimensions_are_refused(kind: Kind, dtype: WireDtype, ndim: int, size: int) -> None:
    frame = Frame(kind, dtype=dtype, shape=(1,) * ndim, payload=bytes(dtype.nbytes((1,) * ndim)))
    with pytest.raises(ProtocolError, match="dimensions"):
        Frame.unpack(changed_u32(frame.pack(), SHAPE_AT + 4 * ndim, size))


@given(st.sampled_from(CONTROL_KINDS), st.sampled_from(TENSOR_DTYPES))
def test_a_control_frame_carries_no_tensor(kind: Kind, dtype: WireDtype) -> None:
    frame = Frame(kind, shape=(2,), dtype=dtype, payload=bytes(dtype.nbytes((2,))))
    with pytest.raises(ProtocolError, match="cannot carry"):
        Frame.unpack(frame.pack())


@given(st.sampled_from(TENSOR_KINDS), st.sampled_from([(), (0,), (3, 0), (0, 0, 0, 0)]), st.sampled_from(WireDtype))
def test_an_exchange_without_elements_is_refused(kind: Kind, shape: tuple[int, ...], dtype: WireDtype) -> None:
    with pytest.raises(ProtocolError, match="cannot carry"):
        Frame.unpack(Frame(kind, dtype=dtype, shape=shape).pack())


def test_a_control_message_has_a_limit() -> None:
    at_limit = Frame(Kind.OPEN, shape=(MAX_CONTROL_BYTES,), payload=bytes(MAX_CONTROL_BYTES))
    assert len(Frame.unpack(at_limit.pack()).payload) == MAX_CONTROL_BYTES
    beyond = Frame(Kind.OPEN, shape=(MAX_CONTROL_BYTES + 1,), payload=bytes(MAX_CONTROL_BYTES + 1))
    with pytest.raises(ProtocolError, match="limit"):
        Frame.unpack(beyond.pack())


@given(st.one_of(st.binary(max_size=256), st.binary(max_size=200).map(lambda tail: b"PL" + bytes([VERSION]) + tail)))
def test_arbitrary_bytes_raise_coded_errors_only(data: bytes) -> None:
    try:
        Frame.unpack(data).array()
    except PrivateLoraError as error:
        assert isinstance(error, (ProtocolError, IncompatibleError))


@given(frames(), st.lists(st.tuples(st.integers(0, HEADER.size - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_header_raises_coded_errors_only(frame: Frame, damage: list[tuple[int, int]]) -> None:
    data = frame.pack()
    for at, value in damage:
        data = changed(data, at, value)
    try:
        Frame.unpack(data)
    except PrivateLoraError as error:
        assert isinstance(error, (ProtocolError, IncompatibleError))


@pytest.mark.parametrize(
    "at", [SHAPE_AT, SHAPE_AT + 4, SPANS_AT, OUTPUTS_AT], ids=["rows", "columns", "spans", "outputs"]
)
@pytest.mark.parametrize("value", [2**20, 2**31, UINT32])
def test_nothing_is_allocated_by_a_number_from_the_network(at: int, value: int) -> None:
    frame = Frame(Kind.HIDDEN, dtype=WireDtype.FLOAT32, shape=(2, 8), payload=bytes(64))
    frame.spans, frame.outputs = uint32s([0, 0, 2]).reshape(1, 3), uint32s([1])
    data = changed_u32(frame.pack(), at, value)

    def unpack() -> None:
        with pytest.raises(ProtocolError):
            Frame.unpack(data)

    assert allocated_by(unpack) < 64 * 1024


def test_unpacking_a_large_frame_copies_none_of_it() -> None:
    nbytes = WireDtype.FLOAT32.nbytes((1024, 1024))
    frame = Frame(Kind.HIDDEN, dtype=WireDtype.FLOAT32, shape=(1024, 1024), payload=bytes(nbytes))
    frame.outputs = np.arange(1024, dtype=np.uint32)
    data = frame.pack()
    assert allocated_by(lambda: Frame.unpack(data)) < 16 * 1024
    assert allocated_by(lambda: Frame.unpack(data).array()) < 0.6 * nbytes  # the check for NaN has a byte an element


@pytest.mark.parametrize("dtype", TENSOR_DTYPES, ids=lambda dtype: dtype.name)
@given(shape=st.lists(st.integers(0, UINT32), min_size=1, max_size=4))
def test_bytes_of_a_tensor_are_those_of_its_elements_and_row_scales(dtype: WireDtype, shape: list[int]) -> None:
    elements = math.prod(shape)
    item = {WireDtype.FLOAT32: 4, WireDtype.BFLOAT16: 2, WireDtype.FLOAT16: 2, WireDtype.INT8: 1}[dtype]
    scales = 4 * math.prod(shape[:-1]) if dtype is WireDtype.INT8 and elements else 0
    assert dtype.nbytes(tuple(shape)) == elements * item + scales


def uint32s(values: list[int]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    return np.array(values, np.uint32)


def changed(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes([value]) + data[at + 1 :]


def changed_u32(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + struct.pack("<I", value) + data[at + 4 :]


def allocated_by(call: Any) -> int:
    """Most bytes that Python and numpy held at once on behalf of a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

"""Tensor bytes: what goes in comes out, exactly or within int8's known error, and a number that is none is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from privatelora.protocol.codec import WireDtype, decode, encode
from privatelora.protocol.errors import ConfigurationError, ProtocolError

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, max_side=5)
FLOAT32_MAX = float(np.finfo(np.float32).max)


def finite(dtype: type[np.floating], bits: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(dtype, SHAPES, elements=st.floats(allow_nan=False, allow_infinity=False, width=bits))


@given(finite(np.float32, 32))
def test_float32_is_exact(array: np.ndarray) -> None:
    assert_exact(array, WireDtype.FLOAT32)


@given(finite(np.float16, 16))
def test_float16_is_exact(array: np.ndarray) -> None:
    assert_exact(array, WireDtype.FLOAT16)


@given(hnp.arrays(np.uint16, SHAPES, elements=st.integers(0, 2**16 - 1).filter(lambda bits: bits & 0x7F80 != 0x7F80)))
def test_bfloat16_bits_are_exact(bits: np.ndarray) -> None:
    assert_exact(bits, WireDtype.BFLOAT16)


def assert_exact(array: np.ndarray, dtype: WireDtype) -> None:
    data = encode(array, dtype)
    came = decode(memoryview(data), dtype, array.shape)
    assert len(data) == dtype.nbytes(array.shape)
    assert came.dtype == array.dtype
    assert came.tobytes() == array.tobytes()  # bits, not values: -0.0 is not 0.0


@given(hnp.arrays(np.float32, SHAPES, elements=st.floats(-(2.0**126), 2.0**126, width=32)))
def test_int8_is_within_half_a_step_of_its_row(array: np.ndarray) -> None:
    data = encode(array, WireDtype.INT8)
    came = decode(memoryview(data), WireDtype.INT8, array.shape)
    assert len(data) == array.size + 4 * array.size // array.shape[-1]
    assert came.dtype == np.float32
    assert came.shape == array.shape
    largest = np.abs(array).astype(np.float64).max(axis=-1, keepdims=True)
    half_a_step = largest / 127 / 2
    error = np.abs(came.astype(np.float64) - array)
    assert (error <= half_a_step * (1 + 1e-4) + 1e-40).all()  # 1e-40: float32's subnormal scales are coarse


def test_int8_keeps_rows_apart() -> None:
    array = np.array([[1e-3, -1e-3], [1e3, 5.0], [0.0, 0.0]], np.float32)
    came = decode(memoryview(encode(array, WireDtype.INT8)), WireDtype.INT8, array.shape)
    assert came[0].tolist() == pytest.approx([1e-3, -1e-3])
    assert came[2].tolist() == [0.0, 0.0]


NOT_NUMBERS = [
    pytest.param(WireDtype.FLOAT32, np.float32(np.nan).tobytes(), id="float32 NaN"),
    pytest.param(WireDtype.FLOAT32, np.float32(-np.inf).tobytes(), id="float32 infinity"),
    pytest.param(WireDtype.FLOAT16, np.float16(np.nan).tobytes(), id="float16 NaN"),
    pytest.param(WireDtype.FLOAT16, np.float16(np.inf).tobytes(), id="float16 infinity"),
    pytest.param(WireDtype.BFLOAT16, b"\xc0\x7f", id="bfloat16 NaN"),
    pytest.param(WireDtype.BFLOAT16, b"\x81\xff", id="bfloat16 signalling NaN"),
    pytest.param(WireDtype.BFLOAT16, b"\x80\x7f", id="bfloat16 infinity"),
    pytest.param(WireDtype.INT8, np.float32(np.nan).tobytes() + b"\1", id="int8 NaN scale"),
    pytest.param(WireDtype.INT8, np.float32(np.inf).tobytes() + b"\1", id="int8 infinite scale"),
    pytest.param(WireDtype.INT8, np.float32(FLOAT32_MAX).tobytes() + b"\x7f", id="int8 product out of range"),
]


@pytest.mark.parametrize(("dtype", "element"), NOT_NUMBERS)
def test_a_number_that_is_none_is_refused(dtype: WireDtype, element: bytes) -> None:
    with pytest.raises(ProtocolError, match="NaN or infinity"):
        decode(memoryview(element), dtype, (1,))


@pytest.mark.parametrize("dtype", [dtype for dtype in WireDtype if dtype is not WireDtype.NONE], ids=lambda d: d.name)
@given(data=st.binary(max_size=64), shape=SHAPES)
def test_bytes_that_do_not_fit_the_shape_are_refused(dtype: WireDtype, data: bytes, shape: tuple[int, ...]) -> None:
    if len(data) == dtype.nbytes(shape):
        data += b"\0"
    with pytest.raises(ProtocolError, match="bytes"):
        decode(memoryview(data), dtype, shape)


def test_an_array_of_another_type_is_refused_and_not_converted() -> None:
    with pytest.raises(ConfigurationError, match="float64"):
        encode(np.zeros(3), WireDtype.FLOAT32)


def test_an_unknown_wire_dtype_is_refused_with_those_that_work() -> None:
    with pytest.raises(ConfigurationError, match="float32, bfloat16, float16 or int8"):
        WireDtype.named("float8")

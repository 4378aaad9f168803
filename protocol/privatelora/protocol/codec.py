"""Tensor bytes on the wire: `WireDtype`, `encode` and `decode`, for numpy arrays.

float32, float16 and bfloat16 travel as they lie in memory (numpy has no bfloat16, so its bits are uint16); int8 travels
as one float32 scale per row of the last axis, then the bytes. Nothing here allocates by a number from the network: the
caller knows the shape it expects, and `decode` only ever views the bytes that arrived.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from privatelora.protocol.errors import ConfigurationError, ProtocolError

Array = NDArray[np.generic]


class WireDtype(IntEnum):
    """How the elements of a tensor are written."""

    NONE = 0
    FLOAT32 = 1
    BFLOAT16 = 2
    FLOAT16 = 3
    INT8 = 4

    @classmethod
    def named(cls, name: str) -> WireDtype:
        try:
            return {"float32": cls.FLOAT32, "bfloat16": cls.BFLOAT16, "float16": cls.FLOAT16, "int8": cls.INT8}[name]
        except KeyError:
            raise ConfigurationError(
                f"wire dtype {name!r} is unknown; use float32, bfloat16, float16 or int8"
            ) from None

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape, row scales included."""
        elements = math.prod(shape)
        if self is WireDtype.INT8:
            return elements + 4 * (elements // shape[-1] if elements else 0)
        return elements * _ITEMSIZE[self]


_ITEMSIZE = {WireDtype.NONE: 0, WireDtype.FLOAT32: 4, WireDtype.BFLOAT16: 2, WireDtype.FLOAT16: 2}
_NUMPY: dict[WireDtype, np.dtype[np.generic]] = {
    WireDtype.FLOAT32: np.dtype("<f4"),
    WireDtype.BFLOAT16: np.dtype("<u2"),
    WireDtype.FLOAT16: np.dtype("<f2"),
}


def encode(array: Array, dtype: WireDtype) -> bytes | memoryview:
    """Return the bytes of `array`: already in the dtype's own form (bfloat16 as uint16 bits), or float32 for int8."""
    if dtype is WireDtype.INT8:
        rows = np.ascontiguousarray(array, dtype="<f4").reshape(-1, array.shape[-1])  # (rows, width)
        scales = np.abs(rows).max(axis=1, initial=0.0).astype("<f4") / np.float32(127)
        safe = np.where(scales > 0, scales, np.float32(1))[:, None]
        quantised: bytes = np.rint(rows / safe).astype("i1").tobytes()
        return bytes(scales.tobytes()) + quantised
    expected = _NUMPY[dtype]
    if array.dtype != expected:
        raise ConfigurationError(f"an array of {array.dtype} cannot be sent as {dtype.name}, which needs {expected}")
    view: memoryview = np.ascontiguousarray(array).data
    return view.cast("B")


def decode(data: memoryview, dtype: WireDtype, shape: tuple[int, ...]) -> Array:
    """View `data` as an array of `shape`: float32 and float16 as themselves, bfloat16 as uint16, int8 as float32.

    Raises
    ------
    ProtocolError : the length does not fit the shape, or an element is NaN or infinite.
    """
    if len(data) != dtype.nbytes(shape):
        raise ProtocolError(
            f"{len(data)} bytes cannot be a {dtype.name} tensor of shape {shape}, which has {dtype.nbytes(shape)}; "
            "the sender cut it short or wrote another shape"
        )
    if dtype is WireDtype.INT8:
        rows = math.prod(shape[:-1])
        scales = np.frombuffer(data[: 4 * rows], "<f4")
        with np.errstate(all="ignore"):  # a scale may be NaN, or so large that its row overflows
            array: Array = np.frombuffer(data[4 * rows :], "i1").reshape(rows, -1).astype("<f4") * scales[:, None]
        finite = bool(np.isfinite(array).all())
    else:
        array = np.frombuffer(data, _NUMPY[dtype])
        if dtype is WireDtype.BFLOAT16:
            finite = not bool((np.bitwise_and(array, 0x7F80, dtype=np.uint16) == 0x7F80).any())  # all exponent bits set
        else:
            finite = bool(np.isfinite(array).all())
    if not finite:
        raise ProtocolError(
            "the tensor holds NaN or infinity; lower the learning rate, or use a wire dtype of larger range"
        )
    return array.reshape(shape)

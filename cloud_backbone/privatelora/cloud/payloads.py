"""Tensors of many frames to and from one tensor of a batch: the wire's codec, once a batch instead of once a frame.

`layers.py` reads answers and writes replies with it. That what came has the length of its shape was checked when it
arrived (`session.py`); whether its elements are finite is checked here. `CODEC` counts what it takes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from privatelora.cloud.passes import Pass
from privatelora.decoder.tensors import to_array, to_tensor
from privatelora.protocol.codec import WireDtype, decode, encode
from privatelora.protocol.errors import ProtocolError

Payload = tuple[tuple[int, ...], memoryview | bytes]
"""(shape, bytes)"""


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Clock(threading.local):
    """Seconds that the calling thread has spent in this module.

    No CPU time: to ask for that is a system call, after which Linux may give the core to whoever waits for it. In the
    midst of a unit, a service of 32 sessions on two busy cores was seen to stand there in a tenth of all samples.
    """

    seconds = 0.0


CODEC = Clock()


def _counted(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    @wraps(function)
    def counting(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            CODEC.seconds += time.perf_counter() - started

    return counting


class BadAnswers(Exception):
    """Some passes' answers hold NaN or infinity; the others' can be computed without them."""

    def __init__(self, errors: list[tuple[Pass, ProtocolError]]) -> None:
        super().__init__(f"{len(errors)} answers cannot be used")
        self.errors = errors


@_counted
def read_payloads(passes: Sequence[Pass], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The answers of `passes`, end to end by their first axis, in the compute dtype; raises `BadAnswers`."""
    wires = {one.wire for one in passes}
    if len(wires) > 1 or WireDtype.INT8 in wires:  # int8 has its scales first, frame by frame
        return torch.cat([_read([one], one.wire, dtype, device) for one in passes])
    return _read(passes, wires.pop(), dtype, device)


def _read(passes: Sequence[Pass], wire: WireDtype, dtype: torch.dtype, device: torch.device) -> Tensor:
    data = b"".join([one.answer for one in passes])
    shape = (sum([one.answer_shape[0] for one in passes]), *passes[0].answer_shape[1:])
    try:
        array = decode(memoryview(data), wire, shape)
    except ProtocolError:
        raise BadAnswers([(one, error) for one in passes if (error := _error(one)) is not None]) from None
    return to_tensor(array, wire, dtype, device)


def _error(one: Pass) -> ProtocolError | None:
    try:
        decode(memoryview(one.answer), one.wire, one.answer_shape)
    except ProtocolError as error:
        return error
    return None


@_counted
def write_payloads(passes: Sequence[Pass], tensor: Tensor) -> Iterable[Payload]:
    """What each pass is sent of `tensor`, whose rows are theirs, end to end."""
    if len(passes) == 1:
        return [(tuple(tensor.shape), encode(to_array(tensor, passes[0].wire), passes[0].wire))]
    width, payloads, at = tuple(tensor.shape[1:]), [], 0
    forms: dict[WireDtype, tuple[memoryview, int]] = {}  # the whole tensor's bytes by element type, and a row's
    for one in passes:
        shape, rows, at = (one.n, *width), slice(at, at + one.n), at + one.n
        if one.wire is WireDtype.INT8:
            payloads.append((shape, encode(to_array(tensor[rows], one.wire), one.wire)))
            continue
        if one.wire not in forms:
            forms[one.wire] = memoryview(encode(to_array(tensor, one.wire), one.wire)), one.wire.nbytes((1, *width))
        data, row_bytes = forms[one.wire]
        payloads.append((shape, data[rows.start * row_bytes : rows.stop * row_bytes]))
    return payloads

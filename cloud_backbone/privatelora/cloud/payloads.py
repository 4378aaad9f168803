"""Frames and tensors of many passes at once: the wire's codec, once a batch instead of once a frame.

`layers.py` reads answers and writes replies with it; `exchanges` cuts a reply into what each device is told. That what
came has the length of its shape was checked when it arrived (`session.py`); whether its elements are finite is checked
here. `CODEC` counts what reading and writing take.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from privatelora.cloud.passes import PHASES, Due, Pass, Point, Reply
from privatelora.decoder.tensors import to_array, to_tensor
from privatelora.protocol.codec import WireDtype, decode, encode
from privatelora.protocol.errors import ProtocolError
from privatelora.protocol.frames import NO_LAYER, Kind, pack_headers

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
def read_answers(passes: Sequence[Pass], wire: WireDtype, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The answers of `passes`, all of one wire, end to end by their first axis, in the compute dtype.

    Raises `BadAnswers`.
    """
    if wire is WireDtype.INT8 and len(passes) > 1:  # it has its scales first, frame by frame
        return torch.cat([_read([one], wire, dtype, device) for one in passes])
    return _read(passes, wire, dtype, device)


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
def write_reply(
    passes: Sequence[Pass],
    wire: WireDtype,
    kind: Kind,
    layer: int,
    tensor: Tensor,
    rows: Sequence[int],
    due: tuple[Kind, tuple[int, ...], Point] | None,
) -> Reply:
    """What `passes`, all of one wire, are told of `tensor`, of which `rows` are theirs, end to end."""
    if wire is WireDtype.INT8 and len(passes) > 1:
        parts = torch.split(tensor, list(rows))
        data: memoryview | bytes = b"".join([encode(to_array(part, wire), wire) for part in parts])
    else:
        data = encode(to_array(tensor, wire), wire)
    return Reply(passes, wire, kind, layer, rows, tuple(tensor.shape[1:]), data, due)


class Exchange(NamedTuple):
    """What one pass's device is told, and what it has to answer with: the frame and its header."""

    one: Pass
    header: bytes
    data: memoryview | bytes
    due: Due | None
    due_header: bytes


def headers_of(reply: Reply) -> tuple[list[bytes], list[bytes]]:
    """Headers of a reply's frames, and of those that are due then, if any."""
    passes, wire, kind, layer, rows, width, _, then = reply
    addresses = [one.address for one in passes]
    headers = pack_headers(kind, PHASES[passes[0].way], wire, rows, width, addresses, layer)
    if then is None:
        return headers, [b""] * len(passes)
    due_kind, due_width, point = then
    due_layer = NO_LAYER if due_kind is Kind.GRAD_HIDDEN else point.layer
    return headers, pack_headers(due_kind, PHASES[point.way], wire, rows, due_width, addresses, due_layer)


def exchanges(reply: Reply) -> Iterator[Exchange]:
    """A reply, pass by pass."""
    passes, wire, _, _, rows, width, data, then = reply
    dues: dict[int, Due | None] = dict.fromkeys(rows)
    if then is not None:
        kind, due_width, point = then
        dues = {n: Due(kind, (n, *due_width), wire.nbytes((n, *due_width)), point) for n in dues}
    view, row_bytes, at = memoryview(data), wire.nbytes((1, *width)), 0
    for one, n, header, due_header in zip(passes, rows, *headers_of(reply), strict=True):
        end = at + n * row_bytes
        yield Exchange(one, header, view[at:end], dues[n], due_header)
        at = end

"""`evaluate`: measures the loss of this device's adapter on the data that its owner's policy names."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import msgspec

from privatelora.protocol.jobs import JobKind

if TYPE_CHECKING:
    from privatelora.device.agent import JobContext

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Params(msgspec.Struct, forbid_unknown_fields=True):
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=256)] = 8


class Report(msgspec.Struct, forbid_unknown_fields=True):
    """loss: mean over labelled tokens, in nats."""

    loss: Annotated[float, msgspec.Meta(ge=0, le=1e6)]
    tokens: Count
    examples: Count
    seconds: Annotated[float, msgspec.Meta(ge=0, le=1e7)]
    bytes_up: Count
    bytes_down: Count


KIND = JobKind("evaluate", Params, Report)


def run(context: JobContext) -> dict[str, int | float]:
    params, started = msgspec.convert(context.params, Params), time.perf_counter()
    with context.session() as me:
        found = me.evaluate(context.data, batch_size=params.batch_size)
        count = me.remote.count
        context.check()
        return {
            "loss": found.loss,
            "tokens": found.tokens,
            "examples": found.examples,
            "seconds": time.perf_counter() - started,
            "bytes_up": count.payload_up,
            "bytes_down": count.payload_down,
        }

"""`evaluate`: measures the loss of this device's adapter on the data that its owner's policy names."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Annotated

import msgspec

from privatelora.protocol.jobs import JobKind

if TYPE_CHECKING:
    from privatelora.device.context import JobContext

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Params(msgspec.Struct, forbid_unknown_fields=True):
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=256)] = 8


class Report(msgspec.Struct, forbid_unknown_fields=True):
    """loss: mean over labelled tokens, in nats; examples: of `of_examples`, where a limit of the policy came first."""

    loss: Annotated[float, msgspec.Meta(ge=0, le=1e6)]
    tokens: Count
    examples: Count
    of_examples: Count
    seconds: Annotated[float, msgspec.Meta(ge=0, le=1e7)]
    bytes_up: Count
    bytes_down: Count


KIND = JobKind("evaluate", Params, Report)


def run(context: JobContext) -> dict[str, int | float]:
    from privatelora.device.data import Dataset

    params, started = msgspec.convert(context.params, Params), time.perf_counter()
    loss, tokens, done = 0.0, 0, 0
    with context.session() as me:
        examples, count = me.examples(context.data).examples, me.remote.count
        for begin in range(0, len(examples), params.batch_size):
            batch = Dataset(examples[begin : begin + params.batch_size], 0)
            found = me.evaluate(batch, batch_size=params.batch_size)
            loss, tokens, done = loss + found.loss * found.tokens, tokens + found.tokens, done + found.examples
            if done == len(examples):
                break
            if context.stops():
                context.check()
            seconds, moved = time.perf_counter() - started, count.payload_up + count.payload_down
            if seconds >= (context.max_seconds or math.inf) or moved >= (context.max_bytes or math.inf):
                break
        return {
            "loss": loss / tokens,
            "tokens": tokens,
            "examples": done,
            "of_examples": len(examples),
            "seconds": time.perf_counter() - started,
            "bytes_up": count.payload_up,
            "bytes_down": count.payload_down,
        }

"""`finetune-round`: trains this device's adapter on the data that its owner's policy names, for one round.

What the operator chooses are numbers: epochs, batch size, learning rate and budgets. What is reported are numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import msgspec

from privatelora.protocol.errors import ConfigurationError
from privatelora.protocol.jobs import JobKind

if TYPE_CHECKING:
    from privatelora.device.context import JobContext
    from privatelora.device.training import FinetuneReport

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Loss = Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class Params(msgspec.Struct, forbid_unknown_fields=True):
    epochs: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=256)] = 4
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None  # by rank, unless given
    max_seconds: Annotated[float, msgspec.Meta(gt=0, le=86_400)] | None = None
    max_bytes: Annotated[int, msgspec.Meta(gt=0, le=2**53)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] = 0


class Report(msgspec.Struct, forbid_unknown_fields=True):
    """What was done since this job was last begun on the device.

    loss, first_loss: of the last and the first batch, in nats a labelled token; stopped: index into `training.STOPPED`.
    """

    loss: Loss
    first_loss: Loss
    steps: Count
    tokens: Count
    examples: Count
    seconds: Annotated[float, msgspec.Meta(ge=0, le=1e7)]
    bytes_up: Count
    bytes_down: Count
    stopped: Annotated[int, msgspec.Meta(ge=0, le=20)]


KIND = JobKind("finetune-round", Params, Report)


def run(context: JobContext) -> dict[str, int | float]:
    from privatelora.device.context import JobError
    from privatelora.device.training import STOPPED

    params = msgspec.convert(context.params, Params)
    with context.session() as me:
        data = me.examples(context.data)
        train = partial(
            me.finetune,
            data,
            epochs=params.epochs,
            batch_size=params.batch_size,
            learning_rate=params.learning_rate,
            max_seconds=context.least(params.max_seconds, context.max_seconds),
            max_bytes=context.least(params.max_bytes, context.max_bytes),
            seed=params.seed,
            callbacks=[lambda step: context.stops()],
        )
        cut_off = context.resumable and bool(me.progress) and not me.progress["finished"]
        report = _resumed(train) if cut_off else train()
    if report.stopped == "callback":
        context.check()
    context.retry_after_s = report.retry_after_s
    if not report.history:
        raise JobError(f"no step was done ({report.stopped})", retry=True, retry_after_s=report.retry_after_s)
    return {
        "loss": report.history[-1].loss,
        "first_loss": report.history[0].loss,
        "steps": report.steps,
        "tokens": report.tokens,
        "examples": len(data.examples),
        "seconds": report.seconds,
        "bytes_up": report.bytes_up,
        "bytes_down": report.bytes_down,
        "stopped": STOPPED.index(report.stopped),
    }


def _resumed(train: Callable[..., FinetuneReport]) -> FinetuneReport:
    """Go on from the last step; a new round where the data changed or their owner has trained meanwhile."""
    try:
        return train(resume=True)
    except ConfigurationError:  # raised before anything is done, and again by `train` if it is about something else
        return train()

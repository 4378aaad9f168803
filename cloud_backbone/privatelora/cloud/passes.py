"""One session's batch on its way through the service's layers, and the batches of many in which it is computed.

    Pass     what came with one HIDDEN frame: its sequences, its placement, and where it stands
    Batch    rows of several passes at one point, with the tensors that they have there
    gather   several passes, wherever their rows lie, as one batch

A pass stands at a `Point`: a way (decode, prefill, score, train, backward), a stage and a layer. Passes at one point
can be computed together, whatever their sessions' placements and adapters are; `layers.py` does it, `scheduler.py` says
when, and afterwards each pass still knows which rows of which batch are its own.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from privatelora.decoder.backward import Saved
from privatelora.decoder.config import ModelConfig
from privatelora.decoder.kv import KVCache
from privatelora.decoder.layer import InlineWeights
from privatelora.decoder.ragged import Ragged
from privatelora.decoder.rotary import RotaryTables
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.frames import Kind
from privatelora.protocol.placement import Placement


class Way(StrEnum):
    """What a pass is for; passes of different ways are not computed together."""

    DECODE = "decode"  # one new token a sequence, cached
    PREFILL = "prefill"  # several, cached
    SCORE = "score"  # whole sequences, nothing kept
    TRAIN = "train"  # whole sequences, kept for the way back
    BACKWARD = "backward"


class Stage(IntEnum):
    """What has come for a layer, so that it can go on."""

    ENTER = 0  # h of the first layer
    RESUME = 1  # v, or nothing where the layer is not inline
    BACK_ENTER = 2  # dL/dh of the last layer
    BACK_RESUME = 3  # dL/du, or nothing where the layer is not inline


class Point(NamedTuple):
    """Where a pass waits to be computed."""

    way: Way
    stage: Stage
    layer: int


class Due(NamedTuple):
    """The frame that a pass waits for, and where it stands once that has come."""

    kind: Kind
    shape: tuple[int, ...]
    point: Point


class Reply(NamedTuple):
    """What a pass tells its device; without `due` the pass is over."""

    kind: Kind
    layer: int
    shape: tuple[int, ...]
    data: memoryview | bytes
    due: Due | None


@dataclass(eq=False)
class Account:
    """One session as the scheduler sees it: what compute it has used, and how fast its device answers."""

    weight: float = 1.0
    virtual_s: float = 0.0
    turnaround_s: float | None = None  # from a reply to the answer for the next point
    between_s: float | None = None  # from a finished token to the beginning of the next


class Owner(Protocol):
    """The session of a pass; the engine tells it, on the event loop, what became of the pass."""

    account: Account
    closed: bool

    def reply(self, one: Pass, reply: Reply) -> None: ...

    def fail(self, error: BaseException) -> None: ...

    def settle(self) -> None:
        """No pass of a session that was closed is being computed any more, or not this one."""


@dataclass(eq=False)
class Pass:
    """One session's ragged batch.

    Parameters
    ----------
    owner : its session.
    placement, inline : the session's, with A and B of its inline layers at its ranks.
    lengths, starts, caches : of its sequences; caches only where tokens are cached.
    rows : (n_o,) which rows of the result the device needs; None for all.
    end : the layer after the service's last.
    wire : element type of its frames.
    answer, answer_shape : what came for the point where it stands, until that is computed.
    running : whether a thread computes it now.
    """

    owner: Owner
    placement: Placement
    inline: Mapping[int, InlineWeights]
    way: Way
    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    caches: tuple[KVCache, ...] | None
    rows: Tensor | None
    end: int
    wire: WireDtype
    answer: memoryview | bytes = b""
    answer_shape: tuple[int, ...] = ()
    batch: Batch | None = None
    span: slice = field(default_factory=lambda: slice(0))
    saved: dict[int, tuple[Saved, slice]] = field(default_factory=dict)
    running: bool = False

    def __post_init__(self) -> None:
        self.n = sum(self.lengths)

    def forget(self) -> None:
        """It is over: let go of its tensors now, not when the garbage collector finds the circle of pass and batch."""
        self.batch, self.answer = None, b""
        self.saved.clear()

    @property
    def account(self) -> Account:
        return self.owner.account

    @property
    def first_point(self) -> Point:
        """Where it began."""
        return Point(self.way, Stage.ENTER, self.placement.first)

    def layers_left(self, point: Point) -> int:
        """Layers from `point` to where the pass, or its way back, is over."""
        if point.way is Way.BACKWARD:
            return point.layer - self.lowest_trained + 1
        return self.end - point.layer

    def stops_left(self, point: Point) -> int:
        """How often it will have something to tell its device until then, the end included."""
        inline = self.placement.inline
        if point.way is Way.BACKWARD:
            return bisect.bisect_left(inline, point.layer) + 1
        return len(inline) - bisect.bisect_left(inline, point.layer + (point.stage is Stage.RESUME)) + 1

    @property
    def lowest_trained(self) -> int:
        """The lowest layer that a gradient has to reach."""
        return self.placement.first if self.placement.trains_first else self.placement.inline[0]


class Batch:
    """Rows of passes that were computed together up to `layer`, in the order of `members`; `tensors` have as many rows.

    Forward: h (n, d), x (n, d), and qkv (n, q+k+v) once it was computed. Backward: dh (n, d), dqkv (n, q+k+v), h (n, d)
    that the layer began with, and dx (n, d) once it was computed.
    """

    def __init__(self, members: Sequence[Pass], ragged: Ragged, tensors: dict[str, Tensor]) -> None:
        self.members, self.ragged, self.tensors = list(members), ragged, tensors
        self.layer = -1
        at = 0
        for member in self.members:
            member.batch, member.span = self, slice(at, at + member.n)
            at += member.n


def ragged_of(config: ModelConfig, tables: RotaryTables, passes: Sequence[Pass]) -> Ragged:
    """The passes' sequences end to end."""
    cached = passes[0].caches is not None
    return Ragged(
        config,
        tables,
        [length for one in passes for length in one.lengths],
        [start for one in passes for start in one.starts],
        [cache for one in passes for cache in one.caches or ()] if cached else None,
    )


def gather(config: ModelConfig, tables: RotaryTables, passes: Sequence[Pass]) -> Batch:
    """The passes as one batch: the one that they are, if nobody else is in it, else their rows copied together."""
    first = passes[0].batch
    assert first is not None
    batches = {id(one.batch): one.batch for one in passes if one.batch is not None}
    if len(batches) == 1 and len(first.members) == len(passes):
        return first
    names = set.intersection(*(set(batch.tensors) for batch in batches.values()))
    tensors = {
        name: torch.cat([one.batch.tensors[name][one.span] for one in passes if one.batch is not None])
        for name in names
    }
    batch = Batch(passes, ragged_of(config, tables, passes), tensors)
    batch.layer = first.layer
    return batch


def gather_saved(passes: Sequence[Pass], layer: int) -> Saved:
    """What was kept of a layer, for the passes in their order; each forgets it."""
    kept = [one.saved.pop(layer) for one in passes]
    first = kept[0][0]
    at = 0
    for saved, span in kept:  # the very rows of one forward batch, in its order
        if saved is not first or span.start != at:
            break
        at = span.stop
    else:
        if at == len(first.h):
            return first
    return Saved.joined([saved.of_rows(span) for saved, span in kept])


def groups(passes: Sequence[Pass], layer: int) -> list[tuple[InlineWeights, list[Pass]]]:
    """The passes that are inline at `layer`, by the A and B that they use."""
    found: dict[int, tuple[InlineWeights, list[Pass]]] = {}
    for one in passes:
        inline = one.inline.get(layer)
        if inline is not None:
            found.setdefault(id(inline), (inline, []))[1].append(one)
    return list(found.values())


def rows_of(tensor: Tensor, passes: Sequence[Pass], batch: Batch) -> Tensor:
    """The passes' rows of a tensor of `batch`; the tensor itself where that is all of them."""
    if len(passes) == len(batch.members):
        return tensor
    if len(passes) == 1:
        return tensor[passes[0].span]
    return torch.cat([tensor[one.span] for one in passes])


def put_rows(tensor: Tensor, passes: Sequence[Pass], batch: Batch, rows: Tensor) -> Tensor:
    """`tensor` with the passes' rows replaced; `rows` itself where that is all of them."""
    if len(passes) == len(batch.members):
        return rows
    at = 0
    for one in passes:
        tensor[one.span] = rows[at : at + one.n]
        at += one.n
    return tensor

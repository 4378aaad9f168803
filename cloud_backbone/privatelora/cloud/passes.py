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
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from privatelora.cloud.sockets import Socket
from privatelora.decoder.backward import Saved
from privatelora.decoder.config import ModelConfig
from privatelora.decoder.kv import KVCache
from privatelora.decoder.layer import InlineWeights
from privatelora.decoder.ragged import Ragged
from privatelora.decoder.rotary import RotaryTables
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.frames import Kind, Phase
from privatelora.protocol.placement import Placement


class Way(StrEnum):
    """What a pass is for; passes of different ways are not computed together."""

    DECODE = "decode"  # one new token a sequence, cached
    PREFILL = "prefill"  # several, cached
    SCORE = "score"  # whole sequences, nothing kept
    TRAIN = "train"  # whole sequences, kept for the way back
    BACKWARD = "backward"


PHASES = {
    Way.DECODE: Phase.GENERATE,
    Way.PREFILL: Phase.GENERATE,
    Way.SCORE: Phase.SCORE,
    Way.TRAIN: Phase.TRAIN,
    Way.BACKWARD: Phase.BACKWARD,
}
"""What a way is called on the wire."""


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
    nbytes: int
    point: Point


class Reply(NamedTuple):
    """What passes of one way and wire tell their devices.

    rows, width : pass number i is told a tensor (rows[i], *width); data has them end to end.
    due : kind and width of what each device answers with, as many rows as it was told, and where its pass stands then;
        without it the passes are over.
    """

    passes: Sequence[Pass]
    wire: WireDtype
    kind: Kind
    layer: int
    rows: Sequence[int]
    width: tuple[int, ...]
    data: memoryview | bytes
    due: tuple[Kind, tuple[int, ...], Point] | None


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
    parked: bool
    heard_at: float
    socket: Socket

    def reply(self, one: Pass, header: bytes, data: memoryview | bytes, due: Due | None, due_header: bytes) -> None: ...

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
    wire, address : element type of its frames, and session, step and stream in their headers.
    direct : whether the engine exchanges frames with its device by itself, a batch at a time (`engine.py`).
    due : the frame that the device has to send next, since `told_at`.
    moved_up, moved_down : payload bytes that such exchanges have moved.
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
    address: bytes = b""
    direct: bool = False
    due: Due | None = None
    told_at: float = 0.0
    moved_up: int = 0
    moved_down: int = 0
    answer: memoryview | bytes = b""
    answer_shape: tuple[int, ...] = ()
    batch: Batch | None = None
    span: slice = field(default_factory=lambda: slice(0))
    saved: dict[int, tuple[Saved, slice]] = field(default_factory=dict)
    running: bool = False

    def __post_init__(self) -> None:
        self.n = sum(self.lengths)
        self.account = self.owner.account

    def forget(self) -> None:
        """It is over: let go of its tensors now, not when the garbage collector finds the circle of pass and batch."""
        self.batch, self.answer = None, b""
        self.saved.clear()

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


class Group(NamedTuple):
    """Passes of a batch that are inline at a layer with the same A and B, and whose frames have one element type."""

    inline: InlineWeights
    wire: WireDtype
    passes: Sequence[Pass]


class Batch:
    """Rows of passes that were computed together up to `layer`, in the order of `members`; `tensors` have as many rows.

    Forward: h (n, d), x (n, d), and qkv (n, q+k+v) once it was computed. Backward: dh (n, d), dqkv (n, q+k+v), h (n, d)
    that the layer began with, and dx (n, d) once it was computed.

    alike : whether all members have the same placement, A and B and element type, so that what is done for one of them
        is done for all.
    lock : held by the unit that changes layer and tensors and by what is computed ahead, which comes late where the
        answers have come to another thread: it sees one layer's state or the next one's, never a part of both.
    """

    def __init__(self, members: Sequence[Pass], ragged: Ragged, tensors: dict[str, Tensor]) -> None:
        self.members, self.ragged, self.tensors = list(members), ragged, tensors
        self.layer = -1
        self.lock = threading.RLock()
        at = 0
        for member in self.members:
            member.batch, member.span = self, slice(at, at + member.n)
            at += member.n
        first, *others = self.members
        self.alike = all(
            one.wire is first.wire and one.placement == first.placement and one.inline == first.inline for one in others
        )


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


def parted(batch: Batch, test: Callable[[Pass], bool]) -> tuple[list[Pass], list[Pass]]:
    """Members that pass a test of their placement, and the others."""
    if batch.alike:
        return (batch.members, []) if test(batch.members[0]) else ([], batch.members)
    return [one for one in batch.members if test(one)], [one for one in batch.members if not test(one)]


def groups(batch: Batch, passes: Sequence[Pass], layer: int) -> list[Group]:
    """The passes of a batch that are inline at `layer`, by the A and B that they use and their wire."""
    if batch.alike:
        inline = passes[0].inline.get(layer)
        return [] if inline is None else [Group(inline, passes[0].wire, passes)]
    found: dict[tuple[InlineWeights, WireDtype], list[Pass]] = {}
    for one in passes:
        inline = one.inline.get(layer)
        if inline is not None:
            found.setdefault((inline, one.wire), []).append(one)
    return [Group(inline, wire, some) for (inline, wire), some in found.items()]


def by_wire(batch: Batch, passes: Sequence[Pass]) -> list[tuple[WireDtype, Sequence[Pass]]]:
    """The passes by the element type of their frames."""
    if batch.alike:
        return [(passes[0].wire, passes)]
    return [(wire, [one for one in passes if one.wire is wire]) for wire in dict.fromkeys(one.wire for one in passes)]


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

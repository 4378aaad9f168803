"""The service's layers, run for many sessions' passes at once: one unit of work is one layer of one batch.

    ENTER        h_first (n, d)       -> norm of the first layer; u where that is inline
    RESUME       v (n, 3, r_up)       -> q, k, v += v B; attention, MLP; norm of the next layer; u where that is inline
    BACK_ENTER   dL/dh_{L-last}       -> back through the last layer's MLP and attention; dL/dv where that is inline
    BACK_RESUME  dL/du (n, E, r_down) -> back through the norm; then the next layer below, as BACK_ENTER

A pass that is not inline at the next layer goes on to it without an answer. This is the mathematics of DESIGN section 2
without sockets, threads or time: `scheduler.py` says which passes run next, and `engine.py` where. What an answer does
not change, q, k and v at a cut and their gradient's way back, `ahead` computes while the answer is on its way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from privatelora.cloud.passes import (
    Batch,
    Group,
    Pass,
    Point,
    Reply,
    Stage,
    Way,
    by_wire,
    gather,
    gather_saved,
    groups,
    parted,
    put_rows,
    ragged_of,
    rows_of,
)
from privatelora.cloud.payloads import read_answers, write_reply
from privatelora.decoder.backward import add_delta_back, encode_back, finish_back, finish_keeping, normed_back
from privatelora.decoder.config import ModelConfig
from privatelora.decoder.layer import add_delta, encode, finish, normed, project
from privatelora.decoder.rotary import RotaryTables
from privatelora.decoder.weights import LayerWeights
from privatelora.protocol.adapter import PROJECTIONS
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.frames import NO_LAYER, Kind

Answers = list[tuple[Group, Tensor]]
"""What came for an inline layer, (n', ...), by the passes whose rows it is for."""


@dataclass
class Done:
    """What a unit of work led to.

    replies : what passes tell their devices; they cannot go on before those answer, or are over.
    onward : passes that go on, and where they stand.
    ahead : the batch of which answers are awaited, if `LayerRunner.ahead` has something to do for it.
    """

    replies: list[Reply] = field(default_factory=list)
    onward: list[tuple[Pass, Point]] = field(default_factory=list)
    ahead: Batch | None = None


class LayerRunner:
    """The frozen layers of one process.

    Parameters
    ----------
    layers : by number.
    kept_layers : of how many layers, from the top, the way back finds all activations kept; those below are computed
        again from their input and q, k, v. None keeps all.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: Mapping[int, LayerWeights],
        tables: RotaryTables,
        device: torch.device,
        dtype: torch.dtype,
        kept_layers: int | None = None,
    ) -> None:
        self.config, self.layers, self.tables = config, layers, tables
        self.device, self.dtype = device, dtype
        self.recomputed_below = 0 if kept_layers is None else config.num_layers - kept_layers

    @torch.inference_mode()
    def run(self, point: Point, passes: Sequence[Pass]) -> Done:
        """One unit: all `passes` stand at `point`, with their answers where one was due.

        Raises `BadAnswers` before anything was computed; the unit can be run without the passes that it names.
        """
        done = Done()
        if point.stage is Stage.ENTER or point.stage is Stage.BACK_ENTER:
            ragged = ragged_of(self.config, self.tables, passes)
            batch = Batch(passes, ragged, {})
            came = self._entered(batch)  # (n, d), or (n_o, d) on the way back
            if point.stage is Stage.ENTER:
                batch.tensors["h"] = came
                self._arrive(batch, point.way, point.layer, done)
            else:
                batch.tensors["dh"] = _all_rows(came, passes)
                self._descend(batch, point.layer, done)
        else:
            batch = gather(self.config, self.tables, passes)
            answers = [  # in the order of the batch's rows, which need not be that in which they came
                (group, read_answers(group.passes, group.wire, self.dtype, self.device))
                for group in groups(batch, batch.members, point.layer)
            ]
            with batch.lock:
                self.ahead(batch)
                (self._forward if point.stage is Stage.RESUME else self._backward)(batch, point, answers, done)
        return done

    def _entered(self, batch: Batch) -> Tensor:
        """What came with the frames that begin this way, in the order of the batch's rows."""
        members = batch.members
        if len(by_wire(batch, members)) == 1:
            return read_answers(members, members[0].wire, self.dtype, self.device)
        return torch.cat([read_answers([one], one.wire, self.dtype, self.device) for one in members])

    @torch.inference_mode()
    def ahead(self, batch: Batch) -> None:
        """Compute what the answers that are due to `batch` do not change; else the unit that takes them does."""
        with batch.lock:
            tensors, weights = batch.tensors, self.layers[batch.layer]
            if "dqkv" in tensors and "dx" not in tensors:
                tensors["dx"] = weights.qkv.back(tensors["dqkv"])  # (n, d)
            elif "x" in tensors and "qkv" not in tensors:
                tensors["qkv"] = project(weights, tensors["x"])  # (n, q+k+v)

    # -- forward -------------------------------------------------------------------------------------------------------

    def _forward(self, batch: Batch, point: Point, answers: Answers, done: Done) -> None:
        """v (n', 3, r_up) has come where it was due: the rest of the layer, and up to the next."""
        layer, weights = point.layer, self.layers[point.layer]
        qkv, h = batch.tensors.pop("qkv"), batch.tensors["h"]
        for (inline, _, members), v in answers:
            qkv = put_rows(qkv, members, batch, add_delta(self.config, rows_of(qkv, members, batch), v, inline))
        keeping = [one for one in batch.members if point.way is Way.TRAIN and layer >= one.lowest_trained]
        if keeping:
            recompute = layer < self.recomputed_below
            h, saved = finish_keeping(self.config, layer, weights, h, qkv, batch.ragged, recompute)
            for one in keeping:
                one.saved[layer] = saved, one.span
        else:
            h = finish(self.config, layer, weights, h, qkv, batch.ragged)
        batch.tensors = {"h": h}
        self._arrive(batch, point.way, layer + 1, done)

    def _arrive(self, batch: Batch, way: Way, layer: int, done: Done) -> None:
        """h has come to the input of `layer`: passes that end here leave, those that are inline here give u."""
        h = batch.tensors["h"]
        over, going = parted(batch, lambda one: layer == one.end)
        for wire, members in by_wire(batch, over) if over else ():
            done.replies.append(_result(members, wire, rows_of(h, members, batch)))
        if not going:
            return
        batch.layer = layer
        x = batch.tensors["x"] = normed(self.config, self.layers[layer], h)
        resumed = Point(way, Stage.RESUME, layer)
        for inline, wire, members in groups(batch, going, layer):
            u = encode(rows_of(x, members, batch), inline)  # (n', E, r_down)
            due = Kind.DELTA, (len(PROJECTIONS), inline.b.shape[1]), resumed
            done.replies.append(write_reply(members, wire, Kind.ENCODED, layer, u, [one.n for one in members], due))
            done.ahead = batch
        self._go_on(batch, going, resumed, done)

    # -- backward ------------------------------------------------------------------------------------------------------

    def _backward(self, batch: Batch, point: Point, answers: Answers, done: Done) -> None:
        """dL/du (n', E, r_down) has come where it was due: through the layer's norm, and into the layer below."""
        dx = batch.tensors["dx"]
        for (inline, _, members), du in answers:
            dx = put_rows(dx, members, batch, rows_of(dx, members, batch) + encode_back(du, inline))
        through_norm = normed_back(self.config, self.layers[point.layer], batch.tensors["h"], dx)
        batch.tensors = {"dh": batch.tensors["dh"] + through_norm}
        self._descend(batch, point.layer - 1, done)

    def _descend(self, batch: Batch, layer: int, done: Done) -> None:
        """dL/dh of the output of `layer`: passes that began above it leave, others go through MLP and attention."""
        over, going = parted(batch, lambda one: layer < one.placement.first)
        for wire, members in by_wire(batch, over) if over else ():
            dh, rows = rows_of(batch.tensors["dh"], members, batch), [one.n for one in members]
            done.replies.append(write_reply(members, wire, Kind.GRAD_HIDDEN, NO_LAYER, dh, rows, None))
        if not going:
            return
        batch = gather(self.config, self.tables, going)
        saved = gather_saved(going, layer)
        dh, dqkv = finish_back(self.config, layer, self.layers[layer], saved, batch.tensors["dh"], batch.ragged)
        batch.layer, batch.tensors = layer, {"dh": dh, "dqkv": dqkv, "h": saved.h}
        resumed = Point(Way.BACKWARD, Stage.BACK_RESUME, layer)
        for inline, wire, members in groups(batch, going, layer):
            due = Kind.GRAD_ENCODED, (inline.encoders, inline.a.shape[0] // inline.encoders), resumed
            last = [one for one in members if not one.placement.trains_first and layer == one.lowest_trained]
            for some, then in ((last, None), ([one for one in members if one not in last] if last else members, due)):
                if some:
                    dv = add_delta_back(self.config, rows_of(dqkv, some, batch), inline)  # (n', 3, r_up)
                    rows = [one.n for one in some]
                    done.replies.append(write_reply(some, wire, Kind.GRAD_DELTA, layer, dv, rows, then))
            done.ahead = batch
        self._go_on(batch, going, resumed, done)

    def _go_on(self, batch: Batch, going: Sequence[Pass], point: Point, done: Done) -> None:
        """Those that are not inline there need no answer."""
        if batch.alike:
            inline = point.layer in going[0].inline
            done.onward += [] if inline else [(one, point) for one in going]
        else:
            done.onward += [(one, point) for one in going if point.layer not in one.inline]


def _result(over: Sequence[Pass], wire: WireDtype, h: Tensor) -> Reply:
    """h_{L-last} (n, d) of passes that have come to their end: each gets the rows that its device asked for."""
    rows = [one.n for one in over]
    if not all(one.n == 1 or one.rows is None for one in over):
        parts = torch.split(h, rows)
        h = torch.cat([part if one.rows is None else part[one.rows] for one, part in zip(over, parts, strict=True)])
        rows = [one.n if one.rows is None else len(one.rows) for one in over]
    for one in over:
        for cache, start, length in zip(one.caches or (), one.starts, one.lengths, strict=False):
            cache.length = start + length
    due = None
    if over[0].way is Way.TRAIN:
        due = Kind.GRAD_HIDDEN, tuple(h.shape[1:]), Point(Way.BACKWARD, Stage.BACK_ENTER, over[0].end - 1)
    return write_reply(over, wire, Kind.HIDDEN, NO_LAYER, h, rows, due)


def _all_rows(grad: Tensor, passes: Sequence[Pass]) -> Tensor:
    """dL/dh_{L-last} (n_o, d) as (n, d), zero in the rows that the devices had no use for."""
    if all(one.rows is None for one in passes):
        return grad
    full = grad.new_zeros((sum(one.n for one in passes), grad.shape[1]))
    before, came = 0, 0
    for one in passes:
        count = one.n if one.rows is None else len(one.rows)
        rows = torch.arange(one.n) if one.rows is None else one.rows
        full[rows.to(grad.device) + before] = grad[came : came + count]
        before, came = before + one.n, came + count
    return full

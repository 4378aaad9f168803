"""One pass of a micro-batch through the service's layers, in steps: what to send, and the frame that is due then.

    forward:   h_first up; at every inline layer u down, v = M(u) up; h_{L-last} down
    backward:  dL/dh_{L-last} up; at every inline layer dL/dv down, dL/du up; dL/dh_first down

A `Stream`'s passes are generators that know no socket. Each `yield` hands an `Exchange` to
`exchange.RemoteLayers.run`, which sends it and comes back with the tensor that was due; meanwhile it goes on with other
streams. So no setting of the thread (gradient mode, torch's threads) may be changed across a `yield`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from privatelora.decoder.tensors import to_array
from privatelora.device.adapters import Adapter
from privatelora.device.threads import one_thread
from privatelora.protocol.accounting import backward_traffic, forward_traffic
from privatelora.protocol.frames import NO_LAYER, Frame, Kind, Phase, Selection

if TYPE_CHECKING:
    from privatelora.device.exchange import RemoteLayers

Result = TypeVar("Result")


@dataclass(frozen=True)
class Span:
    """New tokens of one sequence: its number, the position of the first, and how many."""

    sequence: int
    start: int
    length: int


@dataclass(frozen=True)
class Exchange:
    """A frame to send, and the kind, layer and shape of the one that answers it, in the same phase and stream."""

    frame: Frame
    kind: Kind
    layer: int
    shape: tuple[int, ...]


Steps = Generator[Exchange, Tensor, Result]
"""a pass: exchanges out, the tensors that answer them in, its result at the end"""


class Stream:
    """A micro-batch's way through the service's layers and back; `RemoteLayers.streams` numbers those of one step."""

    def __init__(self, remote: RemoteLayers, step: int, number: int) -> None:
        self.remote, self.step, self.number = remote, step, number
        self.placement, self.spec = remote.placement, remote.spec
        self._n = self._n_out = 0
        self._exchanged: dict[int, tuple[Tensor, Tensor]] = {}  # in training, u and v of each inline layer

    def forward(
        self, h: Tensor, spans: Sequence[Span], phase: Phase, adapter: Adapter, rows: Tensor | None = None
    ) -> Steps[Tensor]:
        """h_first (n, d) through the service's layers: h_{L-last} (n_o, d).

        `rows` (n_o,) are the rows whose result is needed, ascending; None for all. A placement with last layers always
        gets all of them.
        """
        remote, n = self.remote, h.shape[0]
        frame = self._frame(Kind.HIDDEN, phase, h)
        frame.spans = np.array([(s.sequence, s.start, s.length) for s in spans], np.uint32)
        if rows is not None and not self.placement.last:
            frame.selection, frame.outputs = _selection(rows, spans)
        n_out = n if frame.selection is Selection.ALL or rows is None else len(rows)
        self._n, self._n_out = n, n_out
        shape = remote.service.info.model.shape
        remote.expected += forward_traffic(shape, self.placement, self.spec, n, n_out, remote.wire_dtype)
        for layer in self.placement.inline:
            u = yield Exchange(frame, Kind.ENCODED, layer, self.spec.encoded_shape(n))
            frame = self._frame(Kind.DELTA, phase, self._delta(layer, u, phase, adapter), layer)
        return (yield Exchange(frame, Kind.HIDDEN, NO_LAYER, (n_out, h.shape[1])))

    def backward(self, grad: Tensor, adapter: Adapter) -> Steps[tuple[Tensor | None, dict[str, Tensor]]]:
        """dL/dh_{L-last} (n_o, d) back through the service: dL/dh_first (n, d) if trained there, and M's gradients."""
        remote, n = self.remote, self._n
        shape = remote.service.info.model.shape
        remote.expected += backward_traffic(shape, self.placement, self.spec, n, self._n_out, remote.wire_dtype)
        frame = self._frame(Kind.GRAD_HIDDEN, Phase.BACKWARD, grad)
        gradients: dict[str, Tensor] = {}
        for layer in reversed(self.placement.inline):
            dv = yield Exchange(frame, Kind.GRAD_DELTA, layer, self.spec.delta_shape(n))
            of_m, du = self._back_through(layer, dv, adapter)
            gradients |= of_m
            if du is None:  # the lowest inline layer, with nothing trained below
                return None, gradients
            frame = self._frame(Kind.GRAD_ENCODED, Phase.BACKWARD, du, layer)
        return (yield Exchange(frame, Kind.GRAD_HIDDEN, NO_LAYER, (n, grad.shape[1]))), gradients

    def _delta(self, layer: int, u: Tensor, phase: Phase, adapter: Adapter) -> Tensor:
        """v (n, 3, r_up) of u (n, E, r_down); in training both are kept for the way back, v with its graph."""
        training = phase is Phase.TRAIN
        with torch.set_grad_enabled(training), one_thread():
            if training:
                u = u.float().requires_grad_(layer != self.placement.inline[0] or self.placement.trains_first)
            v = adapter.delta(layer, u)
        if training:
            self._exchanged[layer] = u, v
        return v

    def _back_through(self, layer: int, dv: Tensor, adapter: Adapter) -> tuple[dict[str, Tensor], Tensor | None]:
        """M's gradients at one inline layer, and dL/du where that is needed."""
        u, v = self._exchanged.pop(layer)
        named = {f"m.{layer}.{name}": p for name, p in adapter.m[str(layer)].named_parameters()}
        with one_thread():
            found = torch.autograd.grad(v, [*named.values(), *([u] if u.requires_grad else [])], dv.float())
        return dict(zip(named, found, strict=False)), found[-1] if u.requires_grad else None

    def _frame(self, kind: Kind, phase: Phase, tensor: Tensor, layer: int = NO_LAYER) -> Frame:
        frame = Frame(kind, 0, phase, self.step, self.number, layer)  # the session is filled in when it is sent
        return frame.with_array(to_array(tensor, self.remote.wire_dtype), self.remote.wire_dtype)


def _selection(rows: Tensor, spans: Sequence[Span]) -> tuple[Selection, np.ndarray[tuple[int], np.dtype[np.uint32]]]:
    """How to ask for `rows` in the fewest bytes."""
    outputs = rows.numpy().astype(np.uint32)
    lasts = np.cumsum([span.length for span in spans], dtype=np.uint32) - np.uint32(1)
    if np.array_equal(outputs, lasts):
        return Selection.LAST, np.empty(0, np.uint32)
    return Selection.LISTED, outputs

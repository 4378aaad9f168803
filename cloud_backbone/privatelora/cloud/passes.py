"""One ragged batch on its way through the service's layers, cut wherever a device must answer.

    start(h)        -> Encoded(layer, u) at each inline layer, in turn answered by resume(v), then Finished(h)
    back(dh)        -> GradDelta(layer, dv), answered by back_resume(du), then GradInput(dh_first)
    ahead()         what needs no answer, while one is on its way: q, k and v at a cut, and their gradient's way back

This is the mathematics of DESIGN section 2 without sockets or threads: every method is one unit of work ("v has arrived
for layer l") that an engine may run whenever it likes. In training each stretch between two cuts is an autograd graph
of its own whose ends are kept, and dropped as soon as the backward pass has used them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from privatelora.decoder.config import ModelConfig
from privatelora.decoder.layer import InlineWeights, add_delta, encode, finish, normed, project
from privatelora.decoder.ragged import Ragged
from privatelora.decoder.weights import LayerWeights
from privatelora.protocol.placement import Placement


@dataclass(frozen=True)
class Encoded:
    """u (n, E, r_down) of an inline layer; the pass waits for v."""

    layer: int
    u: Tensor


@dataclass(frozen=True)
class Finished:
    """The rows of h_{L-last} that the device asked for, (n_o, d)."""

    h: Tensor


@dataclass(frozen=True)
class GradDelta:
    """dL/dv (n, 3, r_up) of an inline layer; the pass waits for dL/du if `awaits_u`, else it is over."""

    layer: int
    dv: Tensor
    awaits_u: bool


@dataclass(frozen=True)
class GradInput:
    """dL/dh_first (n, d), where first layers are trained: the backward pass is over."""

    dh: Tensor


Outcome = Encoded | Finished | GradDelta | GradInput


@dataclass(frozen=True)
class Stretch:
    """The kept ends of one autograd graph: leaves that want gradients, and outputs that receive them."""

    leaves: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass
class Cut:
    """Where a pass waits for v: an inline layer, its h and x (n, d), and qkv (n, q+k+v) once it was computed."""

    layer: int
    h: Tensor
    x: Tensor
    qkv: Tensor | None = None


@dataclass
class BackCut:
    """Where a pass waits for dL/du: an inline layer, dL/dh, dL/dqkv, and what of dL/dx follows from these."""

    layer: int
    dh: Tensor
    dqkv: Tensor
    dx: Tensor | None = None


class SplitPass:
    """State of one batch between two units of work.

    Parameters
    ----------
    layers : the service's frozen layers by number.
    inline : A and B of the session's inline layers at its ranks.
    rows : which rows of the result the device needs; None for all.
    keep : keep each stretch's graph for a backward pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: Mapping[int, LayerWeights],
        placement: Placement,
        inline: Mapping[int, InlineWeights],
        ragged: Ragged,
        rows: Tensor | None,
        keep: bool,
    ) -> None:
        self.config, self.layers, self.placement, self.inline = config, layers, placement, inline
        self.ragged, self.rows, self.keep = ragged, rows, keep
        self._cut: Cut | BackCut | None = None
        self._leaves: tuple[Tensor, ...] = ()
        self._stretches: list[Stretch] = []

    def start(self, h: Tensor) -> Outcome:
        """Run from h_first (n, d) to the first cut."""
        self._leaves = (h.requires_grad_(),) if self.keep and self.placement.trains_first else ()
        with self._mode(grad=bool(self._leaves)):
            return self._run(h, self.placement.first)

    def ahead(self) -> None:
        """Compute what the answer that is due does not change; without this call the answer's unit does it."""
        cut = self._cut
        with self._mode(grad=False):
            if isinstance(cut, Cut) and cut.qkv is None:
                cut.qkv = project(self.layers[cut.layer], cut.x.detach())
            elif isinstance(cut, BackCut) and cut.dx is None:
                cut.dx = self.layers[cut.layer].qkv.back(cut.dqkv)  # (n, d)

    def resume(self, v: Tensor) -> Outcome:
        """Take v (n, 3, r_up) at the cut and run to the next one."""
        self.ahead()
        cut, self._cut = self._cut, None
        assert isinstance(cut, Cut) and cut.qkv is not None
        layer, h, qkv = cut.layer, cut.h, cut.qkv
        if self.keep:
            v = v.requires_grad_()
            trained_below = self.placement.trains_first or layer != self.placement.inline[0]
            h, qkv = h.detach().requires_grad_(trained_below), qkv.requires_grad_(trained_below)
            self._leaves = (v, h, qkv) if trained_below else (v,)
        with self._mode(grad=self.keep):
            qkv = add_delta(self.config, qkv, v, self.inline[layer])
            h = finish(self.config, layer, self.layers[layer], h, qkv, self.ragged)
            return self._run(h, layer + 1)

    def back(self, grad: Tensor) -> Outcome:
        """Take dL/dh_{L-last} (n_o, d) and walk back to the highest inline layer, or to the start."""
        if self.rows is not None:
            full = grad.new_zeros((self.ragged.n, grad.shape[1]))
            grad = full.index_copy_(0, self.rows.to(grad.device), grad)  # (n, d)
        return self._back((grad,))

    def back_resume(self, du: Tensor) -> Outcome:
        """Take dL/du (n, E, r_down) at the cut and walk back to the next one."""
        self.ahead()
        cut, self._cut = self._cut, None
        assert isinstance(cut, BackCut) and cut.dx is not None
        du = du.transpose(1, 2).reshape(self.ragged.n, -1)  # (n, r_down * E)
        return self._back((cut.dh, torch.addmm(cut.dx, du, self.inline[cut.layer].a)))

    def _run(self, h: Tensor, layer: int) -> Outcome:
        end = self.placement.cloud_layers(self.config.num_layers).stop
        while layer < end:
            x = normed(self.config, self.layers[layer], h)
            inline = self.inline.get(layer)
            if inline is not None:
                self._keep_stretch(h, x)
                self._cut = Cut(layer, h, x)
                return Encoded(layer, encode(x.detach(), inline))
            h = finish(self.config, layer, self.layers[layer], h, project(self.layers[layer], x), self.ragged)
            layer += 1
        self._keep_stretch(h)
        self._cut = None
        if self.ragged.caches is not None:
            for cache, start, length in zip(self.ragged.caches, self.ragged.starts, self.ragged.lengths, strict=True):
                cache.length = start + length
        return Finished(h if self.rows is None else h[self.rows])

    def _keep_stretch(self, *outputs: Tensor) -> None:
        if self.keep:
            self._stretches.append(Stretch(self._leaves, outputs if self._leaves else ()))

    def _back(self, grads: Sequence[Tensor]) -> Outcome:
        stretch = self._stretches.pop()
        found = torch.autograd.grad(stretch.outputs, stretch.leaves, grads)
        if not self._stretches:  # the lowest stretch: its one leaf is h_first
            return GradInput(found[0])
        layer = self.placement.inline[len(self._stretches) - 1]
        awaits_u = len(found) > 1  # something below it is trained
        self._cut = BackCut(layer, *found[1:]) if awaits_u else None
        return GradDelta(layer, found[0], awaits_u)

    def _mode(self, grad: bool) -> AbstractContextManager[object]:
        if grad:
            return torch.enable_grad()
        return torch.no_grad() if self.keep else torch.inference_mode()  # inference tensors cannot enter a graph later

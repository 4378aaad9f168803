"""The whole model from the device's side: its own layers, the service's layers, and the adapter between and in them.

    forward_backward   embed, first layers, service (TRAIN), last layers, loss; and back, the same way
    score              the same forward, nothing kept
    decode             `decoding.Decoding`, a token a pass

A large batch is cut into micro-batches, which go side by side. Their sum is the batch's own loss and gradient, to
rounding, and the same bit for bit whatever the order in which their answers come. `session.py` calls these, and again
after a lost connection: each pass changes nothing but the service's own caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from privatelora.device.adapters import Adapter
from privatelora.device.batch import Batch
from privatelora.device.decoding import Decoding
from privatelora.device.exchange import RemoteLayers
from privatelora.device.gradients import GradientSum
from privatelora.device.losses import HeadCrossEntropy
from privatelora.device.model import DeviceModel
from privatelora.device.stream import Steps, Stream
from privatelora.protocol.errors import ConfigurationError
from privatelora.protocol.frames import Phase

LossFn = Callable[[Tensor, Tensor], Tensor]
"""logits (n_o, vocab) float32 and labels (n_o,) to a scalar loss"""

HIDDEN_CACHE_BYTES = 512 << 20  # h_{L-last} kept for later epochs where no gradient leaves the device
MICRO_BATCH_TOKENS = 512  # about so many in each, where the owner leaves the number of micro-batches to us


@dataclass(frozen=True)
class Forth:
    """A micro-batch that came forth, with what its way back needs."""

    stream: Stream
    h_first: Tensor  # (n, d), with the first layers' graph where they are trained
    h: Tensor  # h_{L-last}, (n_o, d), a leaf
    x: Tensor  # (n_o, d) for the LM head, with the last layers' graph


class SplitModel:
    """A frozen model in two places, with this device's adapter.

    Parameters
    ----------
    micro_batches : how many a batch is cut into; None leaves it to its tokens.
    """

    def __init__(
        self, model: DeviceModel, remote: RemoteLayers, adapter: Adapter, micro_batches: int | None = None
    ) -> None:
        self.model, self.remote, self.adapter, self.micro_batches = model, remote, adapter, micro_batches
        self.placement = model.placement
        self.cross_entropy = HeadCrossEntropy(model.head)
        self._hidden: dict[bytes, Tensor] = {}
        self._hidden_bytes = 0

    def decode(self, history: list[int]) -> Decoding:
        """Cached decoding after `history`, which the caller appends to."""
        return Decoding(self.model, self.remote, self.adapter, history)

    def forward_backward(self, batch: Batch, loss_fn: LossFn | None = None) -> tuple[float, dict[str, Tensor]]:
        """Loss of a batch, and the gradient of every parameter of the adapter by name; nothing is changed.

        `loss_fn` is mean cross-entropy unless the owner has one of their own, which gets the logits of the whole batch:
        then no micro-batch goes back before all have come forth.
        """
        streams, gradients = self._streams(batch), GradientSum()
        if loss_fn is None:
            labels = len(batch.rows)
            shares = self.remote.run([self._forth_and_back(*each, labels, gradients) for each in streams])
            return sum(shares), gradients.sums
        forths = self.remote.run([self._forth(*each) for each in streams])
        with torch.enable_grad():
            x = torch.cat([forth.x.detach() for forth in forths]).requires_grad_()  # (n_o, d)
            loss = loss_fn(self.model.logits(x), batch.labels)
        if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
            raise ConfigurationError("loss_fn must return a scalar tensor that depends on the logits")
        (dx,) = torch.autograd.grad(loss, x)
        dxs = torch.split(dx, [len(forth.x) for forth in forths])
        self.remote.run([self._back(*each, gradients) for each in zip(forths, dxs, strict=True)])
        return float(loss.detach()), gradients.sums

    @torch.inference_mode()
    def score(self, batch: Batch) -> float:
        """Sum of nats over a batch's labelled tokens."""
        return sum(self.remote.run([self._score(*each) for each in self._streams(batch)]))

    def _streams(self, batch: Batch) -> list[tuple[Stream, Batch]]:
        """The micro-batches of a pass, each with its stream."""
        wanted = self.micro_batches or round(len(batch.tokens) / MICRO_BATCH_TOKENS)
        parts = batch.cut(min(wanted, self.remote.service.info.limits.max_streams))
        return list(zip(self.remote.streams(len(parts)), parts, strict=True))

    def _forth_and_back(self, stream: Stream, part: Batch, labels: int, gradients: GradientSum) -> Steps[float]:
        """A micro-batch's share of the mean loss over the batch's `labels`; adds its gradients."""
        forth = yield from self._forth(stream, part)
        with torch.enable_grad():
            x = forth.x.detach().requires_grad_()
            loss = self.cross_entropy.mean(x, part.labels, labels)
        yield from self._back(forth, torch.autograd.grad(loss, x)[0], gradients)
        return float(loss.detach())

    def _forth(self, stream: Stream, part: Batch) -> Steps[Forth]:
        """A micro-batch from its tokens to what the LM head takes."""
        ragged = self.model.ragged(part.lengths)
        with torch.set_grad_enabled(self.placement.trains_first):
            h_first = self.model.enter(part.tokens, ragged, self.adapter)  # (n, d)
        h = yield from self._far(stream, h_first.detach(), part)
        h.requires_grad_(self.placement.sends_gradient)
        with torch.enable_grad():
            x = self.model.leave(h, ragged, self.adapter, part.rows if self.placement.last else None)  # (n_o, d)
        return Forth(stream, h_first, h, x)

    def _back(self, forth: Forth, dx: Tensor, gradients: GradientSum) -> Steps[None]:
        """dL/dx (n_o, d) back through every layer; adds the gradient of all that is trained."""
        stream, h = forth.stream, forth.h
        last = self._lora(self.model.last)
        found = torch.autograd.grad(forth.x, [*last.values(), *([h] if h.requires_grad else [])], dx)
        gradients.add(stream.number, dict(zip(last, found, strict=False)))
        if not h.requires_grad:
            return
        dh_first, of_m = yield from stream.backward(found[-1], self.adapter)
        gradients.add(stream.number, of_m)
        if dh_first is not None:
            first = self._lora(self.model.first)
            of_first = torch.autograd.grad(forth.h_first, list(first.values()), dh_first)
            gradients.add(stream.number, dict(zip(first, of_first, strict=True)))

    def _far(self, stream: Stream, h_first: Tensor, part: Batch) -> Steps[Tensor]:
        """h_{L-last} in training; from the device's own cache where nothing below the last layers trains."""
        if self.placement.sends_gradient:
            return (yield from stream.forward(h_first, part.spans(), Phase.TRAIN, self.adapter, part.rows))
        kept = [self._hidden.get(key) for key in part.keys]
        if all(h is not None for h in kept):
            return torch.cat([h for h in kept if h is not None])
        h = yield from stream.forward(h_first, part.spans(), Phase.SCORE, self.adapter, part.rows)
        for key, own in zip(
            part.keys, torch.split(h, list(part.lengths)), strict=True
        ):  # all rows: there are last layers
            if key not in self._hidden and self._hidden_bytes + own.nbytes <= HIDDEN_CACHE_BYTES:
                self._hidden[key] = own.clone()
                self._hidden_bytes += own.nbytes
        return h

    def _score(self, stream: Stream, part: Batch) -> Steps[float]:
        """A micro-batch's sum of nats."""
        ragged = self.model.ragged(part.lengths)
        h_first = self.model.enter(part.tokens, ragged, self.adapter)
        h = yield from stream.forward(h_first, part.spans(), Phase.SCORE, self.adapter, part.rows)
        x = self.model.leave(h, ragged, self.adapter, part.rows if self.placement.last else None)
        return self.cross_entropy.total(x, part.labels)

    def _lora(self, layers: range) -> dict[str, Tensor]:
        """The parameters of some of the device's own layers, by name."""
        return {name: p for name, p in self.adapter.named_parameters() if _lora_layer(name) in layers}


def _lora_layer(parameter: str) -> int:
    """The device-held layer that a parameter belongs to, -1 for M's."""
    kind, layer, *_ = parameter.split(".")
    return int(layer) if kind == "lora" else -1

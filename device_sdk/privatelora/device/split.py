"""The whole model from the device's side: its own layers, the service's layers, and the adapter between and in them.

    forward_backward   embed, first layers, service (TRAIN), last layers, loss; and back, the same way
    score              the same forward, nothing kept
    decode             `decoding.Decoding`, a token a pass

`session.py` calls these, and again after a lost connection: each pass changes nothing but the service's own caches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from privatelora.device.adapters import Adapter
from privatelora.device.batch import Batch
from privatelora.device.decoding import Decoding
from privatelora.device.exchange import RemoteLayers, Trace
from privatelora.device.losses import HeadCrossEntropy
from privatelora.device.model import DeviceModel
from privatelora.protocol.errors import ConfigurationError
from privatelora.protocol.frames import Phase

LossFn = Callable[[Tensor, Tensor], Tensor]
"""logits (n_o, vocab) float32 and labels (n_o,) to a scalar loss"""

HIDDEN_CACHE_BYTES = 512 << 20  # h_{L-last} kept for later epochs where no gradient leaves the device


class SplitModel:
    """A frozen model in two places, with this device's adapter."""

    def __init__(self, model: DeviceModel, remote: RemoteLayers, adapter: Adapter) -> None:
        self.model, self.remote, self.adapter = model, remote, adapter
        self.placement = model.placement
        self.cross_entropy = HeadCrossEntropy(model.head)
        self._hidden: dict[bytes, Tensor] = {}
        self._hidden_bytes = 0

    def decode(self, history: list[int]) -> Decoding:
        """Cached decoding after `history`, which the caller appends to."""
        return Decoding(self.model, self.remote, self.adapter, history)

    def forward_backward(self, batch: Batch, loss_fn: LossFn | None = None) -> tuple[float, dict[str, Tensor]]:
        """Loss of a batch, and the gradient of every parameter of the adapter by name; nothing is changed.

        `loss_fn` is mean cross-entropy unless the owner has one of their own.
        """
        ragged = self.model.ragged(batch.lengths)
        with torch.set_grad_enabled(self.placement.trains_first):
            h_first = self.model.enter(batch.tokens, ragged, self.adapter)  # (n, d)
        h, trace = self._far(h_first.detach(), batch)
        h.requires_grad_(self.placement.sends_gradient)
        with torch.enable_grad():
            x = self.model.leave(h, ragged, self.adapter, batch.rows if self.placement.last else None)  # (n_o, d)
            if loss_fn is None:
                loss = self.cross_entropy.mean(x, batch.labels)
            else:
                loss = loss_fn(self.model.logits(x), batch.labels)
        if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
            raise ConfigurationError("loss_fn must return a scalar tensor that depends on the logits")
        own = dict(self.adapter.named_parameters())
        last = {name: p for name, p in own.items() if _lora_layer(name) in self.model.last}
        leaves = [*last.values(), h] if h.requires_grad else [*last.values()]
        found = torch.autograd.grad(loss, leaves)
        gradients = dict(zip(last, found, strict=False))
        if trace is not None:
            dh_first, of_m = self.remote.backward(trace, found[-1], self.adapter)
            gradients |= of_m
            if dh_first is not None:
                first = {name: p for name, p in own.items() if _lora_layer(name) in self.model.first}
                gradients |= dict(zip(first, torch.autograd.grad(h_first, list(first.values()), dh_first), strict=True))
        return float(loss.detach()), gradients

    def _far(self, h_first: Tensor, batch: Batch) -> tuple[Tensor, Trace | None]:
        """h_{L-last} of a training batch; from the device's own cache where nothing below the last layers trains."""
        if self.placement.sends_gradient:
            return self.remote.forward(h_first, batch.spans(), Phase.TRAIN, self.adapter, batch.rows)
        kept = [self._hidden.get(key) for key in batch.keys]
        if all(h is not None for h in kept):
            return torch.cat([h for h in kept if h is not None]), None
        h, _ = self.remote.forward(h_first, batch.spans(), Phase.SCORE, self.adapter, batch.rows)
        for key, part in zip(
            batch.keys, torch.split(h, list(batch.lengths)), strict=True
        ):  # all rows: there are last layers
            if key not in self._hidden and self._hidden_bytes + part.nbytes <= HIDDEN_CACHE_BYTES:
                self._hidden[key] = part.clone()
                self._hidden_bytes += part.nbytes
        return h, None

    @torch.inference_mode()
    def score(self, batch: Batch) -> float:
        """Sum of nats over a batch's labelled tokens."""
        ragged = self.model.ragged(batch.lengths)
        h_first = self.model.enter(batch.tokens, ragged, self.adapter)
        h, _ = self.remote.forward(h_first, batch.spans(), Phase.SCORE, self.adapter, batch.rows)
        x = self.model.leave(h, ragged, self.adapter, batch.rows if self.placement.last else None)
        return self.cross_entropy.total(x, batch.labels)


def _lora_layer(parameter: str) -> int:
    """The device-held layer that a parameter belongs to, -1 for M's."""
    kind, layer, *_ = parameter.split(".")
    return int(layer) if kind == "lora" else -1

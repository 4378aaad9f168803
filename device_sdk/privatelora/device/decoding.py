"""Cached decoding of one sequence across device and service: a token a pass, replayable from the token history.

`DeviceSession.stream` asks for the next logits and chooses a token; the KV caches of the device's own layers are here,
those of the service's layers there, under this sequence's number.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from privatelora.decoder.kv import KVCache
from privatelora.decoder.ragged import Ragged
from privatelora.device.adapters import Adapter
from privatelora.device.exchange import RemoteLayers
from privatelora.device.model import DeviceModel
from privatelora.device.stream import Span
from privatelora.device.threads import one_thread
from privatelora.protocol.frames import Phase


class Decoding:
    """One sequence being generated: its number at the service, and how far each cache reaches.

    `history` belongs to the caller, who appends each chosen token to it; `next_logits` runs what no cache holds yet.
    """

    def __init__(self, model: DeviceModel, remote: RemoteLayers, adapter: Adapter, history: list[int]) -> None:
        self.model, self.remote, self.adapter, self.history = model, remote, adapter, history
        self.first, self.last = model.caches()
        self.restart()

    def restart(self) -> None:
        """Forget every cache: the next pass prefills the whole history under a new number."""
        self.close()
        self.sequence = self.remote.new_sequence()
        self.done = 0  # tokens of the history that the caches hold
        self.session = 0  # the service's session that they belong to

    def close(self) -> None:
        """Give the device's own caches back; those of the service are `RemoteLayers.release`'s."""
        self.first.release()
        self.last.release()

    @torch.inference_mode()
    def next_logits(self) -> Tensor:
        """Logits (vocab,) that follow the history; runs what of it no cache holds yet."""
        if self.done and self.session != self.remote.session:  # it ended meanwhile, and the service's cache with it
            self.restart()
        step = self.remote.service.info.limits.max_tokens_per_step
        while True:
            fresh = torch.tensor(self.history[self.done : self.done + step])
            with one_thread() if len(fresh) == 1 else nullcontext():
                x = self._run(fresh)
            self.done += len(fresh)
            self.session = self.remote.session
            if self.done == len(self.history):
                with one_thread():
                    return self.model.next_logits(x[0])

    def _run(self, fresh: Tensor) -> Tensor:
        """Run new tokens (n,) through every layer: what the LM head takes of the last, (1, d)."""
        model, span = self.model, Span(self.sequence, self.done, len(fresh))
        h = model.enter(fresh, self._ragged(span, self.first), self.adapter)
        h = self.remote.forward(h, [span], Phase.GENERATE, self.adapter, torch.tensor([len(fresh) - 1]))
        rows = torch.tensor([h.shape[0] - 1])
        return model.leave(h, self._ragged(Span(0, self.done, h.shape[0]), self.last), self.adapter, rows)

    def _ragged(self, span: Span, cache: KVCache) -> Ragged:
        return self.model.ragged([span.length], [span.start], [cache])

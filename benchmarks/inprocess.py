"""The service's own passes in this process, with nothing on a network: what rows about sockets are measured against.

    step = Sequences(backbone, placement, set_hash, spec, count=32).step
    h = step(h_first)        every sequence's next tokens through all layers; their last rows come back

It is `layers.LayerRunner` over passes of one or many sessions as the engine runs them, payloads and codec included;
what is left out is sockets, frames, threads and the scheduler. All sessions have one placement, so all are one batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from privatelora.cloud.backbone import Backbone
from privatelora.cloud.layers import LayerRunner
from privatelora.cloud.passes import Account, Due, Pass, Reply, Way
from privatelora.cloud.payloads import exchanges
from privatelora.decoder.kv import KVCache, KVPool, blocks_for
from privatelora.decoder.tensors import TORCH_DTYPES, to_array, to_tensor
from privatelora.protocol.adapter import AdapterSpec
from privatelora.protocol.codec import decode, encode
from privatelora.protocol.frames import ADDRESS
from privatelora.protocol.placement import Placement

Delta = Callable[[int, Tensor], Tensor]
"""layer and u (n, E, r_down) to v (n, 3, r_up)"""
Data = memoryview | bytes


class Nobody:
    """Owner of passes of which no session is told anything."""

    def __init__(self) -> None:
        self.account, self.closed = Account(), False

    def reply(self, one: Pass, header: bytes, data: Data, due: Due | None, due_header: bytes) -> None: ...

    def fail(self, error: BaseException) -> None: ...

    def settle(self) -> None: ...


class Sequences:
    """Cached sequences, each a session's only one, that decode together.

    Parameters
    ----------
    count, tokens : how many sequences, and of how many tokens at most.
    delta : a device's M; without one v is zero and at hand at once.
    """

    def __init__(
        self,
        backbone: Backbone,
        placement: Placement,
        set_hash: str,
        spec: AdapterSpec,
        count: int = 1,
        tokens: int = 256,
        delta: Delta | None = None,
    ) -> None:
        config, self.placement, self.spec, self.delta = backbone.config, placement, spec, delta
        self.runner = LayerRunner(config, backbone.layers, backbone.tables, backbone.device, backbone.dtype)
        self.inline = {l: backbone.inline_weights(set_hash, spec)[l] for l in placement.inline}
        self.layers = placement.cloud_layers(config.num_layers)
        self.pool = KVPool(config, self.layers, count * blocks_for(tokens), backbone.dtype, backbone.device)
        self.caches = [KVCache(self.pool) for _ in range(count)]
        self.wire = next(wire for wire, dtype in TORCH_DTYPES.items() if dtype is backbone.dtype)
        self.nobody = Nobody()

    def step(self, h: Tensor) -> Tensor:
        """h_first (count * n, d) of every sequence's next n tokens, to h_{L-last} of the last of them, (count, d)."""
        n = len(h) // len(self.caches)
        payload = memoryview(encode(to_array(h, self.wire), self.wire))
        size = len(payload) // len(self.caches)
        passes = [
            self._pass(cache, n, payload[number * size : (number + 1) * size], (n, h.shape[1]))
            for number, cache in enumerate(self.caches)
        ]
        results = self._run(passes)
        return self._read(b"".join(results), (len(results), h.shape[1]))

    def _pass(self, cache: KVCache, n: int, payload: Data, shape: tuple[int, ...]) -> Pass:
        way, rows = (Way.DECODE, None) if n == 1 else (Way.PREFILL, torch.tensor([n - 1]))
        return Pass(
            self.nobody, self.placement, self.inline, way, (n,), (cache.length,), (cache,), rows, self.layers.stop,
            self.wire, bytes(ADDRESS.size), answer=payload, answer_shape=shape,
        )  # fmt: skip

    def _run(self, passes: list[Pass]) -> list[Data]:
        """All passes to their end, and what their devices would be sent then."""
        point = passes[0].first_point
        while True:
            done = self.runner.run(point, passes)
            if done.onward:
                point = done.onward[0][1]
                continue
            (reply,) = done.replies  # all have one placement, one adapter and one wire
            if reply.due is None:
                return [data for _, _, data, _, _ in exchanges(reply)]
            point = reply.due[2]
            for one, _, data, due, _ in exchanges(reply):
                assert due is not None
                one.answer, one.answer_shape = self._answer(reply, data, due), due.shape

    def _answer(self, reply: Reply, data: Data, due: Due) -> Data:
        if self.delta is None:
            return bytes(due.nbytes)
        v = self.delta(reply.layer, self._read(data, (due.shape[0], *reply.width)))
        return encode(to_array(v, self.wire), self.wire)

    def _read(self, data: Data, shape: tuple[int, ...]) -> Tensor:
        return to_tensor(decode(memoryview(data), self.wire, shape), self.wire, TORCH_DTYPES[self.wire])

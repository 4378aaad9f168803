"""What all sessions of a process share, and what a pass keeps of it: `Resources`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from privatelora.cloud.backbone import Backbone
from privatelora.cloud.engine import Engine
from privatelora.cloud.memory import Memory
from privatelora.cloud.passes import Way
from privatelora.decoder.kv import KVPool
from privatelora.protocol.messages import Limits
from privatelora.protocol.placement import Placement


@dataclass(frozen=True)
class Resources:
    """What all sessions of a process share.

    Parameters
    ----------
    reclaim : takes memory from devices that have been silent, if that is how so many bytes come free.
    check_serving : raises where no pass may begin any more.
    kept_row_bytes, lean_row_bytes : of a layer and row that is trained, kept whole and computed again.
    """

    backbone: Backbone
    limits: Limits
    engine: Engine
    pool: KVPool
    memory: Memory
    reclaim: Callable[[int], None]
    check_serving: Callable[[], None]
    kept_row_bytes: int
    lean_row_bytes: int

    def pass_bytes(self, way: Way, rows: int, placement: Placement) -> int:
        """Bytes that a pass of so many rows keeps until it is over, KV blocks apart."""
        if way is not Way.TRAIN:
            return rows * self.lean_row_bytes  # about what a layer's input and q, k, v take between two layers
        trained = placement.cloud_layers(self.backbone.config.num_layers)
        lowest = trained.start if placement.trains_first else placement.inline[0]
        border = max(lowest, self.engine.runner.recomputed_below)
        lean, whole = min(border, trained.stop) - lowest, max(0, trained.stop - border)
        return rows * (self.lean_row_bytes * (lean + 1) + self.kept_row_bytes * whole)

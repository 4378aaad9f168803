"""The layers of a tiny model, published and read as a service's are, for tests of the decoder without a service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tests.support.fleet import MODELS
from tests.support.tiny import tiny_model
from torch import Tensor

from privatelora.decoder.config import ModelConfig
from privatelora.decoder.kv import KVCache, KVPool
from privatelora.decoder.layer import run_layer
from privatelora.decoder.publish import publish_model
from privatelora.decoder.ragged import Ragged
from privatelora.decoder.rotary import RotaryTables
from privatelora.decoder.weights import LayerWeights, load_layer


@dataclass(frozen=True)
class TinyLayers:
    config: ModelConfig
    layers: dict[int, LayerWeights]
    tables: RotaryTables

    def ragged(self, *lengths: int) -> Ragged:
        return Ragged(self.config, self.tables, lengths)

    def pool(self, blocks: int, grows: bool = False) -> KVPool:
        return KVPool(self.config, range(self.config.num_layers), blocks, torch.float32, grows=grows)

    @torch.inference_mode()
    def run(
        self,
        h: Tensor,
        lengths: Sequence[int],
        starts: Sequence[int] | None = None,
        caches: Sequence[KVCache] | None = None,
    ) -> Tensor:
        """h (n, d) through every layer."""
        ragged = Ragged(self.config, self.tables, lengths, starts, caches)
        for l, weights in self.layers.items():
            h = run_layer(self.config, l, weights, h, ragged)
        return h


def tiny_layers(name: str, folder: Path) -> TinyLayers:
    """The tiny model of the exactness tests of that name, in float32, made under `folder`."""
    family, fields = MODELS[name]
    tiny_model(family, folder / "source", **fields)
    parts = publish_model(folder / "source", folder / "data", torch.float32)
    layers = {l: load_layer(parts.parts[f"layer.{l}"], parts.config) for l in range(parts.config.num_layers)}
    return TinyLayers(parts.config, layers, RotaryTables(parts.config))

"""The device's own part of the model: embedding, its first and last layers with LoRA, final norm and LM head.

    tokens -> embed and first layers -> h_first        (to the service)
    h_{L-last} -> last layers -> final norm -> logits  (or the loss, `losses.py`; neither ever leaves)

The parts are downloaded once by hash (`service.py`) and run through `privatelora.decoder`, as the service's are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from privatelora.decoder.config import ModelConfig, load_config
from privatelora.decoder.functions import rms_norm
from privatelora.decoder.kv import KVCache, KVPool
from privatelora.decoder.layer import run_layer
from privatelora.decoder.linear import Linear
from privatelora.decoder.ragged import Ragged
from privatelora.decoder.rotary import RotaryTables
from privatelora.decoder.weights import LayerWeights, load_embedding, load_final, load_layer
from privatelora.device.adapters import Adapter
from privatelora.device.service import Service
from privatelora.protocol.placement import Placement

FIRST_BLOCKS = 64  # of a device's KV pools, which grow: 1024 tokens


class DeviceModel:
    """Frozen weights that a device holds at one placement."""

    def __init__(self, service: Service, placement: Placement) -> None:
        parts = service.info.model.parts
        self.config = read_model_config(service)
        self.placement = placement
        self.dtype: torch.dtype = getattr(torch, service.info.model.dtype)
        self.embedding = load_embedding(service.download(parts["embedding"]), self.config)  # (vocab, d)
        self.norm, head = load_final(service.download(parts["final"]), self.config)  # (d,), (vocab, d)
        self.head = self.embedding if head is None else head
        self.tables = RotaryTables(self.config, dtype=self.dtype)
        depth = self.config.num_layers
        self.first = range(placement.first)
        self.last = range(depth - placement.last, depth)
        self._first_pool, self._last_pool = (
            KVPool(self.config, layers, FIRST_BLOCKS, self.dtype, grows=True) for layers in (self.first, self.last)
        )
        self.layers: dict[int, LayerWeights] = {
            l: load_layer(service.download(parts[f"layer.{l}"]), self.config) for l in (*self.first, *self.last)
        }

    @cached_property
    def _packed_head(self) -> Linear:
        """The head for decoding; a device that never generates has no second copy of it."""
        return Linear(self.head)

    def ragged(
        self, lengths: Sequence[int], starts: Sequence[int] | None = None, caches: Sequence[KVCache] | None = None
    ) -> Ragged:
        return Ragged(self.config, self.tables, lengths, starts, caches)

    def caches(self) -> tuple[KVCache, KVCache]:
        """Empty caches of one sequence, for the first and for the last layers; whoever takes them releases them."""
        return KVCache(self._first_pool), KVCache(self._last_pool)

    def enter(self, tokens: Tensor, ragged: Ragged, adapter: Adapter) -> Tensor:
        """Tokens (n,) to h_first (n, d)."""
        h = self.embedding[tokens]
        return self._run(self.first, h, ragged, adapter)

    def leave(self, h: Tensor, ragged: Ragged, adapter: Adapter, rows: Tensor | None = None) -> Tensor:
        """h_{L-last} (n, d) to what the LM head takes, (n_o, d), of `rows` or of all that came."""
        h = self._run(self.last, h, ragged, adapter)
        if rows is not None:
            h = h[rows]
        return rms_norm(h, self.norm, self.config.norm_eps)

    def logits(self, x: Tensor) -> Tensor:
        """x (n_o, d) from `leave` to float32 logits (n_o, vocab), with the very gradient that `losses.py` gives."""
        return F.linear(x, self.head).float()

    def next_logits(self, x: Tensor) -> Tensor:
        """x (d,) of a sequence's last token to float32 logits (vocab,) of the next one."""
        return self._packed_head(x[None])[0].float()

    def _run(self, layers: range, h: Tensor, ragged: Ragged, adapter: Adapter) -> Tensor:
        for l in layers:
            h = run_layer(self.config, l, self.layers[l], h, ragged, adapter.layer_lora(l))
        if ragged.caches is not None and layers:
            for cache, start, length in zip(ragged.caches, ragged.starts, ragged.lengths, strict=True):
                cache.length = start + length
        return h


def read_model_config(service: Service) -> ModelConfig:
    """The model's configuration, as published beside its parts."""
    return load_config(service.download(service.info.model.parts["config.json"]))


def load_tokenizer(service: Service) -> PreTrainedTokenizerBase:
    """The published tokenizer, from a folder of links into the download cache."""
    folder = service.cache / "tokenizers" / service.info.model.sha256
    folder.mkdir(parents=True, exist_ok=True)
    for name, blob in service.info.model.parts.items():
        if "." in name and not name.startswith("layer."):
            link = folder / Path(name).name
            if not link.exists():
                with tempfile.TemporaryDirectory(dir=folder) as fresh:  # another process may make the same link now
                    made = Path(fresh) / link.name
                    made.symlink_to(service.download(blob).resolve())
                    made.replace(link)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def end_tokens(hf: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer, by the model's config and by its tokenizer."""
    ends = hf.get("eos_token_id")
    found = set(ends) if isinstance(ends, list) else {ends}
    return {token for token in found | {tokenizer.eos_token_id} if token is not None}

"""A ragged batch: sequences of unequal lengths laid end to end as (n, d) rows, without padding.

`Ragged` says which rows belong to which sequence and where each sequence stands in its context; from it follow the
rotary rows and the attention blocks, computed once and used by every layer. `KVCache` keeps the keys and values of one
sequence. Service and device make these from the spans of a frame, and `layer.py` consumes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from privatelora.decoder.config import ModelConfig
from privatelora.decoder.rotary import RotaryTables

QUERY_BLOCK = 128  # rows of queries scored at once: bounds the score matrix, and skips keys that causality hides
CACHE_BLOCK = 64  # tokens by which a KV cache grows, at least


class KVCache:
    """Keys and values of one sequence for a range of layers; `length` tokens are complete in all of them."""

    def __init__(
        self, config: ModelConfig, layers: range, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.layers = layers
        self.length = 0
        self._kv = torch.empty((2, len(layers), config.num_kv_heads, 0, config.head_dim), dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self._kv.nbytes

    def append(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write k, v (n, kv_heads, head_dim) at `start`; return keys and values so far, (kv_heads, T, head_dim)."""
        slot, end = layer - self.layers.start, start + k.shape[0]
        if end > self._kv.shape[3]:
            self._grow(end)
        keys, values = self._kv[0, slot], self._kv[1, slot]
        keys[:, start:end] = k.transpose(0, 1)
        values[:, start:end] = v.transpose(0, 1)
        return keys[:, :end], values[:, :end]

    def _grow(self, tokens: int) -> None:
        """Make room for `tokens` in all, and half as many again as there were."""
        capacity = self._kv.shape[3]
        wanted = max(tokens, capacity + capacity // 2)
        wanted += -wanted % CACHE_BLOCK
        grown = self._kv.new_empty((*self._kv.shape[:3], wanted, self._kv.shape[4]))
        grown[:, :, :, : self.length] = self._kv[:, :, :, : self.length]
        self._kv = grown


@dataclass(frozen=True)
class Block:
    """Queries `rows` of one sequence that attend to its keys [first_key, last_key)."""

    rows: slice  # within the sequence
    first_key: int
    last_key: int
    mask: Tensor | None  # (group * rows, keys) added to the scores; None: every key is visible


@dataclass(frozen=True)
class Group:
    """Neighbouring sequences of the same length that are scored together: `count` from number `first` on."""

    first: int
    count: int
    length: int


class Ragged:
    """Which rows of a batch belong to which sequence, and where each sequence stands.

    Parameters
    ----------
    lengths : new tokens of each sequence; their sum is n.
    starts : position of each sequence's first new token, which is how many tokens its cache holds.
    caches : one KV cache a sequence, or None where whole sequences are processed and nothing is kept.
    """

    def __init__(
        self,
        config: ModelConfig,
        tables: RotaryTables,
        lengths: Sequence[int],
        starts: Sequence[int] | None = None,
        caches: Sequence[KVCache] | None = None,
    ) -> None:
        self.config = config
        self.lengths = tuple(lengths)
        self.starts = tuple(starts) if starts is not None else (0,) * len(self.lengths)
        self.caches = tuple(caches) if caches is not None else None
        self.cos, sin = tables.rows(self.positions())  # (n, head_dim)
        left, right = sin.chunk(2, dim=-1)
        self.signed_sin = torch.cat((-left, right), dim=-1)  # as `functions.rotate` takes it
        self.groups = self._groups()
        self._blocks: dict[tuple[int, int | None], list[Block]] = {}

    @property
    def n(self) -> int:
        return sum(self.lengths)

    def positions(self) -> Tensor:
        """Position of every row, (n,)."""
        if len(self.lengths) == 1:
            return torch.arange(self.starts[0], self.starts[0] + self.lengths[0])
        return torch.cat([torch.arange(s, s + n) for s, n in zip(self.starts, self.lengths, strict=True)])

    def last_rows(self) -> Tensor:
        """Row of each sequence's last token."""
        return torch.tensor(self.lengths).cumsum(0) - 1

    def _groups(self) -> list[Group]:
        """Sequences with a cache stand alone: their keys lie apart."""
        if self.caches is not None:
            return [Group(sequence, 1, length) for sequence, length in enumerate(self.lengths)]
        groups: list[Group] = []
        for _, same in groupby(range(len(self.lengths)), key=lambda s: (self.lengths[s], self.starts[s])):
            first, *others = same
            groups.append(Group(first, 1 + len(others), self.lengths[first]))
        return groups

    def blocks(self, sequence: int, window: int | None) -> list[Block]:
        """How sequence number `sequence` is scored under a sliding window; made once for all layers."""
        key = (sequence, window)
        if key not in self._blocks:
            length, start = self.lengths[sequence], self.starts[sequence]
            self._blocks[key] = [
                self._block(slice(row, min(row + QUERY_BLOCK, length)), start, window)
                for row in range(0, length, QUERY_BLOCK)
            ]
        return self._blocks[key]

    def _block(self, rows: slice, start: int, window: int | None) -> Block:
        first_key = max(0, start + rows.start - window + 1) if window else 0
        last_key = start + rows.stop
        if rows.stop - rows.start == 1:
            return Block(rows, first_key, last_key, None)
        at = torch.arange(start + rows.start, start + rows.stop)[:, None]  # (rows, 1)
        key = torch.arange(first_key, last_key)[None, :]  # (1, keys)
        hidden = key > at
        if window:
            hidden |= at - key >= window
        mask = torch.zeros(hidden.shape, dtype=self.cos.dtype).masked_fill_(hidden, float("-inf"))
        group = self.config.num_heads // self.config.num_kv_heads
        return Block(rows, first_key, last_key, mask.repeat(group, 1).to(self.cos.device))

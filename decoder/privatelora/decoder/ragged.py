"""A ragged batch: sequences of unequal lengths laid end to end as (n, d) rows, without padding.

`Ragged` says which rows belong to which sequence and where each sequence stands in its context; from it follow the
rotary rows and the attention blocks, computed once and used by every layer. Service and device make it from the spans
of a frame and the sequences' caches (`kv.py`), and `layer.py` consumes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from privatelora.decoder import kernels
from privatelora.decoder.config import ModelConfig
from privatelora.decoder.kv import KVCache, KVPool
from privatelora.decoder.rotary import RotaryTables

QUERY_BLOCK = 128  # rows of queries scored at once: bounds the score matrix, and skips keys that causality hides


@dataclass(frozen=True)
class Block:
    """Queries `rows` of one sequence that attend to its keys [first_key, last_key)."""

    rows: slice  # within the sequence
    first_key: int
    last_key: int
    mask: Tensor  # (group * rows, keys) added to the scores


@dataclass(frozen=True)
class Group:
    """Neighbouring sequences of the same length that are scored together: `count` from number `first` on."""

    first: int
    count: int
    length: int


@dataclass(frozen=True)
class CachedTokens:
    """A batch in which every row is the one new token of a sequence in `pool`.

    blocks : (n, m) int32, the blocks of each row's sequence, in order; what is beyond its last is not read.
    positions : (n,) int32, the new token's.
    compiled : whether the compiled kernel can attend to them.
    """

    pool: KVPool
    blocks: Tensor
    positions: Tensor
    compiled: bool


class Ragged:
    """Which rows of a batch belong to which sequence, and where each sequence stands.

    Parameters
    ----------
    lengths : new tokens of each sequence; their sum is n.
    starts : position of each sequence's first new token, which is how many tokens its cache holds.
    caches : one KV cache a sequence, all of one pool, in which room is taken for the new tokens; None where whole
        sequences are processed and nothing is kept.
    tokens : how the rows lie in the pool if each is the one new token of a sequence, else None.
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
        self.n = sum(self.lengths)
        for cache, start, length in zip(self.caches or (), self.starts, self.lengths, strict=False):
            cache.reserve(start + length)
        positions = self.positions()
        self.cos, sin = tables.rows(positions)  # (n, head_dim)
        left, right = sin.chunk(2, dim=-1)
        self.signed_sin = torch.cat((-left, right), dim=-1)  # as `functions.rotate` takes it
        self.tokens = self._tokens(positions)
        self.groups = self._groups()
        self._blocks: dict[tuple[int, int | None], list[Block]] = {}

    def positions(self) -> Tensor:
        """Position of every row, (n,)."""
        lengths, starts = np.array(self.lengths), np.array(self.starts)
        before = np.cumsum(lengths) - lengths  # rows of the sequences before each
        return torch.from_numpy(np.arange(self.n) + np.repeat(starts - before, lengths))

    def last_rows(self) -> Tensor:
        """Row of each sequence's last token."""
        return torch.tensor(self.lengths).cumsum(0) - 1

    def _tokens(self, positions: Tensor) -> CachedTokens | None:
        if self.caches is None or self.n > len(self.lengths):
            return None
        pool = self.caches[0].pool
        widest = max(len(cache.blocks) for cache in self.caches)
        blocks = np.zeros((self.n, widest), np.int32)
        for row, cache in enumerate(self.caches):
            blocks[row, : len(cache.blocks)] = cache.blocks
        device = pool.store.device
        compiled = kernels.available(pool.store.dtype, device.type)
        return CachedTokens(pool, torch.from_numpy(blocks).to(device), positions.to(device, torch.int32), compiled)

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
        at = torch.arange(start + rows.start, start + rows.stop)[:, None]  # (rows, 1)
        key = torch.arange(first_key, last_key)[None, :]  # (1, keys)
        hidden = key > at
        if window:
            hidden |= at - key >= window
        mask = torch.zeros(hidden.shape, dtype=self.cos.dtype).masked_fill_(hidden, float("-inf"))
        group = self.config.num_heads // self.config.num_kv_heads
        return Block(rows, first_key, last_key, mask.repeat(group, 1).to(self.cos.device))

"""Keys and values of many sequences in blocks of one store, so that memory is taken and given back a block at a time.

`KVPool` is the store of one process: `BLOCK` tokens of every layer a block. `KVCache` is one sequence's blocks, in
order. `ragged.py` lines caches up in a batch; `layer.py` writes new tokens into them and attends over them in place.
Whoever owns a sequence releases it; a pool is used by one thread at a time for taking and giving.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from privatelora.decoder.config import ModelConfig

BLOCK = 16
"""Tokens of a block: as many as a vector register of 512 bits has float32s, since keys lie with their tokens side by
side. A sequence wastes half a block on average."""


class OutOfBlocks(Exception):
    """Every block of a pool is in use; whoever admits work decides what then."""


class KVPool:
    """Blocks for a range of layers.

    On a CPU the memory of a block counts as used from its first use on only; the lowest free block is taken first, so
    that what was used once is used again.

    store : (blocks, layers, 2, K, e * BLOCK); keys of a block and layer as (K, e, BLOCK), values as (K, BLOCK, e).
    grows : whether a pool without a free block is made anew at twice the size.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        blocks: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        grows: bool = False,
    ) -> None:
        self.layers, self.blocks, self.grows = layers, blocks, grows
        self.kv_heads, self.head_dim = config.num_kv_heads, config.head_dim
        shape = (blocks, len(layers), 2, self.kv_heads, self.head_dim * BLOCK)
        self.store = torch.empty(shape, dtype=dtype, device=device)
        self._free = list(range(blocks))  # a heap

    @property
    def used(self) -> int:
        return self.blocks - len(self._free)

    @property
    def block_bytes(self) -> int:
        return self.store[:1].nbytes

    def take(self, count: int) -> list[int]:
        """Take `count` blocks, or raise `OutOfBlocks` and take none."""
        while self.grows and count > len(self._free):
            self._free += range(self.blocks, 2 * self.blocks)  # larger than all before: still a heap
            self.blocks *= 2
            with torch.inference_mode(False):  # a tensor that is made within could not be written to outside
                grown = self.store.new_empty((self.blocks, *self.store.shape[1:]))
                grown[: len(self.store)] = self.store
            self.store = grown
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks of {BLOCK} tokens are needed, {len(self._free)} of {self.blocks} free")
        return [heapq.heappop(self._free) for _ in range(count)]

    def give(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            heapq.heappush(self._free, block)

    def keys(self) -> Tensor:
        """A view of all keys: (blocks, layers, K, e, BLOCK)."""
        return self.store[:, :, 0].view(*self.store.shape[:2], self.kv_heads, self.head_dim, BLOCK)

    def values(self) -> Tensor:
        """A view of all values: (blocks, layers, K, BLOCK, e)."""
        return self.store[:, :, 1].view(*self.store.shape[:2], self.kv_heads, BLOCK, self.head_dim)


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` tokens of one sequence."""
    return -(-tokens // BLOCK)


class KVCache:
    """One sequence's blocks in a pool; `length` tokens are complete in all layers."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.length = 0
        self.blocks: list[int] = []

    @property
    def nbytes(self) -> int:
        return len(self.blocks) * self.pool.block_bytes

    def missing(self, tokens: int) -> int:
        """Blocks that must be taken for `tokens` tokens in all."""
        return max(0, blocks_for(tokens) - len(self.blocks))

    def reserve(self, tokens: int) -> None:
        """Take the blocks for `tokens` tokens in all; raises `OutOfBlocks`."""
        if missing := self.missing(tokens):
            self.blocks += self.pool.take(missing)

    def release(self) -> None:
        """Give every block back; the cache is empty then."""
        self.pool.give(self.blocks)
        self.blocks, self.length = [], 0

    def append(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write k, v (n, K, e) of several tokens at `start`; keys and values so far, (K, T, e)."""
        pool, slot = self.pool, layer - self.pool.layers.start
        n, kv_heads, e = k.shape
        first, inside = divmod(start, BLOCK)
        at = torch.tensor(self.blocks[: blocks_for(start + n)], device=k.device)
        room = (len(at) - first) * BLOCK
        fresh = k.new_empty((2, room, kv_heads, e))  # the touched blocks, with what the first of them holds already
        if inside:
            fresh[0, :inside] = pool.keys()[at[first], slot, :, :, :inside].permute(2, 0, 1)
            fresh[1, :inside] = pool.values()[at[first], slot, :, :inside].transpose(0, 1)
        fresh[0, inside : inside + n], fresh[1, inside : inside + n] = k, v
        in_blocks = fresh.view(2, -1, BLOCK, kv_heads, e)
        pool.keys()[at[first:], slot] = in_blocks[0].permute(0, 2, 3, 1)
        pool.values()[at[first:], slot] = in_blocks[1].transpose(1, 2)
        if not start:
            return k.transpose(0, 1), v.transpose(0, 1)
        keys = pool.keys()[at, slot].permute(1, 0, 3, 2).reshape(kv_heads, -1, e)
        values = pool.values()[at, slot].transpose(0, 1).reshape(kv_heads, -1, e)
        return keys[:, : start + n], values[:, : start + n]

"""Keys and values in blocks: a sequence run in pieces, through scattered blocks, is the one that is run whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from tests.support.layers import TinyLayers
from torch import Tensor

from privatelora.decoder import kernels
from privatelora.decoder.kv import BLOCK, KVCache, KVPool, OutOfBlocks, blocks_for

PIECES = ([40], [1] * 40, [15, 1, 16, 1, 7], [17, 1, 1, 21])  # tokens a pass, over the edges of blocks
MODELS = ("llama", "mistral-yarn", "qwen2-linear", "qwen3")


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("model", MODELS)
def test_pieces_of_sequences_give_what_whole_sequences_give(
    load: Callable[[str], TinyLayers], model: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled and not kernels.available(torch.float32, "cpu"):
        pytest.skip("no compiled kernels (compiler, AVX2)")
    if not compiled:
        monkeypatch.setattr(kernels, "available", lambda dtype, device_type: False)
    layers = load(model)
    pool = layers.pool(64)
    pool.store.fill_(float("nan"))  # whatever a block held before must not matter
    h = torch.randn(40, layers.config.hidden_size, generator=torch.Generator().manual_seed(0))
    whole = layers.run(h, [40])
    for pieces in PIECES:
        cache = scattered(pool)
        assert relative(in_pieces(layers, cache, h, pieces), whole) < 1e-5
        cache.release()


def test_sequences_that_decode_together_do_not_touch_one_another(load: Callable[[str], TinyLayers]) -> None:
    layers = load("llama")
    pool = layers.pool(64)
    generator = torch.Generator().manual_seed(1)
    starts = (3, 31, 16)
    inputs = [torch.randn(start + 5, layers.config.hidden_size, generator=generator) for start in starts]
    alone = [layers.run(h, [len(h)])[start:] for start, h in zip(starts, inputs, strict=True)]
    caches = [scattered(pool) for _ in starts]
    for cache, start, h in zip(caches, starts, inputs, strict=True):
        layers.run(h[:start], [start], [0], [cache])
    for token in range(5):
        rows = torch.stack([h[start + token] for start, h in zip(starts, inputs, strict=True)])
        out = layers.run(rows, [1] * 3, [start + token for start in starts], caches)
        for row, expected in zip(out, alone, strict=True):
            assert relative(row, expected[token]) < 1e-5


def test_blocks_are_taken_lowest_first_and_given_back(load: Callable[[str], TinyLayers]) -> None:
    layers = load("llama")
    pool = layers.pool(4)
    one, other = KVCache(pool), KVCache(pool)
    one.reserve(BLOCK + 1)
    other.reserve(1)
    assert (one.blocks, other.blocks, pool.used) == ([0, 1], [2], 3)
    assert one.nbytes == 2 * pool.block_bytes == 2 * pool.store[0].nbytes
    with pytest.raises(OutOfBlocks, match="2 blocks of 16 tokens are needed, 1 of 4 free"):
        other.reserve(2 * BLOCK + 1)
    assert other.blocks == [2]  # nothing was taken
    one.release()
    other.reserve(3 * BLOCK)
    assert (other.blocks, pool.used) == ([2, 0, 1], 3)
    other.release()
    assert pool.used == 0


def test_a_pool_that_grows_keeps_what_it_holds(load: Callable[[str], TinyLayers]) -> None:
    layers = load("llama")
    pool = layers.pool(1, grows=True)
    h = torch.randn(40, layers.config.hidden_size, generator=torch.Generator().manual_seed(2))
    cache = KVCache(pool)
    assert relative(in_pieces(layers, cache, h, [10, 1, 19, 10]), layers.run(h, [40])) < 1e-5
    assert len(cache.blocks) == blocks_for(40) == 3
    assert pool.blocks == 4


def scattered(pool: KVPool) -> KVCache:
    """A cache for 40 tokens and more whose blocks lie apart and out of order."""
    cache = KVCache(pool)
    cache.reserve(3 * BLOCK)
    cache.blocks.reverse()
    return cache


def in_pieces(layers: TinyLayers, cache: KVCache, h: Tensor, pieces: Sequence[int]) -> Tensor:
    done, out = 0, []
    for count in pieces:
        out.append(layers.run(h[done : done + count], [count], [done], [cache]))
        done += count
    return torch.cat(out)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())

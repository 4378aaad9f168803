"""What a layer costs on this machine, measured once at start: time against rows, and bytes of what training keeps.

The scheduler weighs batches with a `CostModel` a lane; `Memory` counts what `row_bytes` says. Both are made of the very
code that serves: `LayerRunner`'s layers, with the torch threads that a batch of so many rows has if it is alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from privatelora.cloud.layers import LayerRunner
from privatelora.cloud.threads import use_threads
from privatelora.decoder.backward import finish_keeping
from privatelora.decoder.kv import KVCache, KVPool, blocks_for
from privatelora.decoder.layer import finish, normed, project
from privatelora.decoder.ragged import Ragged

DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64)
LONG_ROWS = (16, 64, 128, 256, 512)
CONTEXT, SEQUENCE = 100, 128  # tokens: of a decoding sequence's cache, and of one that is computed whole
LAYERS, REPEATS = 8, 3  # several layers, so that weights come from memory, as they do in service


@dataclass(frozen=True)
class CostModel:
    """Seconds of one layer of one batch against its rows.

    samples : (rows, seconds), ascending.
    """

    samples: tuple[tuple[int, float], ...]

    def seconds(self, rows: int) -> float:
        """Between two samples on a line; beyond the last in proportion."""
        table = self._table
        return table[rows] if rows < len(table) else table[-1] * rows / (len(table) - 1)

    def plus(self, seconds: float) -> CostModel:
        """With so many seconds more for every batch."""
        return CostModel(tuple((rows, one + seconds) for rows, one in self.samples))

    @cached_property
    def _table(self) -> list[float]:
        """By rows, up to the last sample: the scheduler asks some hundred times a batch."""
        (low, at_low), *rest = self.samples
        table = [at_low] * (low + 1)
        for high, at_high in rest:
            table += [at_low + (at_high - at_low) * (rows - low) / (high - low) for rows in range(low + 1, high + 1)]
            low, at_low = high, at_high
        return table


def measure_decoding(runner: LayerRunner, threads: Callable[[int], int]) -> CostModel:
    """Of batches of one new token a sequence, on the calling thread, in a pool of its own; takes about a second.

    threads : of torch, for a batch of so many rows.
    """
    config, each = runner.config, blocks_for(CONTEXT + 1)
    layers = range(config.num_layers)
    pool = KVPool(config, layers, DECODE_ROWS[-1] * each, runner.dtype, runner.device)

    def batch(rows: int) -> tuple[Ragged, list[KVCache]]:
        caches = [KVCache(pool) for _ in range(rows)]
        use_threads(threads(rows))
        return Ragged(config, runner.tables, [1] * rows, [CONTEXT] * rows, caches), caches

    return _measure(runner, batch, DECODE_ROWS)


def measure_long(runner: LayerRunner) -> CostModel:
    """Of batches of whole sequences, on the calling thread; takes about a second."""

    def batch(rows: int) -> tuple[Ragged, list[KVCache]]:
        return Ragged(runner.config, runner.tables, [min(rows, SEQUENCE)] * -(-rows // SEQUENCE)), []

    return _measure(runner, batch, LONG_ROWS)


@torch.inference_mode()
def _measure(
    runner: LayerRunner, batch: Callable[[int], tuple[Ragged, list[KVCache]]], counts: Sequence[int]
) -> CostModel:
    config, layers = runner.config, sorted(runner.layers)[:LAYERS]
    samples: list[tuple[int, float]] = []
    for rows in counts:
        ragged, caches = batch(rows)
        h = torch.randn(ragged.n, config.hidden_size).to(runner.device, runner.dtype)

        def once(h: Tensor = h, ragged: Ragged = ragged) -> float:
            started = time.perf_counter()
            for l in layers:
                weights = runner.layers[l]
                finish(config, l, weights, h, project(weights, normed(config, weights, h)), ragged)
            if runner.device.type == "cuda":
                torch.cuda.synchronize(runner.device)
            return (time.perf_counter() - started) / len(layers)

        once()  # makes what is made once: oneDNN's kernels of this shape
        seconds = statistics.median(once() for _ in range(REPEATS))
        samples.append((rows, max(seconds, samples[-1][1] if samples else 0.0)))  # noise may not make more rows cheaper
        for cache in caches:
            cache.release()
    return CostModel(tuple(samples))


@torch.inference_mode()
def row_bytes(runner: LayerRunner) -> tuple[int, int]:
    """Bytes that a layer keeps of a row for the way back: everything, and with the rest computed again."""
    config, rows = runner.config, 16
    layer = min(runner.layers)
    weights = runner.layers[layer]
    ragged = Ragged(config, runner.tables, [rows])
    h = torch.zeros(rows, config.hidden_size, dtype=runner.dtype, device=runner.device)
    qkv = project(weights, normed(config, weights, h))
    found = []
    for recompute in (False, True):
        _, saved = finish_keeping(config, layer, weights, h, qkv, ragged, recompute)
        kept = [tensor for tensor in vars(saved).values() if isinstance(tensor, Tensor)]
        found.append(sum(tensor.nbytes for tensor in kept) // rows)
    return found[0], found[1]

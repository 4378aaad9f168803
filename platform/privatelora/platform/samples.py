"""A backbone's numbers as a time series: what they are now, and rates and quantiles of the interval since the last."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from privatelora.cloud.metrics import Histogram, Metrics, Snapshot
from privatelora.cloud.passes import Way

QUANTILES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))


@dataclass(frozen=True)
class Point:
    """Numbers by name; `interval_s` is what rates and quantiles are of."""

    interval_s: float
    values: dict[str, float]


class Sampler:
    """Makes points of one process's `Metrics`."""

    def __init__(self, metrics: Metrics, interval_s: float) -> None:
        self._metrics = metrics
        self._at = time.perf_counter()
        self._tokens = dict(metrics.counted.tokens)
        self._counts = {name: list(found.counts) for name, found in self._histograms().items()}

    def next(self) -> Point:
        """The point of the interval that ends now."""
        now = time.perf_counter()
        interval_s, self._at = now - self._at, now
        snapshot = self._metrics.snapshot()
        values = _gauges(snapshot)
        for way, total in snapshot.counted.tokens.items():
            values[f"tokens_per_s.{way}"] = (total - self._tokens[way]) / interval_s
            self._tokens[way] = total
        for name, found in self._histograms().items():
            before, self._counts[name] = self._counts[name], list(found.counts)
            counts = [count - earlier for count, earlier in zip(found.counts, before, strict=True)]
            if sum(counts):
                values |= {f"{name}.{label}": quantile(found.bounds, counts, share) for label, share in QUANTILES}
        return Point(interval_s, values)

    def _histograms(self) -> dict[str, Histogram]:
        counted = self._metrics.counted
        return {
            "time_per_output_token_seconds": counted.pass_seconds[Way.DECODE],
            "prefill_seconds": counted.pass_seconds[Way.PREFILL],
            "device_wait_seconds": counted.device_seconds[Way.DECODE],
            "batch_rows": counted.batch_rows[Way.DECODE],
        } | {f"admission_wait_seconds.{what}": found for what, found in counted.admission_seconds.items()}


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float:
    """The value below which `share` of what was counted lies, straight between a bucket's bounds; what lies beyond the
    last bound counts as that bound."""
    wanted, below, lower = share * sum(counts), 0, 0.0
    for upper, count in zip(bounds, counts, strict=False):
        if below + count >= wanted and count:
            return lower + (upper - lower) * (wanted - below) / count
        below, lower = below + count, upper
    return float(bounds[-1])


def _gauges(now: Snapshot) -> dict[str, float]:
    return {
        "num_sessions_running": now.sessions_running,
        "num_sessions_waiting": now.sessions_waiting,
        "num_sessions_parked": now.sessions_parked,
        "num_passes_waiting": now.passes_waiting,
        "kv_blocks_used": now.kv_blocks_used,
        "kv_blocks_total": now.kv_blocks_total,
        "memory_used_bytes": now.memory_used_bytes,
        "memory_total_bytes": now.memory_total_bytes,
    }

"""What a backbone process has done and does now, in numbers: no session's text or tensors, and no one's name.

The engine, the sessions and the data plane count into one `Metrics`; `snapshot` gives all of it as a dataclass,
`prometheus_text` the same in Prometheus' text format, which `/metrics` serves. Names are shaped like vLLM's.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from privatelora.cloud.passes import Way
from privatelora.cloud.scheduler import Lane

if TYPE_CHECKING:
    from privatelora.cloud.plane import DataPlane

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
SECONDS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
WAITS = ("session", "memory")


@dataclass
class Histogram:
    """Counts by upper bound, the last beyond all of them."""

    bounds: Sequence[float]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    @property
    def count(self) -> int:
        return sum(self.counts)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.total += times * value


def _by_way(bounds: Sequence[float]) -> dict[Way, Histogram]:
    return {way: Histogram(bounds) for way in Way}


@dataclass
class CpuSeconds:
    """Of a lane: in the layers, and in the codec that brings tensors to and from bytes.

    torch's other threads are in it: where the loop computes with several of them, by what the process took meanwhile;
    where a thread does, as if each took what that thread did. A few rows on the loop, and the codec, are by the clock,
    which is cheaper to ask.
    """

    layers: float = 0.0
    codec: float = 0.0


@dataclass
class Counted:
    """Since the process began, by way: decode, prefill, score, train, backward.

    Parameters
    ----------
    batch_rows, batch_passes : rows and passes of each batch.
    layer_seconds : compute of a batch, one layer.
    device_seconds : from a reply to the device's answer, network included.
    wire_seconds : writing the replies of a batch.
    cpu_seconds : by lane; the rest of the process's CPU time is sockets, frames and the scheduler.
    pass_seconds : from a pass's first frame to its last reply, or to where its way back begins.
    tokens : rows of finished passes.
    admission_seconds : waits for a session, and of passes for memory.
    evicted : sessions, parked ones nearly always, whose memory was given to others.
    """

    batch_rows: dict[Way, Histogram] = field(default_factory=lambda: _by_way(ROWS))
    batch_passes: dict[Way, Histogram] = field(default_factory=lambda: _by_way(ROWS))
    layer_seconds: dict[Way, Histogram] = field(default_factory=lambda: _by_way(SECONDS))
    device_seconds: dict[Way, Histogram] = field(default_factory=lambda: _by_way(SECONDS))
    wire_seconds: dict[Way, Histogram] = field(default_factory=lambda: _by_way(SECONDS))
    pass_seconds: dict[Way, Histogram] = field(default_factory=lambda: _by_way(SECONDS))
    cpu_seconds: dict[Lane, CpuSeconds] = field(default_factory=lambda: {lane: CpuSeconds() for lane in Lane})
    tokens: dict[Way, int] = field(default_factory=lambda: dict.fromkeys(Way, 0))
    admission_seconds: dict[str, Histogram] = field(
        default_factory=lambda: {what: Histogram(SECONDS) for what in WAITS}
    )
    evicted: int = 0


@dataclass(frozen=True)
class Snapshot:
    """What is so now, and `counted` since the process began."""

    sessions_running: int
    sessions_waiting: int
    sessions_parked: int
    passes_ready: dict[Lane, int]
    passes_waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    memory_used_bytes: int
    memory_total_bytes: int
    counted: Counted


class Metrics:
    """The numbers of one data plane; `counted` is what others add to."""

    def __init__(self, plane: DataPlane) -> None:
        self.plane, self.counted = plane, Counted()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Exporter(self))

    def snapshot(self) -> Snapshot:
        """The numbers now; `counted` goes on being counted."""
        plane = self.plane
        return Snapshot(
            sessions_running=len(plane.sessions),
            sessions_waiting=len(plane.line),
            sessions_parked=sum(session.parked for session in plane.sessions.values()),
            passes_ready={lane: plane.engine.scheduler.waiting(lane) for lane in Lane},
            passes_waiting=len(plane.memory.line),
            kv_blocks_used=plane.pool.used,
            kv_blocks_total=plane.pool.blocks,
            memory_used_bytes=plane.memory.used_bytes,
            memory_total_bytes=plane.memory.total_bytes,
            counted=self.counted,
        )

    def prometheus_text(self) -> bytes:
        """All of it in Prometheus' text format, version 0.0.4."""
        return generate_latest(self._registry)


class _Exporter(Collector):
    """The snapshot as Prometheus' metric families."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def collect(self) -> Iterator[Metric]:
        now = self.metrics.snapshot()
        for name, value, text in (
            ("num_sessions_running", now.sessions_running, "Sessions that are open."),
            ("num_sessions_waiting", now.sessions_waiting, "Devices that wait for a session."),
            ("num_sessions_parked", now.sessions_parked, "Open sessions whose device has been silent."),
            ("num_passes_waiting", now.passes_waiting, "Passes that wait for memory."),
            ("kv_blocks_used", now.kv_blocks_used, "Blocks of the KV cache in use."),
            ("kv_blocks_total", now.kv_blocks_total, "Blocks of the KV cache that the memory budget allows."),
            ("memory_used_bytes", now.memory_used_bytes, "Taken of the budget of KV blocks and training activations."),
            ("memory_total_bytes", now.memory_total_bytes, "The budget of KV blocks and training activations."),
        ):
            yield GaugeMetricFamily(f"privatelora:{name}", text, value=value)
        ready = GaugeMetricFamily("privatelora:num_passes_ready", "Passes that can be computed.", labels=["lane"])
        for lane, count in now.passes_ready.items():
            ready.add_metric([lane], count)
        yield ready
        yield from self._counted(now.counted)

    def _counted(self, counted: Counted) -> Iterator[Metric]:
        tokens = CounterMetricFamily("privatelora:tokens", "Tokens of finished passes.", labels=["phase"])
        for way, count in counted.tokens.items():
            tokens.add_metric([way], count)
        yield tokens
        cpu = CounterMetricFamily("privatelora:cpu_seconds", "CPU time of compute.", labels=["lane", "part"])
        for lane, used in counted.cpu_seconds.items():
            cpu.add_metric([lane, "layers"], used.layers)
            cpu.add_metric([lane, "codec"], used.codec)
        yield cpu
        yield CounterMetricFamily(
            "privatelora:sessions_evicted", "Sessions whose memory was given to others.", value=counted.evicted
        )
        for name, found, text in (
            ("batch_rows", counted.batch_rows, "Rows of a batch."),
            ("batch_passes", counted.batch_passes, "Passes in a batch."),
            ("layer_seconds", counted.layer_seconds, "Compute of one layer of a batch."),
            ("device_wait_seconds", counted.device_seconds, "From a reply to the device's answer, network included."),
            ("wire_seconds", counted.wire_seconds, "Writing the replies of a batch."),
            ("pass_seconds", counted.pass_seconds, "From a pass's first frame to its last reply."),
        ):
            yield _family(f"privatelora:{name}", text, "phase", found)
        waits = counted.admission_seconds
        yield _family("privatelora:admission_wait_seconds", "Waits for a session, or for memory.", "resource", waits)
        decoded = {Way.DECODE: counted.pass_seconds[Way.DECODE]}
        yield _family("privatelora:time_per_output_token_seconds", "A decoded token's whole way.", "phase", decoded)


def _family(name: str, text: str, label: str, found: dict[Way, Histogram] | dict[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=[label])
    for key, histogram in found.items():
        buckets, below = [], 0
        for bound, count in zip((*histogram.bounds, "+Inf"), histogram.counts, strict=True):
            below += count
            buckets.append((str(bound), below))
        family.add_metric([str(key)], buckets=buckets, sum_value=histogram.total)
    return family

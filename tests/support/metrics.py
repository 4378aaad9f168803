"""What a running service says at /metrics, read with Prometheus' own parser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import httpx2
from prometheus_client.parser import text_string_to_metric_families
from tests.support.service import ServiceProcess


@dataclass(frozen=True)
class Numbers:
    """Samples by name, without the prefix, and label values."""

    samples: Mapping[tuple[str, ...], float]

    def __call__(self, name: str, *labels: str) -> float:
        return self.samples[(name, *labels)]

    def since(self, before: Numbers) -> Numbers:
        return Numbers({key: value - before.samples.get(key, 0.0) for key, value in self.samples.items()})

    def mean(self, name: str, *labels: str) -> float:
        """Of a histogram."""
        return self(f"{name}_sum", *labels) / max(1.0, self(f"{name}_count", *labels))


def metrics_text(running: ServiceProcess) -> str:
    answer = httpx2.get(running.url + "/metrics", headers={"Authorization": f"Bearer {running.token}"})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return str(answer.text)


def numbers(running: ServiceProcess) -> Numbers:
    return parsed(metrics_text(running))


def parsed(text: str) -> Numbers:
    return Numbers(
        {
            (sample.name.removeprefix("privatelora:"), *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    )

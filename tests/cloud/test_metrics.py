"""/metrics counts what was done, exactly, and says nothing of who did it or what it was about."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from tests.cloud.conftest import TOKENS, Serving, wait_for
from tests.support.fleet import DEPTH, Fleet
from tests.support.inside import serving as serving_inside
from tests.support.metrics import metrics_text, numbers, parsed
from tests.support.player import Player, at
from tests.support.service import ServiceProcess

from privatelora.cloud.backbone import Backbone
from privatelora.cloud.metrics import Histogram, Metrics
from privatelora.cloud.passes import Way
from privatelora.cloud.scheduler import Lane
from privatelora.device import DeviceSession
from privatelora.protocol.frames import Phase

SECRET = "a text that nobody else may read"


@pytest.fixture(scope="module")
def running(serving: Serving) -> Iterator[ServiceProcess]:
    with serving(park_after_s=0.5) as started:
        yield started


def test_a_known_workload_is_counted_exactly(running: ServiceProcess) -> None:
    before = numbers(running)
    with Player(running.url, running.token) as device:
        device.enter()
        device.run(Phase.GENERATE, (0, 0, 20), (1, 0, 3))
        device.decode(0, 20, 5)
        device.run(Phase.GENERATE, (0, 25, 1), (1, 3, 1))
        device.run(Phase.SCORE, (0, 0, 7))
        device.run(Phase.TRAIN, (0, 0, 11))
        device.run(Phase.TRAIN, (0, 0, 4), stop=at(2))  # under way, so counted nowhere yet but by its layers
        done = numbers(running).since(before)
        now = numbers(running)
        assert now("kv_blocks_used") == 3
        assert now("memory_used_bytes") > 3 * 24_576
        assert now("num_sessions_running") == 1
        wait_for(lambda: numbers(running)("num_sessions_parked") == 1)
    tokens = {"prefill": 23, "decode": 5 + 2, "score": 7, "train": 11, "backward": 11}
    passes = {"prefill": 1, "decode": 6, "score": 1, "train": 1, "backward": 1}
    units = {"prefill": 7, "decode": 42, "score": 7, "train": 7 + 3, "backward": 6}  # layers, and the way into them
    stops = {"prefill": 6, "decode": 36, "score": 6, "train": 6 + 2, "backward": 6}
    for way in Way:
        assert done("tokens_total", way) == tokens[way]
        assert done("pass_seconds_count", way) == passes[way]
        assert done("batch_passes_count", way) == done("layer_seconds_count", way) == units[way]
        assert done("batch_passes_sum", way) == units[way]  # it was alone
        assert done("device_wait_seconds_count", way) == stops[way]
        assert 0 < done("layer_seconds_sum", way) < 10
    assert done("batch_rows_sum", "score") == 7 * 7
    assert done("time_per_output_token_seconds_count", "decode") == 6
    wait_for(lambda: numbers(running)("num_sessions_running") == 0)
    assert numbers(running)("num_sessions_parked") == 0
    assert numbers(running)("kv_blocks_used") == 0


def test_histograms_agree_with_themselves(running: ServiceProcess) -> None:
    with Player(running.url, running.token) as device:
        device.enter()
        device.run(Phase.SCORE, (0, 0, 7))
    seen = 0
    for family in text_string_to_metric_families(metrics_text(running)):
        assert family.documentation
        if family.type != "histogram":
            assert family.type in ("gauge", "counter")
            continue
        by_label: dict[str, list[tuple[float, float]]] = {}
        counts: dict[str, float] = {}
        for sample in family.samples:
            (label,) = {value for key, value in sample.labels.items() if key != "le"}
            if sample.name.endswith("_bucket"):
                by_label.setdefault(label, []).append((float(sample.labels["le"]), sample.value))
            elif sample.name.endswith("_count"):
                counts[label] = sample.value
        for label, buckets in by_label.items():
            bounds, below = zip(*buckets, strict=True)
            assert list(bounds) == sorted(bounds) and bounds[-1] == math.inf
            assert list(below) == sorted(below) and below[-1] == counts[label]
            seen += 1
    assert seen == 6 * len(Way) + 2 + 1


def test_a_bucket_holds_what_is_not_above_its_bound() -> None:
    histogram = Histogram((1, 2, 4))
    for value in (0.5, 1, 1.5, 2, 4, 5):
        histogram.observe(value)
    assert (histogram.counts, histogram.count, histogram.total) == ([2, 2, 1, 1], 6, 14)


def test_nobody_is_named_and_nothing_quoted(fleet: Fleet, running: ServiceProcess) -> None:
    with fleet.connect(running, rank=8, placement="paper") as me:
        me.generate(SECRET, max_new_tokens=3)
        me.forward_backward(me.examples([SECRET]).examples)
        text = metrics_text(running)
        session = me.remote.session
    for private in (*TOKENS, *TOKENS.values(), SECRET, SECRET.split()[1], str(session), "127.0.0.1"):
        assert private not in text
    labels = {
        (name, value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        for name, value in sample.labels.items()
        if name != "le"
    }
    assert labels == {
        *(("phase", str(way)) for way in Way),
        *(("lane", str(lane)) for lane in Lane),
        ("resource", "session"),
        ("resource", "memory"),
        ("part", "layers"),
        ("part", "codec"),
    }


def test_a_token_is_needed(running: ServiceProcess) -> None:
    assert httpx2.get(running.url + "/metrics").status_code == 401
    wrong = {"Authorization": "Bearer wrong"}
    assert httpx2.get(running.url + "/metrics", headers=wrong).status_code == 401


def test_the_snapshot_says_the_same_as_the_text(fleet: Fleet, tmp_path: Path) -> None:
    backbone = Backbone.load(fleet.source("llama"), tmp_path, torch.float32)
    with serving_inside(backbone) as (plane, url):
        settings = {"placement": "paper", "rank": 8, "store_dir": tmp_path / "store"}
        with DeviceSession(url, token="t", cache_dir=fleet.folder / "cache", **settings) as me:
            me.forward_backward(me.examples(["one row", "and another"]).examples)
            stream = me.stream("once upon", max_new_tokens=8)
            next(stream)
            assert_same(plane.metrics)
            stream.close()
            assert me.generate("once upon", max_new_tokens=8)
        wait_for(lambda: not plane.sessions)
        assert {way for way, count in plane.metrics.counted.tokens.items() if count} == {*Way} - {Way.SCORE}
        assert_same(plane.metrics)


def assert_same(metrics: Metrics) -> None:
    text, now = parsed(metrics.prometheus_text().decode()), metrics.snapshot()
    assert text("num_sessions_running") == now.sessions_running
    assert text("num_sessions_waiting") == now.sessions_waiting
    assert text("num_sessions_parked") == now.sessions_parked
    assert text("num_passes_waiting") == now.passes_waiting
    assert text("kv_blocks_used") == now.kv_blocks_used
    assert text("kv_blocks_total") == now.kv_blocks_total > 0
    assert text("memory_used_bytes") == now.memory_used_bytes
    assert text("memory_total_bytes") == now.memory_total_bytes > 0
    assert text("sessions_evicted_total") == now.counted.evicted
    for lane, count in now.passes_ready.items():
        assert text("num_passes_ready", lane) == count
    counted = now.counted
    for way in Way:
        assert text("tokens_total", way) == counted.tokens[way]
        for name, found in (
            ("batch_rows", counted.batch_rows),
            ("batch_passes", counted.batch_passes),
            ("layer_seconds", counted.layer_seconds),
            ("device_wait_seconds", counted.device_seconds),
            ("wire_seconds", counted.wire_seconds),
            ("pass_seconds", counted.pass_seconds),
        ):
            assert text(f"{name}_count", way) == found[way].count
            assert text(f"{name}_sum", way) == pytest.approx(found[way].total)
    for what, waits in counted.admission_seconds.items():
        assert text("admission_wait_seconds_count", what) == waits.count
    assert counted.batch_rows[Way.TRAIN].count == DEPTH + 1

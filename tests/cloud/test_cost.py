"""What a batch is said to cost: measured samples, lines between them, proportion beyond."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.fleet import Fleet

from privatelora.cloud.backbone import Backbone
from privatelora.cloud.cost import CostModel, measure_decoding, measure_long
from privatelora.cloud.layers import LayerRunner

MODEL = CostModel(((2, 1.0), (4, 2.0), (8, 2.5)))


@pytest.mark.parametrize(
    ("rows", "seconds"), [(1, 1.0), (2, 1.0), (3, 1.5), (4, 2.0), (6, 2.25), (8, 2.5), (16, 5.0), (80, 25.0)]
)
def test_cost_is_on_the_line_through_the_samples_and_grows_in_proportion_beyond(rows: int, seconds: float) -> None:
    assert MODEL.seconds(rows) == pytest.approx(seconds)


def test_one_sample_is_a_floor_and_then_a_proportion() -> None:
    model = CostModel(((4, 1.0),))
    assert [model.seconds(rows) for rows in (1, 4, 8)] == [1.0, 1.0, 2.0]


@given(
    steps=st.lists(st.tuples(st.integers(1, 100), st.floats(0, 1)), min_size=1, max_size=6),
    rows=st.integers(1, 1000),
)
def test_more_rows_never_cost_less(steps: list[tuple[int, float]], rows: int) -> None:
    samples, at, seconds = [], 0, 0.0
    for more, longer in steps:
        at, seconds = at + more, seconds + longer
        samples.append((at, seconds))
    model = CostModel(tuple(samples))
    assert model.seconds(rows) <= model.seconds(rows + 1) + 1e-12


def test_measured_costs_do_not_fall_with_rows(fleet: Fleet, tmp_path: Path) -> None:
    backbone = Backbone.load(fleet.source("qwen3"), tmp_path, torch.float32)
    runner = LayerRunner(backbone.config, backbone.layers, backbone.tables, backbone.device, backbone.dtype)
    for model in (measure_decoding(runner, lambda rows: 1), measure_long(runner)):
        rows, seconds = zip(*model.samples, strict=True)
        assert list(rows) == sorted(set(rows))
        assert list(seconds) == sorted(seconds)
        assert seconds[0] > 0

"""The wire's cost is the formula of the design's section 3, and gives the numbers of its tables."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privatelora.protocol.accounting import (
    PAPER_SHAPES,
    Traffic,
    backward_traffic,
    device_lora_elements,
    exchange_reduction,
    forward_traffic,
    reduction_by_shape,
)
from privatelora.protocol.adapter import AdapterSpec, ModelShape
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.placement import Placement

SMOLLM2 = ModelShape(hidden=576, layers=30, q=576, k=192, v=192)
PAPER = AdapterSpec("random", 128, 128)

TABLE = [  # of DESIGN section 3: placement, adapter, round trips a token, adapter elements a token
    ("paper", PAPER, 31, 23_040),
    ("paper", AdapterSpec("calibrated", 64, 64), 31, 7_680),
    ("paper", AdapterSpec("calibrated", 32, 32), 31, 3_840),
    ("last=8,inline=all", AdapterSpec("calibrated", 32, 32), 23, 2_816),
    ("few-trips", AdapterSpec("calibrated", 64, 64), 5, 1_024),
    ("first=2,last=4,inline=12", AdapterSpec("calibrated", 64, 64), 2, 256),
    ("first=4,last=8", AdapterSpec("calibrated", 64, 64), 1, 0),
    ("one-trip", AdapterSpec("calibrated", 64, 64), 1, 0),
]


@pytest.mark.parametrize(("text", "spec", "round_trips", "elements"), TABLE)
def test_a_token_costs_what_the_table_says(text: str, spec: AdapterSpec, round_trips: int, elements: int) -> None:
    placement = Placement.parse(text, SMOLLM2.layers)
    assert placement.round_trips == round_trips
    assert forward_traffic(SMOLLM2, placement, spec, 1, 1).total - 2 * SMOLLM2.hidden == elements


REDUCTIONS = {"llama2-7b": (95.3, 96.9, 98.4), "llama2-13b": (96.3, 97.5, 98.8), "llama-33b": (97.1, 98.1, 99.0)}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_are_those_of_the_paper_and_of_the_design(name: str) -> None:
    shape, (paper, one_encoder, ours) = PAPER_SHAPES[name], REDUCTIONS[name]
    found = reduction_by_shape()[name]
    to_a_decimal = {"abs": 0.05 + 1e-9}
    assert 100 * found["paper"] == pytest.approx(paper, **to_a_decimal)
    calibrated = exchange_reduction(shape, AdapterSpec("calibrated", 128, 128))
    assert 100 * calibrated == pytest.approx(one_encoder, **to_a_decimal)
    assert 100 * found["default"] == pytest.approx(ours, **to_a_decimal)


def test_the_demo_reports_its_own_models_reduction() -> None:
    assert round(100 * exchange_reduction(SMOLLM2, AdapterSpec("calibrated", 32, 32)), 1) == 91.7


def test_the_baseline_moves_x_down_and_q_k_v_up_of_every_layer() -> None:
    assert device_lora_elements(SMOLLM2, 30) == 30 * (576 + 576 + 192 + 192)


@st.composite
def passes(draw: st.DrawFn) -> tuple[Placement, AdapterSpec, int, int]:
    first, last = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    inline = draw(st.lists(st.sampled_from(range(first, SMOLLM2.layers - last)), unique=True, max_size=6))
    spec = AdapterSpec(draw(st.sampled_from(["calibrated", "random"])), draw(ranks), draw(ranks))
    n_f = draw(st.integers(1, 500))
    n_o = n_f if last else draw(st.integers(1, n_f))  # the device's last layers need every row
    return Placement(first, last, tuple(sorted(inline)), draw(st.booleans())), spec, n_f, n_o


ranks = st.integers(1, 128)


@given(passes())
def test_forward_is_the_formula(made: tuple[Placement, AdapterSpec, int, int]) -> None:
    placement, spec, n_f, n_o = made
    d, s, e = SMOLLM2.hidden, len(placement.inline), 3 if spec.kind == "random" else 1
    assert forward_traffic(SMOLLM2, placement, spec, n_f, n_o) == Traffic(
        up=n_f * (d + s * 3 * spec.rank_up), down=n_f * s * e * spec.rank_down + n_o * d
    )


@given(passes())
def test_backward_is_the_formula(made: tuple[Placement, AdapterSpec, int, int]) -> None:
    placement, spec, n_f, n_o = made
    d, s, e = SMOLLM2.hidden, len(placement.inline), 3 if spec.kind == "random" else 1
    first_train = int(placement.first > 0 and placement.train_first)
    expected = Traffic()
    if s or first_train:
        answered = n_f * max(0, s - 1 + first_train) * e * spec.rank_down if s else 0
        expected = Traffic(up=n_o * d + answered, down=n_f * s * 3 * spec.rank_up + n_f * d * first_train)
    assert backward_traffic(SMOLLM2, placement, spec, n_f, n_o) == expected


@given(passes(), st.sampled_from([WireDtype.FLOAT32, WireDtype.BFLOAT16, WireDtype.FLOAT16]))
def test_bytes_are_elements_of_the_wires_type(made: tuple[Placement, AdapterSpec, int, int], dtype: WireDtype) -> None:
    item = dtype.nbytes((1,))
    for traffic in (forward_traffic, backward_traffic):
        elements, nbytes = traffic(SMOLLM2, *made), traffic(SMOLLM2, *made, dtype)
        assert (nbytes.up, nbytes.down) == (item * elements.up, item * elements.down)


def test_int8_pays_a_scale_a_row() -> None:
    placement, spec, n = Placement(inline=(3,)), AdapterSpec("random", 16, 8), 10
    traffic = forward_traffic(SMOLLM2, placement, spec, n, 1, WireDtype.INT8)
    rows_up, rows_down = n + 3 * n, 3 * n + 1  # h and v, u and the last row of h
    assert traffic.up == n * 576 + n * 3 * 8 + 4 * rows_up
    assert traffic.down == n * 3 * 16 + 576 + 4 * rows_down
    assert math.isclose(traffic.total, traffic.up + traffic.down)

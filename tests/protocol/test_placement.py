"""Who holds which layer: names and texts are read, written back, and refused with what would work."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privatelora.protocol.errors import ConfigurationError, PrivateLoraError
from privatelora.protocol.placement import NAMES, Placement

SMOLLM2_LAYERS = 30


@st.composite
def placements(draw: st.DrawFn) -> tuple[Placement, int]:
    """A placement that fits, and the depth of its model."""
    depth = draw(st.integers(1, 40))
    first = draw(st.integers(0, depth - 1))
    last = draw(st.integers(0, depth - 1 - first))
    inline = draw(st.lists(st.sampled_from(range(first, depth - last)), unique=True, max_size=8))
    return Placement(first, last, tuple(sorted(inline)), draw(st.booleans())), depth


@given(placements())
def test_what_describe_writes_parse_reads(made: tuple[Placement, int]) -> None:
    placement, depth = made
    assert Placement.parse(placement.describe(depth), depth) == placement


@given(placements())
def test_every_layer_is_held_by_one_side(made: tuple[Placement, int]) -> None:
    placement, depth = made
    cloud = placement.check(depth).cloud_layers(depth)
    assert [*range(placement.first), *cloud, *range(depth - placement.last, depth)] == list(range(depth))
    assert len(cloud) >= 1
    assert set(placement.inline) <= set(cloud)
    assert not set(placement.trained_layers(depth)) & set(cloud)


@given(st.text(max_size=40), st.integers(1, 40))
def test_any_other_text_is_a_configuration_error(text: str, depth: int) -> None:
    try:
        Placement.parse(text, depth).check(depth)
    except PrivateLoraError as error:
        assert isinstance(error, ConfigurationError)


@given(st.integers(-5, 45), st.integers(-5, 45), st.lists(st.integers(-5, 45), max_size=5), st.integers(1, 40))
def test_check_admits_exactly_what_fits(first: int, last: int, inline: list[int], depth: int) -> None:
    placement = Placement(first, last, tuple(inline))
    fits = (
        first >= 0
        and last >= 0
        and first + last < depth
        and all(first <= layer < depth - last for layer in inline)
        and all(a < b for a, b in pairwise(inline))
    )
    if fits:
        assert placement.check(depth) is placement
    else:
        with pytest.raises(ConfigurationError):
            placement.check(depth)


REFUSED = [
    ("papper", "paper, few-trips, one-trip"),
    ("", "paper, few-trips, one-trip"),
    ("first=2,frist=3", "frist"),
    ("first=two", "first=2,last=4"),
    ("train_first=maybe", "train_first=no"),
    ("first=20,last=10", "less than 30"),
    ("first=-1", "0 or more"),
    ("first=2,inline=1", "2..29"),
    ("inline=7+7", "without repeats"),
    ("inline=12+7", "ascending"),
    ("last=3,inline=27", "0..26"),
]


@pytest.mark.parametrize(("text", "advice"), REFUSED)
def test_a_refusal_says_what_would_work(text: str, advice: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Placement.parse(text, SMOLLM2_LAYERS)
    assert advice in str(refused.value)


def test_the_named_placements_are_those_of_the_design() -> None:
    assert NAMES == ("paper", "few-trips", "one-trip")
    assert Placement.parse("paper", SMOLLM2_LAYERS) == Placement(inline=tuple(range(30)))
    assert Placement.parse("few-trips", SMOLLM2_LAYERS) == Placement(last=8, inline=(2, 7, 12, 17))
    assert Placement.parse("one-trip", SMOLLM2_LAYERS) == Placement(first=2, last=2)


def test_a_model_too_shallow_for_a_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="none of 4"):
        Placement.parse("one-trip", 4)


def test_nothing_trained_below_the_last_layers_sends_no_gradient() -> None:
    assert not Placement(last=4).sends_gradient
    assert not Placement(first=2, last=4, train_first=False).sends_gradient
    assert Placement(first=2, last=4).sends_gradient
    assert Placement(last=4, inline=(3,)).sends_gradient

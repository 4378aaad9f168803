"""Split training computes what one process that holds everything computes: the loss, and every gradient.

The device's M and LoRA have random non-zero values (at zero half of the gradients vanish); service and device are two
processes with a socket between them; the reference is transformers' own model with the adapter hooked on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from tests.split.common import (
    E1,
    E1_MLP,
    E3,
    E3_MLP,
    FULL,
    MIXED,
    NARROW,
    ONE_TRIP,
    PAPER,
    PLACEMENTS,
    SUBSET,
    SUBSET_FIRST,
    TOLERANCE,
    Adapter,
    assert_close,
    assert_equal_gradients,
    make_random,
    random_examples,
)
from tests.support.fleet import SMOLLM2, Fleet
from tests.support.reference import Reference, difference, reference

from privatelora.device import DeviceSession
from privatelora.device.data import Example


@dataclass(frozen=True)
class Case:
    """A model, who holds which layer, and the adapter."""

    model: str
    placement: str
    adapter: Adapter = field(default_factory=lambda: E1)

    def __str__(self) -> str:
        return "-".join((self.model, self.placement, *map(str, self.adapter.values())))


CASES = [
    *(Case("llama", placement) for placement in PLACEMENTS),
    *(Case("llama", PAPER, adapter) for adapter in (E3, E1_MLP, E3_MLP, FULL, NARROW)),
    *(Case("llama", MIXED, adapter) for adapter in (E3_MLP, NARROW)),
    Case("llama", SUBSET_FIRST, E3),
    *(
        Case(model, placement, adapter)
        for model in ("llama-llama3", "mistral-yarn", "qwen2-linear", "qwen3")
        for placement, adapter in ((PAPER, E1), (SUBSET, E3), (MIXED, E1_MLP), (ONE_TRIP, E1))
    ),
]

# Past every sliding window (24), every original context (64) and a block of queries (128); equal neighbours are scored
# together.
LENGTHS = (150, 130, 130, 37, 37, 2)
STEP_LENGTHS = ((9, 30), (20, 20), (5, 7), (3, 3))  # the last two are few rows, as a decoded token is
STEPS = 20
# AdamW divides a gradient by its own size, so where one is as small as its rounding error, the value may go either way
# by the whole learning rate; the rate keeps these few elements below the tolerance.
LEARNING_RATE = 2e-4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_split_gradients_equal_monolithic(fleet: Fleet, case: Case) -> None:
    with fleet.session(case.model, placement=case.placement, **case.adapter) as me:
        make_random(me)
        vocabulary = me.config.vocab_size
        batch = random_examples(LENGTHS, vocabulary)
        steps = [random_examples(lengths, vocabulary, seed=step) for step, lengths in enumerate(STEP_LENGTHS, 1)]
        assert_equal_before_and_after_training(fleet, case, me, batch, steps)


SMOLLM2_CASES = [
    Case(SMOLLM2, PAPER, {"rank": 64}),
    Case(SMOLLM2, "first=1,last=2,inline=3+11+20", {"adapter": "random", "rank": (128, 32), "m_kind": "mlp"}),
    Case(SMOLLM2, ONE_TRIP, {}),
]


@pytest.mark.parametrize("case", SMOLLM2_CASES, ids=str)
def test_split_gradients_equal_monolithic_on_real_weights(fleet: Fleet, case: Case) -> None:
    with fleet.session(case.model, placement=case.placement, **case.adapter) as me:
        make_random(me, spread=0.03)
        data = me.examples(
            [
                {"prompt": "My cat is called", "completion": " Miso the Brave, and she sleeps in the oven."},
                {"prompt": "The door code", "completion": " is 4071"},
            ]
        )
        assert_equal_before_and_after_training(fleet, case, me, data.examples, [data.examples[1:]])


def assert_equal_before_and_after_training(
    fleet: Fleet, case: Case, me: DeviceSession, batch: Sequence[Example], steps: Sequence[Sequence[Example]]
) -> None:
    """Loss, gradients and, after twenty steps that each side takes by its own gradients, the trained values."""
    with reference(fleet.model(case.model), me, fleet.data_dir(case.model)) as whole:
        assert_equal_gradients(me, whole, batch)
        start = {name: value.detach().clone() for name, value in whole.values.items()}
        train_both(me, whole, steps)
        assert min(difference(whole.values[name], start[name]) for name in start) > 100 * TOLERANCE  # it moved
        assert_close(dict(me.adapter.named_parameters()), whole.values)
        assert_equal_gradients(me, whole, batch)


def train_both(me: DeviceSession, whole: Reference, batches: Sequence[Sequence[Example]]) -> None:
    """Twenty steps on both sides: gradients clipped, AdamW without decay."""
    values = list(whole.values.values())
    optimizer = torch.optim.AdamW(values, lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(STEPS):
        batch = batches[step % len(batches)]
        me.forward_backward(batch)
        me.optim_step(LEARNING_RATE, clip_norm=1.0)
        whole.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(values, 1.0)
        optimizer.step()
        optimizer.zero_grad()

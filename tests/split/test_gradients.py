"""Split training computes what one process that holds everything computes: the loss, and every gradient.

The device's M and LoRA have random non-zero values (at zero half of the gradients vanish); service and device are two
processes with a socket between them; the reference is transformers' own model with the adapter hooked on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.fleet import SMOLLM2, Fleet
from tests.support.reference import Reference, difference, reference

from privatelora.device import DeviceSession
from privatelora.device.data import IGNORE, Example

PAPER = "paper"
SUBSET = "inline=1+4"  # the lowest inline layer answers no dL/du: nothing below it is trained
SUBSET_FIRST = "first=1,inline=2+4"  # here it does answer
MIXED = "first=1,last=1,inline=2+3"
MIXED_FROZEN = "first=1,last=1,inline=2+4,train_first=no"
ONE_TRIP = "one-trip"  # first 2, last 2, nothing inline
ONE_TRIP_FROZEN = "first=2,last=2,train_first=no"
LAST = "last=3"
PLACEMENTS = [PAPER, SUBSET, SUBSET_FIRST, MIXED, MIXED_FROZEN, ONE_TRIP, ONE_TRIP_FROZEN, LAST]

E1 = {"rank": (32, 16)}
E3 = {"adapter": "random", "rank": (24, 16)}
E1_MLP = {"rank": (32, 16), "m_kind": "mlp", "m_hidden": 40}
E3_MLP = {"adapter": "random", "rank": (24, 16), "m_kind": "mlp", "m_hidden": 40}
FULL = {"rank": (64, 32)}  # every row of the set
NARROW = {"rank": (5, 3)}  # prefixes of it


@dataclass(frozen=True)
class Case:
    """A model, who holds which layer, and the adapter."""

    model: str
    placement: str
    adapter: dict[str, Any] = field(default_factory=lambda: E1)

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

LENGTHS = (150, 37, 70, 2)  # past every sliding window (24), every original context (64), a block of queries (128)
STEP_LENGTHS = (9, 30)
STEPS = 20
LEARNING_RATE = 2e-4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_split_gradients_equal_monolithic(fleet: Fleet, case: Case) -> None:
    with fleet.session(case.model, placement=case.placement, **case.adapter) as me:
        make_random(me, spread=0.1)
        vocabulary = me.config.vocab_size
        batch = random_examples(LENGTHS, vocabulary)
        steps = [random_examples(STEP_LENGTHS, vocabulary, seed=step) for step in range(1, 5)]
        with reference(fleet.model(case.model), me, fleet.data_dir(case.model)) as whole:
            assert_equal_gradients(me, whole, batch)
            train_both(me, whole, steps)
            assert_equal_gradients(me, whole, batch)


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
                {"prompt": "The door code is", "completion": " 4071."},
            ]
        )
        with reference(fleet.model(case.model), me, fleet.data_dir(case.model)) as whole:
            assert_equal_gradients(me, whole, data.examples)
            train_both(me, whole, [data.examples])
            assert_equal_gradients(me, whole, data.examples)


def make_random(me: DeviceSession, spread: float) -> None:
    """Random values for all that is trained: an adapter as far from its start as it will ever be."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in me.adapter.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))


def random_examples(lengths: tuple[int, ...], vocabulary: int, seed: int = 0) -> list[Example]:
    """Sequences of these lengths, about a third of whose tokens carry a label."""
    generator = np.random.default_rng(seed)
    examples = []
    for length in lengths:
        tokens = generator.integers(0, vocabulary, length)
        labels = np.append(tokens[1:], IGNORE)
        labels[: -2 * length // 3] = IGNORE
        labels[:-2][generator.random(length - 2) < 0.4] = IGNORE
        examples.append(Example(tokens, labels))
    return examples


def assert_equal_gradients(me: DeviceSession, whole: Reference, batch: list[Example]) -> None:
    """The session's loss and gradients against the reference's, tensor by tensor."""
    result = me.forward_backward(batch)
    loss, gradients = whole.gradients(batch)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    found = {name: parameter.grad for name, parameter in me.adapter.named_parameters()}
    me.optimizer.zero_grad()
    assert found.keys() == gradients.keys()
    assert all(float(gradient.norm()) > 1e-6 for gradient in gradients.values())  # else nothing would be compared
    wrong = {name: difference(found[name], gradients[name]) for name in gradients}
    print("MAX", max(wrong.values()), "loss", result.loss, result.loss/loss-1, "minnorm", min(float(g.norm()) for g in gradients.values()))
    assert max(wrong.values()) < 1e-4, {name: value for name, value in wrong.items() if value >= 1e-4}


def train_both(me: DeviceSession, whole: Reference, batches: list[list[Example]]) -> None:
    """Twenty steps on both sides, each by its own gradients: clipped, AdamW without decay."""
    optimizer = torch.optim.AdamW(list(whole.values.values()), lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(STEPS):
        batch = batches[step % len(batches)]
        me.forward_backward(batch)
        me.optim_step(LEARNING_RATE, clip_norm=1.0)
        whole.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(list(whole.values.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()

"""What the exactness tests share: placements and adapters by name, random adapters, and what counts as equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from tests.support.reference import Reference, difference
from torch import Tensor

from privatelora.device import DeviceSession
from privatelora.device.data import IGNORE, Example

TOLERANCE = 1e-4  # norm(a - b) / norm(b) of every tensor, float32

PAPER = "paper"
SUBSET = "inline=1+4"  # the lowest inline layer answers no dL/du: nothing below it is trained
SUBSET_FIRST = "first=1,inline=2+4"  # here it does answer
MIXED = "first=1,last=1,inline=2+3"
MIXED_FROZEN = "first=1,last=1,inline=2+4,train_first=no"
ONE_TRIP = "one-trip"  # first 2, last 2, nothing inline
ONE_TRIP_FROZEN = "first=2,last=2,train_first=no"
LAST = "last=3"
PLACEMENTS = (PAPER, SUBSET, SUBSET_FIRST, MIXED, MIXED_FROZEN, ONE_TRIP, ONE_TRIP_FROZEN, LAST)

Adapter = Mapping[str, object]
E1: Adapter = {"rank": (32, 16)}
E3: Adapter = {"adapter": "random", "rank": (24, 16)}
E1_MLP: Adapter = {"rank": (32, 16), "m_kind": "mlp", "m_hidden": 40}
E3_MLP: Adapter = {"adapter": "random", "rank": (24, 16), "m_kind": "mlp", "m_hidden": 40}
FULL: Adapter = {"rank": (64, 32)}  # every row of a tiny model's set
NARROW: Adapter = {"rank": (5, 3)}  # prefixes of it

PROMPTS = (  # 3, 21 and 65 tokens of the tiny models: under, at and past a window; the last past the original context
    "Hi!",
    "The door code is 4071",
    "My cat is called Miso the Brave, and she sleeps in the oven, yes.",
)


def make_random(me: DeviceSession, spread: float = 0.1) -> None:
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


def assert_equal_gradients(me: DeviceSession, whole: Reference, batch: Sequence[Example]) -> None:
    """The session's loss and gradients against the reference's, tensor by tensor."""
    result = me.forward_backward(batch)
    found = {name: parameter.grad for name, parameter in me.adapter.named_parameters()}
    me.optimizer.zero_grad()
    loss, gradients = whole.gradients(batch)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert min(float(gradient.norm()) for gradient in gradients.values()) > 1e-4  # none is there to be missed
    assert_close(found, gradients)


def assert_close(ours: Mapping[str, Tensor | None], theirs: Mapping[str, Tensor]) -> None:
    """Every tensor of one side is the other's, within `TOLERANCE`."""
    assert ours.keys() == theirs.keys()
    wrong = {}
    for name, tensor in theirs.items():
        mine = ours[name]
        assert mine is not None
        wrong[name] = difference(mine, tensor)
    assert max(wrong.values()) < TOLERANCE, {name: value for name, value in wrong.items() if value >= TOLERANCE}


def assert_equal_generation(me: DeviceSession, whole: Reference, prompts: Sequence[str], new_tokens: int) -> None:
    """Every prompt's greedy tokens, their text, and the logits of the prefill and behind each token."""
    prompted = [me.encode(prompt) for prompt in prompts]
    wanted = [whole.generate(tokens, new_tokens) for tokens in prompted]
    histories, logits = decode_together(me, prompted, [len(new) for new in wanted])
    for prompt, tokens, new, history, steps in zip(prompts, prompted, wanted, histories, logits, strict=True):
        assert history == tokens + new
        with torch.no_grad():
            expected = whole.logits(history)[len(tokens) - 1 :]  # (new + 1, vocab), from the whole sequence anew
        assert max(difference(*pair) for pair in zip(steps, expected, strict=True)) < TOLERANCE
        assert me.generate(prompt, max_new_tokens=new_tokens) == me.tokenizer.decode(new, skip_special_tokens=True)


def decode_together(
    me: DeviceSession, prompts: Sequence[Sequence[int]], counts: Sequence[int]
) -> tuple[list[list[int]], list[list[Tensor]]]:
    """Greedy decoding of several sequences in turns, each with a cache of its own: histories and logits (vocab,)."""
    histories = [list(tokens) for tokens in prompts]
    decodings = [me.split.decode(history) for history in histories]
    logits: list[list[Tensor]] = [[] for _ in prompts]
    for turn in range(max(counts) + 1):
        for history, decoding, made, count in zip(histories, decodings, logits, counts, strict=True):
            if turn > count:
                continue
            made.append(decoding.next_logits())
            if turn < count:
                history.append(int(made[-1].argmax()))
    me.remote.release([decoding.sequence for decoding in decodings])
    return histories, logits

"""Who else shares a batch changes nothing: sessions of every kind at once, each against itself alone.

Sixteen devices of one service train, score and decode at random moments. That their passes really were computed
together is read from the service's own metrics; without it these tests would prove nothing.
"""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.split.common import (
    E1,
    E1_MLP,
    E3,
    E3_MLP,
    LAST,
    MIXED,
    MIXED_FROZEN,
    NARROW,
    ONE_TRIP,
    ONE_TRIP_FROZEN,
    PAPER,
    SUBSET,
    SUBSET_FIRST,
    make_random,
    random_examples,
)
from tests.support.fleet import SMOLLM2, Fleet
from tests.support.metrics import Numbers, numbers
from tests.support.reference import difference
from tests.support.service import ServiceProcess, service

from privatelora.device import DeviceSession
from privatelora.device.batch import Batch

HIDDEN, GRADIENTS = 1e-5, 1e-4  # norm(together - alone) / norm(alone), float32
WIRE_STEP = {"float32": 0.0, "float16": 2**-10, "bfloat16": 2**-7, "int8": 1 / 64}
"""Twice the relative step of a wire type: a change far below it can still tip a number to its neighbour."""

SESSIONS: tuple[dict[str, Any], ...] = (
    {"placement": PAPER, **E1},
    {"placement": PAPER, **E3},
    {"placement": PAPER, **NARROW},
    {"placement": PAPER, **E1},
    {"placement": SUBSET, **E1_MLP},
    {"placement": SUBSET, **E3_MLP},
    {"placement": SUBSET_FIRST, **E1},
    {"placement": MIXED, **E3},
    {"placement": MIXED_FROZEN, **E1},
    {"placement": ONE_TRIP},
    {"placement": ONE_TRIP},
    {"placement": ONE_TRIP_FROZEN},
    {"placement": LAST},
    {"placement": PAPER, "wire_dtype": "bfloat16", **E1},
    {"placement": MIXED, "wire_dtype": "float16", **E1_MLP},
    {"placement": SUBSET_FIRST, "wire_dtype": "int8", **E3},
)
NEW_TOKENS = 12


@dataclass(frozen=True)
class Outcome:
    """All numbers that a device sees: logits of every decoded token, the score, and loss and gradients."""

    logits: torch.Tensor
    score: float
    loss: float
    gradients: Mapping[str, torch.Tensor]


def work(me: DeviceSession, number: int, pause: Callable[[], None]) -> Outcome:
    """Decode a fixed text, train on and score batches of several lengths, in an order that depends on the device."""
    own = random.Random(number)
    vocabulary = me.config.vocab_size
    text = [own.randrange(4, vocabulary) for _ in range(own.randrange(5, 40) + NEW_TOKENS)]
    lengths = tuple(own.randrange(8, 60) for _ in range(own.randrange(1, 4)))
    batch = Batch.of(random_examples(lengths, vocabulary, seed=number))
    found: dict[str, Any] = {}

    def decode() -> None:
        history = text[:-NEW_TOKENS]
        decoding = me.split.decode(history)
        logits = []
        for token in text[-NEW_TOKENS:]:
            logits.append(decoding.next_logits())
            history.append(token)
        found["logits"] = torch.stack(logits)
        me.remote.release([decoding.sequence])

    def score() -> None:
        me.split._hidden.clear()  # where no gradient leaves, the device would not ask again
        found["score"] = me.split.score(batch)

    def train() -> None:
        me.split._hidden.clear()
        found["loss"], found["gradients"] = me.split.forward_backward(batch)

    tasks = [decode, score, train]
    own.shuffle(tasks)
    for task in tasks:
        pause()
        task()
    return Outcome(**found)


def side_by_side(sessions: Sequence[DeviceSession], rounds: int, seed: int) -> list[list[Outcome]]:
    """What each device found in each round, all of them at once and each at moments of its own."""
    outcomes: list[list[Outcome]] = [[] for _ in sessions]

    def live(number: int) -> None:
        chance = random.Random(1000 * seed + number)
        for _ in range(rounds):
            outcome = work(sessions[number], number, lambda: time.sleep(chance.random() / 50))
            outcomes[number].append(outcome)

    threads = [threading.Thread(target=live, args=(number,)) for number in range(len(sessions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(found) == rounds for found in outcomes)  # no thread raised
    return outcomes


def differences(together: Outcome, alone: Outcome) -> tuple[float, float]:
    """The largest relative difference of hidden states, as logits and losses show them, and of gradients."""
    assert together.gradients.keys() == alone.gradients.keys()
    hidden = [difference(*pair) for pair in zip(together.logits, alone.logits, strict=True)]
    hidden += [abs(together.score / alone.score - 1), abs(together.loss / alone.loss - 1)]
    return max(hidden), max(difference(together.gradients[name], alone.gradients[name]) for name in alone.gradients)


def compared(
    fleet: Fleet, running: ServiceProcess, settings: Sequence[Mapping[str, Any]], rounds: int
) -> tuple[list[tuple[float, float]], Numbers]:
    """By session, the largest differences between together and alone; and what the service counted together."""
    with ExitStack() as opened:
        sessions = [opened.enter_context(fleet.connect(running, **each)) for each in settings]
        for me in sessions:
            make_random(me)
        alone = [work(me, number, lambda: None) for number, me in enumerate(sessions)]
        before = numbers(running)
        together = side_by_side(sessions, rounds, seed=1)
        counted = numbers(running).since(before)
    worst = []
    for one, found in zip(alone, together, strict=True):
        pairs = [differences(each, one) for each in found]
        worst.append((max(pair[0] for pair in pairs), max(pair[1] for pair in pairs)))
    return worst, counted


@pytest.mark.parametrize("threads", [1, 2])  # with 2, two batches at one time (`cloud/test_engine.py`)
def test_sixteen_sessions_of_every_kind_compute_what_each_computes_alone(
    fleet: Fleet, tmp_path: Path, threads: int
) -> None:
    fleet.service("llama")  # has published the model and its sets
    data_dir = tmp_path / "data"
    shutil.copytree(fleet.data_dir("llama"), data_dir)
    with service(fleet.source("llama"), data_dir, "--torch-threads", str(threads)) as running:
        worst, counted = compared(fleet, running, SESSIONS, rounds=2)
    for phase in ("decode", "score", "train", "backward"):
        assert counted.mean("batch_passes", phase) > 1.05, phase
    for settings, (hidden, gradients) in zip(SESSIONS, worst, strict=True):
        step = WIRE_STEP[settings.get("wire_dtype", "float32")]
        assert hidden < HIDDEN + step, settings
        assert gradients < GRADIENTS + step, settings


def test_sessions_of_a_real_model_compute_what_each_computes_alone(fleet: Fleet) -> None:
    settings = [{"placement": placement, "rank": 16} for placement in ("paper", "few-trips", "one-trip")]
    worst, counted = compared(fleet, fleet.service(SMOLLM2), settings, rounds=1)
    assert counted.mean("batch_passes", "decode") > 1
    assert max(hidden for hidden, _ in worst) < HIDDEN
    assert max(gradients for _, gradients in worst) < GRADIENTS

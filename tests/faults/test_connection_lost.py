"""A connection that breaks at any message costs a replay and nothing else: the same M, bit for bit, and the same text.

The device's connection runs through a proxy that breaks it at an exact message, in training and in generation, at every
kind of placement. The undisturbed run beside it is the reference.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.fleet import Fleet
from tests.support.proxy import Proxy, When, nth

from privatelora.device import DeviceSession, FinetuneReport
from privatelora.device.split import LossFn
from privatelora.protocol.errors import ConnectionLostError
from privatelora.protocol.frames import Kind, Phase

ROWS = [{"prompt": f"The door code of house {house} is", "completion": f" {4071 * house}."} for house in range(1, 7)]
PAPER, MIXED, ONE_TRIP, LAST = "paper", "first=1,last=1,inline=2+3", "one-trip", "last=2"
PROMPT = "The door code of"


@dataclass(frozen=True)
class Run:
    """What a fine-tune left behind."""

    parameters: dict[str, torch.Tensor]
    losses: list[float]
    text: str


@pytest.fixture
def proxy(fleet: Fleet) -> Iterator[Proxy]:
    with Proxy(fleet.service("llama").port) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(fleet: Fleet) -> Callable[[str], Run]:
    """The reference run of a placement, made once."""
    made: dict[str, Run] = {}

    def run(placement: str) -> Run:
        if placement not in made:
            with fleet.session("llama", placement=placement, rank=8) as me:
                made[placement] = trained(me)
        return made[placement]

    return run


def through(proxy: Proxy, fleet: Fleet, placement: str, **settings: Any) -> DeviceSession:
    """A device with an empty store that reaches the service through the proxy."""
    places = {"store_dir": tempfile.mkdtemp(dir=fleet.folder), "cache_dir": fleet.folder / "cache"}
    token = fleet.service("llama").token
    return DeviceSession(proxy.url, token=token, placement=placement, rank=8, **places, **settings)


def trained(me: DeviceSession) -> Run:
    """Six steps over six rows, then some text."""
    report: FinetuneReport = me.finetune(ROWS, epochs=2, batch_size=2, learning_rate=1e-2, seed=3)
    assert report.steps == 6
    parameters = {name: parameter.detach().clone() for name, parameter in me.adapter.named_parameters()}
    assert any(bool(parameter.any()) for parameter in parameters.values())
    return Run(parameters, [record.loss for record in report.history], me.generate(PROMPT, max_new_tokens=12))


def assert_same(run: Run, expected: Run) -> None:
    assert run.losses == expected.losses
    assert run.parameters.keys() == expected.parameters.keys()
    for name, parameter in run.parameters.items():
        assert torch.equal(parameter, expected.parameters[name]), name
    assert run.text == expected.text


TRAIN, BACKWARD, GENERATE = Phase.TRAIN, Phase.BACKWARD, Phase.GENERATE
IN_TRAINING: list[tuple[str, str, Callable[[], When], bool]] = [
    # placement, where, the message, whether it still arrives
    (PAPER, "OPEN is lost", lambda: nth(1, Kind.OPEN), False),
    (PAPER, "OPENED is lost", lambda: nth(1, Kind.OPENED), False),
    (PAPER, "before the first frame", lambda: nth(1, Kind.HIDDEN, TRAIN, up=True), False),
    (PAPER, "after the first frame", lambda: nth(1, Kind.HIDDEN, TRAIN, up=True), True),
    (PAPER, "u is lost in mid-forward", lambda: nth(2, Kind.ENCODED, TRAIN, layer=3), False),
    (PAPER, "v is lost in mid-forward", lambda: nth(2, Kind.DELTA, TRAIN, layer=3), False),
    (PAPER, "the forward's result is lost", lambda: nth(3, Kind.HIDDEN, TRAIN, up=False), False),
    (PAPER, "between forward and backward", lambda: nth(3, Kind.HIDDEN, TRAIN, up=False), True),
    (PAPER, "the loss's gradient is lost", lambda: nth(4, Kind.GRAD_HIDDEN), False),
    (PAPER, "dL/dv is lost in mid-backward", lambda: nth(4, Kind.GRAD_DELTA, layer=2), False),
    (PAPER, "dL/du is lost in mid-backward", lambda: nth(4, Kind.GRAD_ENCODED, layer=2), False),
    (PAPER, "the backward's last frame is lost", lambda: nth(5, Kind.GRAD_DELTA, layer=0), False),
    (PAPER, "between two steps", lambda: nth(5, Kind.GRAD_DELTA, layer=0), True),
    (MIXED, "v is lost in mid-forward", lambda: nth(2, Kind.DELTA, TRAIN, layer=2), False),
    (MIXED, "dL/du is lost in mid-backward", lambda: nth(3, Kind.GRAD_ENCODED, layer=2), False),
    (MIXED, "dL/dh_first is lost", lambda: nth(3, Kind.GRAD_HIDDEN, BACKWARD, up=False), False),
    (ONE_TRIP, "the forward's result is lost", lambda: nth(2, Kind.HIDDEN, TRAIN, up=False), False),
    (ONE_TRIP, "dL/dh_first is lost", lambda: nth(5, Kind.GRAD_HIDDEN, up=False), False),
    (LAST, "the only exchange of a step is lost", lambda: nth(2, Kind.HIDDEN, Phase.SCORE, up=False), False),
]


@pytest.mark.parametrize(
    ("placement", "when", "deliver"),
    [
        pytest.param(placement, when, deliver, id=f"{placement}: {what}")
        for placement, what, when, deliver in IN_TRAINING
    ],
)
def test_training_replays_the_step(
    fleet: Fleet,
    proxy: Proxy,
    undisturbed: Callable[[str], Run],
    placement: str,
    when: Callable[[], When],
    deliver: bool,
) -> None:
    proxy.cut(when(), deliver=deliver)
    with through(proxy, fleet, placement) as me:
        run = trained(me)
    assert not proxy.faults_left
    assert_same(run, undisturbed(placement))


@pytest.mark.parametrize("placement", [PAPER, MIXED, ONE_TRIP])
def test_training_survives_a_connection_that_breaks_in_every_step(
    fleet: Fleet, proxy: Proxy, undisturbed: Callable[[str], Run], placement: str
) -> None:
    for step in range(6):
        proxy.cut(nth(step + 1, Kind.GRAD_HIDDEN, up=True))
    with through(proxy, fleet, placement) as me:
        run = trained(me)
    assert not proxy.faults_left
    assert len(proxy.arrivals) == 7
    assert_same(run, undisturbed(placement))


SIDE_BY_SIDE: list[tuple[str, str, Callable[[], When], bool]] = [
    # three micro-batches a step, so the fourth to sixth message of a kind are the second step's
    (PAPER, "one has begun, two have not", lambda: nth(4, Kind.HIDDEN, TRAIN, up=True), True),
    (PAPER, "one u of three is lost", lambda: nth(5, Kind.ENCODED, TRAIN, layer=3), False),
    (PAPER, "one v of three is lost", lambda: nth(5, Kind.DELTA, TRAIN, layer=3), False),
    (PAPER, "one goes back, two still come forth", lambda: nth(4, Kind.GRAD_HIDDEN, up=True), False),
    (PAPER, "one dL/dv of three is lost", lambda: nth(5, Kind.GRAD_DELTA, layer=2), False),
    (PAPER, "two are done, the last is not", lambda: nth(6, Kind.GRAD_DELTA, layer=0), False),
    (MIXED, "one dL/du of three is lost", lambda: nth(5, Kind.GRAD_ENCODED, layer=2), False),
    (MIXED, "one dL/dh_first of three is lost", lambda: nth(5, Kind.GRAD_HIDDEN, BACKWARD, up=False), False),
    (ONE_TRIP, "one result of three is lost", lambda: nth(5, Kind.HIDDEN, TRAIN, up=False), False),
    (LAST, "the only exchange of one of three is lost", lambda: nth(2, Kind.HIDDEN, Phase.SCORE, up=False), False),
]


@pytest.mark.parametrize("loss_fn", [None, F.cross_entropy], ids=["default loss", "own loss"])
@pytest.mark.parametrize(
    ("placement", "when", "deliver"),
    [
        pytest.param(placement, when, deliver, id=f"{placement}: {what}")
        for placement, what, when, deliver in SIDE_BY_SIDE
    ],
)
def test_micro_batches_that_are_at_different_places_are_all_replayed(
    fleet: Fleet, proxy: Proxy, placement: str, when: Callable[[], When], deliver: bool, loss_fn: LossFn | None
) -> None:
    recipe: dict[str, Any] = {"epochs": 3, "batch_size": 6, "learning_rate": 1e-2, "loss_fn": loss_fn}
    proxy.cut(when(), deliver=deliver)
    with (
        fleet.session("llama", placement=placement, rank=8, micro_batches=3) as calm,
        through(proxy, fleet, placement, micro_batches=3) as me,
    ):
        wanted, found = calm.finetune(ROWS, **recipe), me.finetune(ROWS, **recipe)
        assert not proxy.faults_left
        assert [record.loss for record in found.history] == [record.loss for record in wanted.history]
        assert all(map(torch.equal, me.adapter.parameters(), calm.adapter.parameters()))


IN_GENERATION: list[tuple[str, str, Callable[[], When], bool]] = [
    (PAPER, "before the first frame", lambda: nth(1, Kind.HIDDEN, GENERATE, up=True), False),
    (PAPER, "u is lost in the prefill", lambda: nth(1, Kind.ENCODED, GENERATE, layer=3), False),
    (PAPER, "v is lost in the prefill", lambda: nth(1, Kind.DELTA, GENERATE, layer=5), False),
    (PAPER, "the prefill's result is lost", lambda: nth(1, Kind.HIDDEN, GENERATE, up=False), False),
    (PAPER, "between two tokens", lambda: nth(5, Kind.HIDDEN, GENERATE, up=False), True),
    (PAPER, "u is lost in mid-token", lambda: nth(6, Kind.ENCODED, GENERATE, layer=2), False),
    (PAPER, "v is lost in mid-token", lambda: nth(6, Kind.DELTA, GENERATE, layer=2), False),
    (PAPER, "a token's result is lost", lambda: nth(7, Kind.HIDDEN, GENERATE, up=False), False),
    (MIXED, "v is lost in mid-token", lambda: nth(6, Kind.DELTA, GENERATE, layer=2), False),
    (ONE_TRIP, "a token's result is lost", lambda: nth(7, Kind.HIDDEN, GENERATE, up=False), False),
]


@pytest.mark.parametrize(
    ("placement", "when", "deliver"),
    [
        pytest.param(placement, when, deliver, id=f"{placement}: {what}")
        for placement, what, when, deliver in IN_GENERATION
    ],
)
def test_generation_replays_the_history(
    fleet: Fleet, proxy: Proxy, placement: str, when: Callable[[], When], deliver: bool
) -> None:
    with fleet.session("llama", placement=placement, rank=8) as calm:
        make_random(calm)
        expected = calm.generate(PROMPT, max_new_tokens=16)
        sampled = calm.generate(PROMPT, max_new_tokens=16, temperature=1.0, seed=5)
    with through(proxy, fleet, placement) as me:
        make_random(me)
        proxy.cut(when(), deliver=deliver)
        assert me.generate(PROMPT, max_new_tokens=16) == expected
        assert not proxy.faults_left
        proxy.cut(when(), deliver=deliver)
        assert me.generate(PROMPT, max_new_tokens=16, temperature=1.0, seed=5) == sampled
        assert not proxy.faults_left


def test_every_stream_of_a_session_survives_a_lost_connection(fleet: Fleet, proxy: Proxy) -> None:
    prompts = ("one two", "seven eight", "ten")
    with through(proxy, fleet, PAPER) as me:
        expected = [me.generate(prompt, max_new_tokens=12) for prompt in prompts]
        streams = [me.stream(prompt, max_new_tokens=12) for prompt in prompts]
        texts = [next(stream) for stream in streams]
        proxy.cut_now()
        texts = [text + next(stream) for text, stream in zip(texts, streams, strict=True)]
        assert [text + "".join(stream) for text, stream in zip(texts, streams, strict=True)] == expected


def test_a_stream_survives_another_verb_that_failed(fleet: Fleet) -> None:
    def broken(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    with fleet.session("llama", placement=PAPER, rank=8) as me:
        expected = me.generate("one two", max_new_tokens=12)
        stream = me.stream("one two", max_new_tokens=12)
        text = next(stream)
        with pytest.raises(ZeroDivisionError):
            me.forward_backward(me.examples(ROWS).examples[:2], broken)
        assert text + "".join(stream) == expected


def test_a_connection_that_falls_silent_is_given_up_after_the_timeout(fleet: Fleet, proxy: Proxy) -> None:
    with through(proxy, fleet, PAPER, timeout_s=1.0) as me:
        expected = me.generate(PROMPT, max_new_tokens=12)
        proxy.cut(nth(6, Kind.ENCODED, GENERATE, layer=2), silent=True)
        begun = time.monotonic()
        assert me.generate(PROMPT, max_new_tokens=12) == expected
        assert not proxy.faults_left
        assert 1.0 <= time.monotonic() - begun < 5.0


def test_a_device_waits_longer_and_longer_and_then_says_what_to_do(fleet: Fleet, proxy: Proxy) -> None:
    with through(proxy, fleet, PAPER, retry_s=2.5) as me:
        expected = me.generate(PROMPT, max_new_tokens=12)
        service_port, proxy.target_port = proxy.target_port, 1  # nobody listens there
        proxy.cut_now()
        proxy.arrivals.clear()
        with pytest.raises(ConnectionLostError, match=r"within 2\.5 s.*see that it is running"):
            me.generate(PROMPT, max_new_tokens=12)
        waits = [later - sooner for sooner, later in pairwise(proxy.arrivals)]
        assert len(waits) >= 3
        assert all(later > 1.5 * sooner for sooner, later in pairwise(waits[:-1]))
        proxy.target_port = service_port
        assert me.generate(PROMPT, max_new_tokens=12) == expected  # and goes on once the service is back


def make_random(me: DeviceSession) -> None:
    """An adapter that makes a difference, the same in every session of a placement."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in me.adapter.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))

"""A batch that is cut into micro-batches trains as it does whole, whatever order their answers come in."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.split.common import E1, E3_MLP, MIXED, PLACEMENTS, make_random, random_examples
from tests.support.fleet import Fleet
from tests.support.proxy import Proxy, nth
from tests.support.reference import difference
from torch import Tensor

from privatelora.device import DeviceSession
from privatelora.device.batch import Batch
from privatelora.device.connection import Connection
from privatelora.device.data import Example
from privatelora.device.gradients import GradientSum
from privatelora.device.split import LossFn
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.errors import ConfigurationError, ProtocolError
from privatelora.protocol.frames import Frame, Kind, Phase

LENGTHS = (31, 40, 2, 57, 57, 18, 90, 9)
TOLERANCE = 1e-5  # norm(a - b) / norm(b) of every tensor, float32


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=0.2)


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    """No mean over tokens: a micro-batch's share of it cannot be told from its own tokens.

    Its weights are exp(nats / 10): with exp(nats) a rounding of 1e-6 in h is one of 2e-5 in them.
    """
    nats = F.cross_entropy(logits, labels, reduction="none")
    return torch.logsumexp(nats / 10, 0)


def trained(
    me: DeviceSession, batch: Sequence[Example], micro_batches: int, loss_fn: LossFn | None = None
) -> tuple[float, dict[str, Tensor], tuple[int, int]]:
    """Loss, gradients, and the tensor bytes that crossed, which are those that were expected."""
    count, expected = me.remote.count, me.remote.expected
    before = count.payload_up, count.payload_down
    me.split.micro_batches = micro_batches
    loss, gradients = me.split.forward_backward(Batch.of(batch), loss_fn)
    crossed = count.payload_up - before[0], count.payload_down - before[1]
    assert crossed == (me.remote.expected.up - expected.up, me.remote.expected.down - expected.down)
    return loss, gradients, crossed


@pytest.mark.parametrize("loss_fn", [None, smoothed, focal])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_micro_batches_add_up_to_the_batch(fleet: Fleet, placement: str, loss_fn: LossFn | None) -> None:
    with fleet.session("llama", placement=placement, **(E3_MLP if placement == MIXED else E1)) as me:
        make_random(me)
        batch = random_examples(LENGTHS, me.config.vocab_size)
        loss, gradients, crossed = trained(me, batch, 1, loss_fn)
        for micro_batches in (2, 3, 16):
            me.split._hidden.clear()  # where no gradient leaves: of the pass before
            its_loss, its_gradients, its_crossed = trained(me, batch, micro_batches, loss_fn)
            assert its_loss == pytest.approx(loss, rel=TOLERANCE)
            assert its_gradients.keys() == gradients.keys()
            assert max(difference(its_gradients[name], gradients[name]) for name in gradients) < TOLERANCE
            assert its_crossed == crossed


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_micro_batches_score_as_the_batch(fleet: Fleet, placement: str) -> None:
    with fleet.session("llama", placement=placement, **E1) as me:
        make_random(me)
        batch = Batch.of(random_examples(LENGTHS, me.config.vocab_size))
        me.split.micro_batches = 1
        whole = me.split.score(batch)
        me.split.micro_batches = 4
        assert me.split.score(batch) == pytest.approx(whole, rel=TOLERANCE)


# -- side by side -----------------------------------------------------------------------------------------------------


@pytest.fixture
def scrambled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Answers of different streams come in random order; the streams, as they came.

    Which of them the service computes together depends on that order, and rounding on the company: what it says must be
    close to what it said to the first run, and the device is given that, so that what the device does can be equal.
    """
    send, receive = Connection.send, Connection.receive
    held: list[Frame] = []
    answers: dict[tuple[int, ...], Frame] = {}
    came: list[int] = []
    due = 0
    order = random.Random(0)

    def sending(self: Connection, frame: Frame) -> None:
        nonlocal due
        due += frame.kind >= Kind.HIDDEN
        send(self, frame)

    def receiving(self: Connection) -> Frame:
        while len(held) < due:
            held.append(receive(self))
        if not due:  # OPENED
            return receive(self)
        came.append((frame := held.pop(order.randrange(len(held)))).stream)
        due_less_one()
        first = answers.setdefault((frame.stream, frame.kind, frame.layer, frame.phase), frame)
        assert difference(torch.from_numpy(frame.array()), torch.from_numpy(first.array())) < TOLERANCE
        frame.payload = first.payload
        return frame

    def due_less_one() -> None:
        nonlocal due
        due -= 1

    monkeypatch.setattr(Connection, "send", sending)
    monkeypatch.setattr(Connection, "receive", receiving)
    yield came
    assert not held


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_order_of_answers_changes_nothing(fleet: Fleet, scrambled: list[int], placement: str) -> None:
    with fleet.session("llama", placement=placement, **E1) as me:
        make_random(me)
        batch = random_examples(LENGTHS, me.config.vocab_size)
        orders = []
        runs = []
        for _ in range(4):
            scrambled.clear()
            me.split._hidden.clear()
            runs.append(trained(me, batch, 4))
            orders.append(tuple(scrambled))
        assert len(set(orders)) > 1
        for loss, gradients, _ in runs:
            assert loss == runs[0][0]
            assert all(torch.equal(gradients[name], runs[0][1][name]) for name in runs[0][1])


def test_every_micro_batch_is_on_its_way_before_the_first_answer(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[tuple[str, Kind, int, int]] = []
    send, receive = Connection.send, Connection.receive

    def sending(self: Connection, frame: Frame) -> None:
        frames.append(("up", frame.kind, frame.stream, frame.layer))
        send(self, frame)

    def receiving(self: Connection) -> Frame:
        frame = receive(self)
        frames.append(("down", frame.kind, frame.stream, frame.layer))
        return frame

    with fleet.session("llama", placement="paper", rank=8) as me:
        me.remote.connect()
        monkeypatch.setattr(Connection, "send", sending)
        monkeypatch.setattr(Connection, "receive", receiving)
        trained(me, random_examples((40, 40, 40), me.config.vocab_size), 3)
    assert [(way, kind, stream) for way, kind, stream, _ in frames[:3]] == [("up", Kind.HIDDEN, s) for s in range(3)]
    for stream in range(3):  # and none waits for another to be done
        begins, ends = (
            [i for i, frame in enumerate(frames) if frame[1:3] == (kind, stream)][which]
            for kind, which in ((Kind.HIDDEN, 0), (Kind.GRAD_DELTA, -1))
        )
        others = [frame[2] for frame in frames[begins:ends]]
        assert set(others) == {0, 1, 2}


@pytest.mark.parametrize("stream", [0, 2, 7])
def test_an_answer_that_no_stream_waits_for_is_refused(fleet: Fleet, stream: int) -> None:
    running = fleet.service("llama")
    stray = Frame(Kind.ENCODED, phase=Phase.TRAIN, step=1, stream=stream, layer=3)
    stray.with_array(np.zeros((1, 1, 1), np.float32), WireDtype.FLOAT32)
    settings = {"placement": "paper", "rank": 8, "micro_batches": 2}
    with Proxy(running.port) as proxy, fleet.connect(running, server=proxy.url, **settings) as me:
        batch = random_examples((40, 40), me.config.vocab_size)
        proxy.before(nth(2, Kind.ENCODED, layer=1), [stray])
        with pytest.raises(ProtocolError, match=rf"sent \({stream}, .*ENCODED"):
            me.forward_backward(batch)
        assert me.forward_backward(batch).loss > 0  # in a new session


def test_small_steps_stay_whole_and_large_ones_are_cut(fleet: Fleet) -> None:
    with fleet.session("llama", placement="one-trip", rank=8) as me:
        vocabulary = me.config.vocab_size
        for lengths, parts in (((128,) * 4, 1), ((128,) * 8, 2), ((128,) * 16, 4), ((2000,), 1), ((500,) * 16, 16)):
            batch = Batch.of(random_examples(lengths, vocabulary))
            assert len(me.split._streams(batch)) == parts
        me.split.micro_batches = 40
        assert len(me.split._streams(batch)) == me.service.info.limits.max_streams == 16


def test_no_micro_batches_at_all_are_refused(fleet: Fleet) -> None:
    with pytest.raises(ConfigurationError, match="micro_batches 0 must be 1 or more"):
        fleet.session("llama", micro_batches=0)


# -- the parts --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(3, 40), min_size=1, max_size=20), st.integers(0, 24))
def test_a_cut_keeps_sequences_whole(lengths: list[int], count: int) -> None:
    batch = Batch.of(random_examples(tuple(lengths), 200))
    parts = batch.cut(count)
    assert 1 <= len(parts) <= max(1, count)
    assert [length for part in parts for length in part.lengths] == lengths
    assert [key for part in parts for key in part.keys] == list(batch.keys)
    assert torch.equal(torch.cat([part.tokens for part in parts]), batch.tokens)
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
    assert torch.equal(torch.cat([part.tokens[part.rows] for part in parts]), batch.tokens[batch.rows])
    assert all(sum(part.lengths) == len(part.tokens) and len(part.rows) for part in parts)
    if len(parts) == count:
        assert max(len(part.tokens) for part in parts) < len(batch.tokens) / count + max(lengths)


def test_gradients_are_summed_in_the_order_of_streams() -> None:
    found = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    wanted = found[0] + found[1] + found[2] + found[3]
    for order in permutations(range(4)):
        gradients = GradientSum()
        for stream in order:
            gradients.add(stream, {"a": found[stream], "b": -found[stream]})
        assert torch.equal(gradients.sums["a"], wanted)
        assert torch.equal(gradients.sums["b"], -wanted)

"""Whatever one session sends, it gets a coded error that ends that session only; another beside it notices nothing.

Every case opens a session of its own on a live service, misbehaves at some point of a pass, and reads the refusal.
After each, alice's session (the `bystander` of conftest.py) must give the same numbers as before, bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.faults.conftest import TOKENS, Bystander, Target
from tests.support.wire import (
    HIDDEN_SIZE,
    RANK,
    Wire,
    begin,
    delta,
    json_frame,
    open_frame,
    reply,
    tensor,
)
from websockets.exceptions import ConnectionClosed

from privatelora.protocol.adapter import AdapterSpec
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.frames import VERSION, Frame, Kind, Phase, Selection
from privatelora.protocol.messages import ErrorInfo, parse
from privatelora.protocol.placement import Placement

LAYERS = 6
CONTEXT = 512
UINT32 = 2**32 - 1
SCORE, TRAIN, GENERATE, BACKWARD = Phase.SCORE, Phase.TRAIN, Phase.GENERATE, Phase.BACKWARD


@pytest.fixture
def wire(target: Target) -> Iterator[Wire]:
    """Mallory's connection, not opened yet."""
    with Wire(target.url, TOKENS["mallory"]) as opened:
        yield opened


@pytest.fixture(autouse=True)
def nobody_else_notices(bystander: Bystander) -> Iterator[None]:
    yield
    bystander.assert_untouched()


# -- an honest session, from which the others depart ------------------------------------------------------------------


def forward(wire: Wire, phase: Phase = SCORE, step: int = 1, spans: Any = ((0, 0, 3),), stream: int = 0) -> Frame:
    """A whole forward pass; the frame with h_{L-last}."""
    came = wire.answer(begin(spans, phase, step, stream))
    while came.kind is Kind.ENCODED:
        came = wire.answer(delta(came))
    assert came.kind is Kind.HIDDEN
    return came


def backward(wire: Wire, came: Frame) -> Frame:
    """The way back of a TRAIN pass; its last frame."""
    came = wire.answer(reply(came, Kind.GRAD_HIDDEN, *came.shape, phase=BACKWARD))
    while came.layer != 0:
        came = wire.answer(reply(came, Kind.GRAD_ENCODED, came.shape[0], 1, RANK))
    return came


def test_an_honest_session_is_served(wire: Wire, target: Target) -> None:
    wire.open(target.info)
    assert forward(wire).shape == (3, HIDDEN_SIZE)
    assert backward(wire, forward(wire, TRAIN, step=2)).kind is Kind.GRAD_DELTA
    forward(wire, GENERATE, step=3, spans=[(5, 0, 4)])
    last = wire.answer(begin([(5, 4, 1)], GENERATE, step=4))
    assert last.kind is Kind.ENCODED


# -- OPEN -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """A code of the tree, and a word of the message that helps."""

    code: str
    word: str


BAD_OPENS: dict[str, tuple[dict[str, Any], Refused]] = {
    "another model": ({"model_hash": "0" * 64}, Refused("incompatible", "connect to the other service")),
    "an unknown set": ({"set_hash": "0" * 64}, Refused("incompatible", "ask the operator to import it")),
    "no set for inline layers": ({"set_hash": None}, Refused("incompatible", "name one of those")),
    "a rank above the set's": ({"spec": {"rank_down": 1000, "rank_up": 8}}, Refused("configuration", "ranks up to 64")),
    "a rank up above the set's": ({"spec": {"rank_down": 8, "rank_up": 33}}, Refused("configuration", "32 up")),
    "rank zero": ({"spec": {"rank_down": 0, "rank_up": 8}}, Refused("configuration", "1 or more")),
    "another kind of set": (
        {"spec": {"kind": "random", "rank_down": 8, "rank_up": 8}},
        Refused("configuration", "is calibrated"),
    ),
    "an unknown kind": ({"spec": {"kind": "svd"}}, Refused("configuration", "calibrated, random")),
    "a placement that is not allowed": (
        {"placement": {"first": 1, "last": 1}},
        Refused("configuration", "use one of paper, one-trip, first=0,last=2"),
    ),
    "a placement beyond the model": ({"placement": {"first": 9}}, Refused("configuration", "less than 6")),
    "inline layers twice": ({"placement": {"inline": [1, 1]}}, Refused("configuration", "without repeats")),
    "an unknown element type": ({"wire_dtype": "float8"}, Refused("configuration", "use float32")),
    "another protocol version": ({"protocol_version": VERSION + 1}, Refused("incompatible", "same release on both")),
    "a field of another type": ({"wire_dtype": 7}, Refused("protocol", "wire_dtype")),
    "a hash that is a path": ({"model_hash": "../" * 21 + "x"}, Refused("protocol", "model_hash")),
}


@pytest.mark.parametrize(("changes", "refused"), BAD_OPENS.values(), ids=list(BAD_OPENS))
def test_open_is_refused_with_what_would_work(
    wire: Wire, target: Target, changes: dict[str, Any], refused: Refused
) -> None:
    wire.send(open_frame(target.info, **changes))
    assert_refused(wire, refused)


def test_a_set_of_another_model_is_refused(wire: Wire, target: Target) -> None:
    spec = {"kind": "random", "rank_down": 8, "rank_up": 8}
    assert target.foreign_set not in [info.sha256 for info in target.info.sets]
    wire.send(open_frame(target.info, set_hash=target.foreign_set, spec=spec))
    assert_refused(wire, Refused("incompatible", "model"))


NOT_OPENS: dict[str, tuple[Callable[[], Frame | bytes | str], Refused]] = {
    "no OPEN": (lambda: begin(), Refused("protocol", "send OPEN first")),
    "CLOSE": (lambda: Frame(Kind.CLOSE), Refused("protocol", "send OPEN first")),
    "no JSON": (lambda: Frame(Kind.OPEN, shape=(4,), payload=b"\xff{}["), Refused("protocol", "not valid")),
    "JSON of something else": (lambda: json_frame([1, 2]), Refused("protocol", "not valid")),
    "nothing": (lambda: Frame(Kind.OPEN, shape=(0,)), Refused("protocol", "not valid")),
    "deep JSON": (lambda: json_text("[" * 60_000), Refused("protocol", "not valid")),
    "64 KiB and a byte": (lambda: json_text(" " * 65_537), Refused("protocol", "limit")),
    "an empty message": (lambda: b"", Refused("protocol", "shorter")),
    "text": (lambda: json.dumps({"kind": "OPEN"}), Refused("protocol", "binary")),
    "HTTP": (lambda: b"GET / HTTP/1.1\r\n\r\n" * 4, Refused("protocol", "is the URL right")),
}


@pytest.mark.parametrize(("message", "refused"), NOT_OPENS.values(), ids=list(NOT_OPENS))
def test_what_is_no_open_is_refused(wire: Wire, message: Callable[[], Frame | bytes | str], refused: Refused) -> None:
    wire.send(message())
    assert_refused(wire, refused)


def json_text(text: str) -> Frame:
    return Frame(Kind.OPEN, shape=(len(text),), payload=text.encode())


# -- frames that are damaged ------------------------------------------------------------------------------------------

DAMAGED: dict[str, tuple[Callable[[bytes], bytes], Refused]] = {
    "cut by a byte": (lambda data: data[:-1], Refused("protocol", "bytes")),
    "cut in its header": (lambda data: data[:20], Refused("protocol", "header")),
    "longer by a byte": (lambda data: data + b"\0", Refused("protocol", "bytes")),
    "of another version": (lambda data: data[:2] + b"\x02" + data[3:], Refused("incompatible", "same release")),
    "without its magic": (lambda data: b"XX" + data[2:], Refused("protocol", "magic")),
    "of an unknown kind": (lambda data: data[:3] + b"\x63" + data[4:], Refused("protocol", "unknown value")),
    "of an unknown phase": (lambda data: data[:4] + b"\x63" + data[5:], Refused("protocol", "unknown value")),
    "of an unknown dtype": (lambda data: data[:5] + b"\x63" + data[6:], Refused("protocol", "unknown value")),
    "of nine dimensions": (lambda data: data[:6] + b"\x09" + data[7:], Refused("protocol", "dimensions")),
    "with 2**32 - 1 spans": (lambda data: data[:40] + b"\xff" * 4 + data[44:], Refused("protocol", "bytes")),
    "with 2**32 - 1 outputs": (lambda data: data[:44] + b"\xff" * 4 + data[48:], Refused("protocol", "bytes")),
    "with 2**32 - 1 rows": (lambda data: data[:24] + b"\xff" * 4 + data[28:], Refused("protocol", "bytes")),
}


@pytest.mark.parametrize(("damage", "refused"), DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_frame_is_refused(
    wire: Wire, target: Target, damage: Callable[[bytes], bytes], refused: Refused
) -> None:
    wire.open(target.info)
    frame = begin()
    frame.session = wire.session
    wire.send(damage(frame.pack()))
    assert_refused(wire, refused)


# -- frames that say something false ----------------------------------------------------------------------------------


def not_a_number(value: float) -> Frame:
    frame, values = begin(), tensor(3, HIDDEN_SIZE)
    values[1, 7] = value
    return frame.with_array(values, WireDtype.FLOAT32)


def listed(*rows: int, selection: Selection = Selection.LISTED) -> Frame:
    return begin(selection=selection, outputs=np.array(rows, np.uint32))


FALSE_BEGINS: dict[str, tuple[Callable[[], Frame], Refused]] = {
    "another element type": (lambda: begin(dtype=WireDtype.FLOAT16), Refused("protocol", "FLOAT32")),
    "int8": (lambda: begin(dtype=WireDtype.INT8), Refused("protocol", "FLOAT32")),
    "NaN": (lambda: not_a_number(math.nan), Refused("protocol", "NaN")),
    "infinity": (lambda: not_a_number(-math.inf), Refused("protocol", "infinity")),
    "too wide": (lambda: begin(shape=(3, HIDDEN_SIZE + 1)), Refused("protocol", "(3, 64)")),
    "too narrow": (lambda: begin(shape=(3, HIDDEN_SIZE - 1)), Refused("protocol", "(3, 64)")),
    "a row more than its spans": (lambda: begin(shape=(4, HIDDEN_SIZE)), Refused("protocol", "(3, 64)")),
    "a row less than its spans": (lambda: begin(shape=(2, HIDDEN_SIZE)), Refused("protocol", "(3, 64)")),
    "a dimension more": (lambda: begin(shape=(3, 1, HIDDEN_SIZE)), Refused("protocol", "(3, 64)")),
    "no span": (lambda: begin([], shape=(1, HIDDEN_SIZE)), Refused("protocol", "one span or more")),
    "a span of no tokens": (
        lambda: begin([(0, 0, 3), (1, 0, 0)], shape=(3, HIDDEN_SIZE)),
        Refused("protocol", "one token or more"),
    ),
    "one sequence twice": (lambda: begin([(7, 0, 2), (7, 0, 2)]), Refused("protocol", "different sequences")),
    "a start in mid-air": (lambda: begin([(0, 5, 3)], GENERATE), Refused("protocol", "0 tokens are held")),
    "a start where nothing is kept": (lambda: begin([(0, 5, 3)], SCORE), Refused("protocol", "0 tokens are held")),
    "a token more than the context": (lambda: begin([(0, 0, CONTEXT + 1)]), Refused("protocol", "context is 512")),
    "2**32 - 1 tokens": (
        lambda: begin([(0, 0, UINT32)], shape=(1, HIDDEN_SIZE)),
        Refused("protocol", "context is 512"),
    ),
    "a start and a length that overflow": (
        lambda: begin([(0, UINT32, UINT32)], shape=(1, HIDDEN_SIZE)),
        Refused("protocol", "tokens are held"),
    ),
    "too many tokens": (lambda: begin([(s, 0, 410) for s in range(5)]), Refused("protocol", "limit of 2048")),
    "too many sequences": (lambda: begin([(s, 0, 1) for s in range(5)], GENERATE), Refused("protocol", "limit of 4")),
    "stream 3 of 3": (lambda: begin(stream=3), Refused("protocol", "3 streams")),
    "stream 65535": (lambda: begin(stream=65535), Refused("protocol", "3 streams")),
    "a layer": (lambda: begin(layer=2), Refused("protocol", "cannot begin")),
    "no phase": (lambda: begin(phase=Phase.NONE), Refused("protocol", "cannot begin")),
    "the backward phase": (lambda: begin(phase=BACKWARD), Refused("protocol", "nothing is due")),
    "a row that is not there": (lambda: listed(0, 3), Refused("protocol", "ascending row numbers")),
    "row 2**32 - 1": (lambda: listed(UINT32), Refused("protocol", "ascending row numbers")),
    "rows backwards": (lambda: listed(2, 1), Refused("protocol", "ascending row numbers")),
    "a row twice": (lambda: listed(1, 1), Refused("protocol", "ascending row numbers")),
    "no row": (lambda: listed(), Refused("protocol", "one or more")),
}


@pytest.mark.parametrize(("frame", "refused"), FALSE_BEGINS.values(), ids=list(FALSE_BEGINS))
def test_a_pass_that_lies_is_refused(wire: Wire, target: Target, frame: Callable[[], Frame], refused: Refused) -> None:
    wire.open(target.info)
    forward(wire, GENERATE, step=0, spans=[(100, 0, 2)])  # what went well before does not matter
    wire.send(frame())
    assert_refused(wire, refused)


def test_every_limit_is_the_one_announced(target: Target) -> None:
    limits = target.info.limits
    assert (limits.max_tokens_per_step, limits.max_sequences, limits.max_streams) == (2048, 4, 3)


@pytest.mark.parametrize("phase", [SCORE, GENERATE, TRAIN])
def test_the_limits_themselves_are_served(wire: Wire, target: Target, phase: Phase) -> None:
    wire.open(target.info)
    spans = [(s, 0, CONTEXT) for s in range(4)]  # 2048 tokens, 4 sequences, each to the end of the context
    assert forward(wire, phase, stream=2, spans=spans).shape == (2048, HIDDEN_SIZE)


# -- frames that come at the wrong time -------------------------------------------------------------------------------


def wrong_answer(kind: Kind, *shape: int, **fields: Any) -> Callable[[Wire], None]:
    """Send this where the v of the first inline layer is due."""

    def send(wire: Wire) -> None:
        came = wire.answer(begin(phase=TRAIN))
        wire.send(reply(came, kind, *shape, **fields))

    return send


def delta_of_another_layer(wire: Wire) -> None:
    wire.send(delta(wire.answer(begin()), layer=3))


def delta_of_a_layer_that_does_not_exist(wire: Wire) -> None:
    wire.send(delta(wire.answer(begin()), layer=400))


def delta_in_another_phase(wire: Wire) -> None:
    wire.send(delta(wire.answer(begin(phase=SCORE)), phase=TRAIN))


def delta_of_another_step(wire: Wire) -> None:
    frame = delta(wire.answer(begin()))
    frame.step += 1
    wire.send(frame)


def delta_of_another_stream(wire: Wire) -> None:
    frame = delta(wire.answer(begin()))
    frame.stream = 1
    wire.send(frame)


def delta_before_its_pass(wire: Wire) -> None:
    wire.send(delta(Frame(Kind.ENCODED, phase=SCORE, step=1, layer=0, shape=(3, 1, RANK))))


def delta_twice(wire: Wire) -> None:
    came = wire.answer(begin())
    wire.answer(delta(came))
    wire.send(delta(came))


def delta_twice_at_once(wire: Wire) -> None:
    came = wire.answer(begin())
    wire.send(delta(came))
    wire.send(delta(came))


def delta_of_nan(wire: Wire) -> None:
    came = wire.answer(begin())
    values = tensor(3, 3, RANK)
    values[0, 0, 0] = math.nan
    wire.send(delta(came).with_array(values, WireDtype.FLOAT32))


def delta_of_the_sets_rank(wire: Wire) -> None:
    wire.send(reply(wire.answer(begin()), Kind.DELTA, 3, 3, 64))


def a_pass_begun_twice(wire: Wire) -> None:
    wire.answer(begin())
    wire.send(begin())


def a_step_replayed(wire: Wire) -> None:
    forward(wire, step=7)
    wire.send(begin(step=7))


def an_earlier_step(wire: Wire) -> None:
    forward(wire, step=7)
    wire.send(begin(step=6))


def a_generation_replayed(wire: Wire) -> None:
    forward(wire, GENERATE, step=1, spans=[(5, 0, 4)])
    wire.send(begin([(5, 0, 4)], GENERATE, step=2))


def a_sequence_in_two_passes(wire: Wire) -> None:
    wire.answer(begin([(5, 0, 4)], GENERATE, stream=0))
    wire.send(begin([(5, 0, 4)], GENERATE, stream=1))


def a_fourth_stream(wire: Wire) -> None:
    for step in range(1, 4):
        wire.answer(begin(step=step))
    wire.send(begin(step=4))


def a_fifth_sequence(wire: Wire) -> None:
    for step in range(1, 5):
        forward(wire, GENERATE, step, [(step, 0, 1)])
    wire.send(begin([(9, 0, 1)], GENERATE, step=5))


def activations_of_too_many_tokens(wire: Wire) -> None:
    forward(wire, TRAIN, step=1, spans=[(s, 0, 500) for s in range(3)])
    wire.send(begin([(s, 0, 500) for s in range(3)], TRAIN, step=2))


def a_gradient_before_the_forward_is_over(wire: Wire) -> None:
    came = wire.answer(begin(phase=TRAIN))
    wire.send(reply(came, Kind.GRAD_HIDDEN, 3, HIDDEN_SIZE, phase=BACKWARD, layer=0xFFFF))


def a_gradient_of_a_pass_that_kept_nothing(wire: Wire) -> None:
    came = forward(wire, SCORE)
    wire.send(reply(came, Kind.GRAD_HIDDEN, *came.shape, phase=BACKWARD))


def a_gradient_twice(wire: Wire) -> None:
    came = forward(wire, TRAIN)
    wire.answer(reply(came, Kind.GRAD_HIDDEN, *came.shape, phase=BACKWARD))
    wire.send(reply(came, Kind.GRAD_HIDDEN, *came.shape, phase=BACKWARD))


def a_gradient_after_the_end(wire: Wire) -> None:
    came = forward(wire, TRAIN)
    last = backward(wire, came)
    wire.send(reply(last, Kind.GRAD_ENCODED, 3, 1, RANK))


def a_token_of_a_released_sequence(wire: Wire) -> None:
    forward(wire, GENERATE, step=1, spans=[(5, 0, 4)])
    wire.send(Frame(Kind.RELEASE, spans=np.array([(5, 0, 0)], np.uint32)))
    wire.send(begin([(5, 4, 1)], GENERATE, step=2))


def open_twice(wire: Wire) -> None:
    wire.send(json_frame({"model_hash": "0" * 64}))


def text(wire: Wire) -> None:
    wire.send("hello")


def garbage(wire: Wire) -> None:
    wire.send(b"\0" * 1000)


ILL_TIMED: dict[Callable[[Wire], None], str] = {
    wrong_answer(Kind.ENCODED, 3, 1, RANK): "DELTA of layer 0 in TRAIN is due",
    wrong_answer(Kind.GRAD_DELTA, 3, 3, RANK): "DELTA of layer 0 in TRAIN is due",
    wrong_answer(Kind.GRAD_ENCODED, 3, 1, RANK): "DELTA of layer 0 in TRAIN is due",
    wrong_answer(Kind.DELTA, 4, 3, RANK): "(3, 3, 8) is due",
    wrong_answer(Kind.DELTA, 3, 3 * RANK): "(3, 3, 8) is due",
    delta_of_another_layer: "DELTA of layer 0 in SCORE is due",
    delta_of_a_layer_that_does_not_exist: "DELTA of layer 0 in SCORE is due",
    delta_in_another_phase: "DELTA of layer 0 in SCORE is due",
    delta_of_another_step: "nothing is due",
    delta_of_another_stream: "nothing is due",
    delta_before_its_pass: "nothing is due",
    delta_twice: "DELTA of layer 1 in SCORE is due",
    delta_twice_at_once: "must not be repeated",
    delta_of_nan: "NaN",
    delta_of_the_sets_rank: "(3, 3, 8) is due",
    a_pass_begun_twice: "must not be repeated",
    a_step_replayed: "count upwards",
    an_earlier_step: "count upwards",
    a_generation_replayed: "4 tokens are held",
    a_sequence_in_two_passes: "another pass",
    a_fourth_stream: "more than 3 streams",
    a_fifth_sequence: "limit of 4",
    activations_of_too_many_tokens: "limit of 2048",
    a_gradient_before_the_forward_is_over: "DELTA of layer 0 in TRAIN is due",
    a_gradient_of_a_pass_that_kept_nothing: "nothing is due",
    a_gradient_twice: "GRAD_ENCODED of layer 5 in BACKWARD is due",
    a_gradient_after_the_end: "nothing is due",
    a_token_of_a_released_sequence: "0 tokens are held",
    open_twice: "OPEN of layer",
    text: "binary",
    garbage: "magic",
}


@pytest.mark.parametrize(
    ("misbehave", "word"), ILL_TIMED.items(), ids=[f"{case.__name__}-{word}" for case, word in ILL_TIMED.items()]
)
def test_a_frame_at_the_wrong_time_is_refused(
    wire: Wire, target: Target, misbehave: Callable[[Wire], None], word: str
) -> None:
    wire.open(target.info)
    misbehave(wire)
    assert_refused(wire, Refused("protocol", word))


def test_a_placement_that_trains_nothing_below_keeps_no_activations(wire: Wire, target: Target) -> None:
    wire.open(target.info, placement={"last": 2})
    wire.send(begin(phase=TRAIN))
    assert_refused(wire, Refused("protocol", "use phase SCORE"))


def test_a_device_that_holds_the_last_layers_cannot_ask_for_some_rows(wire: Wire, target: Target) -> None:
    wire.open(target.info, placement={"last": 2})
    wire.send(listed(1))
    assert_refused(wire, Refused("protocol", "every row"))


# -- sessions of others -----------------------------------------------------------------------------------------------


def test_another_users_session_is_refused_and_goes_on(wire: Wire, target: Target) -> None:
    with Wire(target.url, TOKENS["alice"]) as hers:
        hers.open(target.info)
        came = hers.answer(begin(phase=TRAIN))
        wire.open(target.info)
        assert wire.session != hers.session
        stolen = delta(came)
        stolen.session = hers.session
        wire.send(stolen)
        assert_refused(wire, Refused("protocol", "not this connection's"))
        assert hers.answer(delta(came)).kind is Kind.ENCODED  # hers still waits for her own v


@pytest.mark.parametrize("session", [1, 2**63, 2**64 - 1])
def test_a_session_that_nobody_has_is_refused(wire: Wire, target: Target, session: int) -> None:
    wire.open(target.info)
    wire.send(begin(session=session))
    assert_refused(wire, Refused("protocol", "not this connection's"))


def test_a_session_ends_with_its_connection(wire: Wire, target: Target) -> None:
    with Wire(target.url, TOKENS["mallory"]) as first:
        gone = first.open(target.info)
        first.answer(begin(phase=TRAIN))
    wire.open(target.info)
    wire.send(begin(session=gone))
    assert_refused(wire, Refused("protocol", "not this connection's"))


def test_session_numbers_cannot_be_guessed(target: Target) -> None:
    numbers = []
    for _ in range(3):
        with Wire(target.url, TOKENS["mallory"]) as wire:
            numbers.append(wire.open(target.info))
    assert len(set(numbers)) == 3
    assert all(number > 2**32 for number in numbers)  # 62 random bits: below once in 2**30
    assert len({later - sooner for sooner, later in pairwise(numbers)}) == 2


# -- anything at all --------------------------------------------------------------------------------------------------


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    opened=st.booleans(),
    damage=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 255)), max_size=4),
    tail=st.sampled_from([b"", b"\0", b"\xff" * 40]),
    cut=st.sampled_from([None, -1, 60, 48, 47, 0]),
)
def test_any_damage_to_a_frame_gives_a_coded_error_or_an_answer(
    target: Target, opened: bool, damage: list[tuple[int, int]], tail: bytes, cut: int | None
) -> None:
    with Wire(target.url, TOKENS["mallory"]) as wire:
        if opened:
            wire.open(target.info)
            frame = begin()
            frame.session = wire.session
            data = bytearray(frame.pack()[:cut] + tail)
        else:
            data = bytearray(open_frame(target.info).pack()[:cut] + tail)
        for at, value in damage:
            if at < len(data):
                data[at] = value
        send_all(wire, [bytes(data), Frame(Kind.CLOSE).pack()])
        assert_coded(wire)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(st.binary(max_size=80) | st.text(max_size=20), min_size=1, max_size=3), opened=st.booleans())
def test_any_messages_give_coded_errors(target: Target, messages: list[bytes | str], opened: bool) -> None:
    with Wire(target.url, TOKENS["mallory"]) as wire:
        if opened:
            wire.open(target.info)
        send_all(wire, messages)
        assert_coded(wire)


def send_all(wire: Wire, messages: Sequence[bytes | str]) -> None:
    with suppress(ConnectionClosed):  # refused at the first, so the others need not be sent
        for message in messages:
            wire.send(message)


def assert_coded(wire: Wire) -> None:
    """Whatever comes before the end of the connection, an ERROR has a code, and none says that the service failed."""
    try:
        while True:
            frame = wire.receive()
            if frame.kind is Kind.ERROR:
                assert parse(frame.payload, ErrorInfo).code in ("protocol", "incompatible", "configuration")
    except ConnectionClosed:
        pass  # with a code, unless what it had not read yet made the service's TCP reset the connection


def assert_refused(wire: Wire, refused: Refused) -> None:
    found = wire.refusal()
    assert found.code == refused.code, found.message
    assert refused.word in found.message


def test_the_frames_of_these_tests_are_those_of_the_models_placement(target: Target) -> None:
    assert target.info.model.shape.layers == LAYERS
    assert target.info.model.context_length == CONTEXT
    assert Placement.parse("paper", LAYERS).inline == tuple(range(LAYERS))
    assert AdapterSpec("calibrated", RANK, RANK).delta_shape(3) == (3, 3, 8)

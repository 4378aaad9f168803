"""Who comes in when there is no room: a line for sessions, a line for memory, places told, refusals with a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from tests.cloud.conftest import Serving, wait_for
from tests.support.fleet import Fleet
from tests.support.metrics import numbers
from tests.support.player import Player, at
from tests.support.service import ServiceProcess
from tests.support.wire import open_frame

from privatelora.device import DeviceSession
from privatelora.protocol.errors import AdmissionError, ConfigurationError
from privatelora.protocol.frames import Frame, Kind, Phase

BUDGET = 2 << 20
TRAINED = 100  # tokens of a training pass that takes more than half of that: 11,520 bytes a token, see `Resources`
ROWS = ["The door code of house 1 is 4071.", "Miso sleeps in the oven."]


@pytest.fixture(scope="module")
def few(serving: Serving) -> Iterator[ServiceProcess]:
    """Room for two sessions, and for three that wait."""
    with serving(max_sessions=2, max_waiting=3) as running:
        yield running


@pytest.fixture(scope="module")
def small(serving: Serving) -> Iterator[ServiceProcess]:
    """Memory for one training pass at a time."""
    with serving(memory_bytes=BUDGET, max_waiting=2) as running:
        yield running


def player(running: ServiceProcess, into: ExitStack) -> Player:
    return into.enter_context(Player(running.url, running.token))


def assert_nothing_is_held(running: ServiceProcess) -> None:
    wait_for(lambda: numbers(running)("num_sessions_running") == 0)
    now = numbers(running)
    assert (now("kv_blocks_used"), now("memory_used_bytes"), now("num_passes_waiting")) == (0, 0, 0)


# -- the line for sessions --------------------------------------------------------------------------------------------


def test_devices_wait_in_line_for_a_session_and_are_told_their_place(few: ServiceProcess) -> None:
    with ExitStack() as open_sockets:
        served = [player(few, open_sockets) for _ in range(2)]
        for device in served:
            device.enter()
        first, second, third = waiting = [player(few, open_sockets) for _ in range(3)]
        for place, device in enumerate(waiting, 1):
            device.send(open_of(device))
            assert device.wait_place() == (place, place)
        assert numbers(few)("num_sessions_waiting") == 3
        assert numbers(few)("num_sessions_running") == 2

        late = player(few, open_sockets)
        late.send(open_of(late))
        refused = late.ended()
        assert isinstance(refused, AdmissionError)
        assert refused.retry_after_s == 5
        assert "3 wait already" in str(refused)

        second.socket.close_socket()  # leaves without a word
        assert first.wait_place() == (1, 2)
        assert third.wait_place() == (2, 2)
        served[0].send(close_of())
        assert first.next().kind is Kind.OPENED
        assert third.wait_place() == (1, 1)
        served[1].socket.close_socket()
        assert third.next().kind is Kind.OPENED
        assert numbers(few)("num_sessions_waiting") == 0
        assert numbers(few)("admission_wait_seconds_count", "session") == 3  # the one who left among them
    assert_nothing_is_held(few)


def test_a_frame_before_the_session_is_open_ends_the_wait(few: ServiceProcess) -> None:
    with ExitStack() as open_sockets:
        for _ in range(2):
            player(few, open_sockets).enter()
        hasty = player(few, open_sockets)
        hasty.send(open_of(hasty))
        hasty.wait_place()
        hasty.begin(Phase.SCORE, (0, 0, 3))
        assert "before OPENED" in str(hasty.ended())
        wait_for(lambda: numbers(few)("num_sessions_waiting") == 0)
    assert_nothing_is_held(few)


def test_a_session_waits_for_its_turn_and_works(fleet: Fleet, few: ServiceProcess) -> None:
    told: list[tuple[int, int]] = []
    with ExitStack() as open_sockets, fleet.connect(few, rank=8, placement="paper") as me:
        served = [player(few, open_sockets) for _ in range(2)]
        for device in served:
            device.enter()
        me.remote.on_wait = lambda *place: told.append(place)
        leaving = threading.Timer(0.5, served[0].socket.close_socket)
        leaving.start()
        text = me.generate("The door code", max_new_tokens=4)
        leaving.join()
        assert told == [(1, 1)]
        assert text == me.generate("The door code", max_new_tokens=4)
    assert_nothing_is_held(few)


# -- the line for memory ----------------------------------------------------------------------------------------------


def test_a_pass_waits_for_memory_until_another_has_ended(small: ServiceProcess) -> None:
    with ExitStack() as open_sockets:
        holder, second, third, late = (player(small, open_sockets) for _ in range(4))
        for device in (holder, second, third, late):
            device.enter()
        alone = second.run(Phase.TRAIN, (0, 0, TRAINED))
        holder.run(Phase.TRAIN, (0, 0, TRAINED), stop=at(2, Kind.GRAD_DELTA))  # on its way back
        assert BUDGET / 2 < numbers(small)("memory_used_bytes") <= BUDGET

        second.begin(Phase.TRAIN, (0, 0, TRAINED))
        assert second.wait_place() == (1, 1)
        third.begin(Phase.GENERATE, (0, 0, 2))  # would fit, but does not overtake
        assert third.wait_place() == (2, 2)
        assert numbers(small)("num_passes_waiting") == 2
        late.begin(Phase.SCORE, (0, 0, 2))
        refused = late.ended()
        assert isinstance(refused, AdmissionError)
        assert refused.retry_after_s == 5

        holder.socket.close_socket()
        together = second.go_on()
        assert all(map(np.array_equal, together, alone))
        assert third.go_on()[-1].shape == (2, 64)
        assert numbers(small)("admission_wait_seconds_count", "memory") == 2
    assert_nothing_is_held(small)


def test_who_leaves_while_a_pass_waits_frees_its_place(small: ServiceProcess) -> None:
    with ExitStack() as open_sockets:
        holder, second, third = (player(small, open_sockets) for _ in range(3))
        for device in (holder, second, third):
            device.enter()
        holder.run(Phase.TRAIN, (0, 0, TRAINED), stop=at(3))
        for device in (second, third):
            device.begin(Phase.TRAIN, (0, 0, TRAINED))
            device.wait_place()
        second.socket.close_socket()
        assert third.wait_place() == (1, 1)
        holder.send(close_of())
        assert len(third.go_on()) == 6 + 1 + 6
    assert_nothing_is_held(small)


@pytest.mark.parametrize("phase", [Phase.TRAIN, Phase.GENERATE])
def test_a_pass_that_can_never_fit_is_refused_at_once(small: ServiceProcess, phase: Phase) -> None:
    with ExitStack() as open_sockets:
        device = player(small, open_sockets)
        device.enter()
        device.begin(phase, *((s, 0, 500) for s in range(3)))
        refused = device.ended()
        assert isinstance(refused, ConfigurationError)
        assert "1500 tokens" in str(refused) and "2 MiB" in str(refused) and "smaller" in str(refused)
    assert_nothing_is_held(small)


def test_a_service_with_next_to_no_memory_starts_and_says_so_to_who_asks(fleet: Fleet, serving: Serving) -> None:
    with (
        serving(memory_bytes=1) as running,
        fleet.connect(running, rank=8, placement="paper") as me,
        pytest.raises(ConfigurationError, match="shorter texts"),
    ):
        me.generate("A prompt", max_new_tokens=2)


def test_the_owner_of_a_batch_that_can_never_fit_hears_it_at_once(fleet: Fleet, small: ServiceProcess) -> None:
    with fleet.connect(small, rank=8, placement="paper") as me:
        begun = time.monotonic()
        with pytest.raises(ConfigurationError, match="smaller batches"):
            me.forward_backward(me.examples(["x" * 300] * 2).examples)
        assert time.monotonic() - begun < 5


def test_a_device_waits_for_memory_and_computes_the_same(fleet: Fleet, small: ServiceProcess) -> None:
    told: list[tuple[int, int]] = []
    listening = fleet.connect(small, rank=8, placement="paper", on_wait=lambda *place: told.append(place))
    with ExitStack() as open_sockets, listening as me:
        calm = gradients(me)
        holder = player(small, open_sockets)
        holder.enter()
        holder.run(Phase.TRAIN, (0, 0, 170), stop=at(5, Kind.GRAD_DELTA))
        ending = threading.Timer(0.5, lambda: holder.send(close_of()))
        ending.start()
        assert all(map(torch.equal, gradients(me), calm))
        ending.join()
        assert told == [(1, 1)]
    assert_nothing_is_held(small)


def test_a_text_without_memory_for_its_next_token_comes_back_and_is_the_same(
    fleet: Fleet, small: ServiceProcess
) -> None:
    with ExitStack() as open_sockets, fleet.connect(small, rank=8, placement="paper") as me:
        text = me.generate("once upon", max_new_tokens=40)
        stream = me.stream("once upon", max_new_tokens=40)
        seen = next(stream)
        holder = player(small, open_sockets)
        holder.enter()
        free = BUDGET - int(numbers(small)("memory_used_bytes"))
        tokens = (free - 20_000) // 11_520  # leaves less than a block of 24,576 bytes
        holder.run(Phase.TRAIN, *((s, 0, tokens // 2) for s in range(2)), stop=at(0))
        first = me.remote.session
        ending = threading.Timer(1.0, lambda: holder.send(close_of()))
        ending.start()
        begun = time.monotonic()
        assert seen + "".join(stream) == text
        ending.join()
        assert me.remote.session != first  # it was told to come back
        assert 4 < time.monotonic() - begun < 9
    assert_nothing_is_held(small)


def test_a_session_whose_own_caches_leave_no_room_replays_instead_of_waiting_for_itself(
    fleet: Fleet, small: ServiceProcess
) -> None:
    with fleet.connect(small, rank=8, placement="paper") as me:
        prompt = "a long prompt, " * 24
        text = me.generate(prompt, max_new_tokens=6)
        calm = gradients(me, times=5)
        stream = me.stream(prompt, max_new_tokens=6)
        seen = next(stream)  # holds more than half a MiB
        assert all(map(torch.equal, gradients(me, times=5), calm))
        assert seen + "".join(stream) == text
    assert_nothing_is_held(small)


def gradients(me: DeviceSession, times: int = 1) -> list[torch.Tensor]:
    me.optimizer.zero_grad()
    me.forward_backward(me.examples(ROWS[:1] * times).examples)
    return [p.grad.clone() for p in me.adapter.parameters() if p.grad is not None]


def open_of(device: Player) -> Frame:
    return open_frame(device.info)


def close_of() -> Frame:
    return Frame(Kind.CLOSE)

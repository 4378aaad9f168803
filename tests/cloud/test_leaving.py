"""Devices that fall silent, vanish, or are sent away: what they held comes free, and nobody else notices."""

from __future__ import annotations

import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from tests.cloud.conftest import Serving, wait_for
from tests.support.fleet import Fleet
from tests.support.metrics import numbers
from tests.support.player import Player, at
from tests.support.reference import difference
from tests.support.service import ServiceProcess
from websockets.exceptions import ConnectionClosed, InvalidStatus

from privatelora.device import DeviceSession
from privatelora.protocol.errors import AdmissionError
from privatelora.protocol.frames import Frame, Kind, Phase

BUDGET = 2 << 20
PARK_AFTER_S = 0.5
ROWS = ["The door code of house 1 is 4071.", "Miso sleeps in the oven.", "once upon a time", "the quick brown fox"]


@pytest.fixture(scope="module")
def running(serving: Serving) -> Iterator[ServiceProcess]:
    """Little memory, and little patience."""
    with serving(memory_bytes=BUDGET, park_after_s=PARK_AFTER_S) as started:
        yield started


def player(running: ServiceProcess, into: ExitStack) -> Player:
    device = into.enter_context(Player(running.url, running.token))
    device.enter()
    return device


def make_random(me: DeviceSession) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in me.adapter.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def gradients(me: DeviceSession, loss_fn: Callable[..., torch.Tensor] | None = None) -> list[torch.Tensor]:
    me.optimizer.zero_grad()
    me.forward_backward(me.examples(ROWS[:1]).examples, loss_fn)
    return [p.grad.clone() for p in me.adapter.parameters() if p.grad is not None]


def assert_nothing_is_held(running: ServiceProcess) -> None:
    wait_for(lambda: numbers(running)("num_sessions_running") == 0)
    now = numbers(running)
    assert (now("kv_blocks_used"), now("memory_used_bytes"), now("num_passes_waiting")) == (0, 0, 0)


# -- silence ----------------------------------------------------------------------------------------------------------


def test_a_silent_device_is_parked_holds_nobody_up_and_goes_on(fleet: Fleet, running: ServiceProcess) -> None:
    with ExitStack() as open_sockets:
        calm, silent = player(running, open_sockets), player(running, open_sockets)
        alone = [calm.run(Phase.GENERATE, (0, 0, 20))[-1], *calm.decode(0, 20, 2)]
        calm.send(Frame(Kind.CLOSE))
        with fleet.connect(running, rank=8, placement="paper") as me:
            text = me.generate(ROWS[0], max_new_tokens=20)
            before = token_times(me)

            prefilled = silent.run(Phase.GENERATE, (0, 0, 20))[-1]
            silent.begin(Phase.GENERATE, (0, 20, 1))
            silent.go_on(at(3))  # has u of layer 3, and says nothing
            at_once = token_times(me)
            wait_for(lambda: numbers(running)("num_sessions_parked") >= 1)
            parked = token_times(me)
            assert me.generate(ROWS[0], max_new_tokens=20) == text
            for during in (at_once, parked):
                assert statistics.median(during) < 2 * statistics.median(before) + 0.005
                assert max(during) < max(before) + 0.1

            held = numbers(running)("kv_blocks_used")
            assert held == 2  # 21 tokens, whatever its device does
            silent.send(made_up(silent))
            assert numbers(running)("num_sessions_running") == 2
            rest = [silent.go_on()[-1], *silent.decode(0, 21, 1)]
        assert prefilled.shape == alone[0].shape
        assert np.allclose(prefilled, alone[0], rtol=1e-5, atol=1e-6)
        for mine, wanted in zip(rest, alone[1:], strict=True):
            assert np.allclose(mine, wanted, rtol=1e-5, atol=1e-6)
        assert numbers(running)("sessions_evicted_total") == 0
    assert_nothing_is_held(running)


def token_times(me: DeviceSession) -> list[float]:
    """Of twenty decoded tokens, in seconds."""
    times, last = [], time.perf_counter()
    for _ in me.stream(ROWS[0], max_new_tokens=21):
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return times[1:]


def made_up(device: Player) -> Frame:
    """The answer that was kept back."""
    assert device.kept is not None
    return device.kept


def test_a_parked_device_gives_way_where_others_need_its_memory(running: ServiceProcess) -> None:
    with ExitStack() as open_sockets:
        silent, busy = player(running, open_sockets), player(running, open_sockets)
        silent.run(Phase.TRAIN, (0, 0, 100), stop=at(2))
        evicted = numbers(running)("sessions_evicted_total")
        busy.begin(Phase.TRAIN, (0, 0, 100))
        begun = time.monotonic()
        assert len(busy.go_on()) == 6 + 1 + 6
        assert busy.places  # it had to wait
        assert time.monotonic() - begun < 4
        refused = silent.ended()
        assert isinstance(refused, AdmissionError)
        assert refused.retry_after_s is not None
        assert "replay" in str(refused)
        assert numbers(running)("sessions_evicted_total") == evicted + 1
    assert_nothing_is_held(running)


def test_what_a_parked_device_lost_is_replayed(fleet: Fleet, running: ServiceProcess) -> None:
    """A reader who pauses, and an owner whose loss takes long, while somebody needs all the memory that there is."""
    slow = iter([True])

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if next(slow, False):
            crowd(running)
        return torch.nn.functional.cross_entropy(logits, labels)

    with fleet.connect(running, rank=8, placement="paper") as me:
        make_random(me)
        text = me.generate("once upon", max_new_tokens=20)
        stream = me.stream("once upon", max_new_tokens=20)
        seen = next(stream) + next(stream)
        first = me.remote.session
        crowd(running)
        assert seen + "".join(stream) == text
        second = me.remote.session
        calm = gradients(me, torch.nn.functional.cross_entropy)
        assert all(map(torch.equal, gradients(me, loss), calm))
        assert len({first, second, me.remote.session}) == 3
    assert_nothing_is_held(running)


def crowd(running: ServiceProcess) -> None:
    """Train with all of the memory, however long that must be waited for."""
    with ExitStack() as open_sockets:
        greedy = player(running, open_sockets)
        assert len(greedy.run(Phase.TRAIN, *((s, 0, 90) for s in range(2)))) == 6 + 1 + 6


def test_those_who_wait_for_each_other_are_told_apart(running: ServiceProcess) -> None:
    """Two texts that leave too little for either's training: one must come back, or both wait for ever."""
    with ExitStack() as open_sockets:
        devices = [player(running, open_sockets) for _ in range(2)]
        for device in devices:
            device.run(Phase.GENERATE, *((s, 0, 250) for s in (0, 1)))  # 32 blocks, 0.75 MiB
        for device in devices:
            device.begin(Phase.TRAIN, (9, 0, 90))  # 1 MiB
        done = []

        def finish(device: Player) -> None:
            try:
                done.append(len(device.go_on()))
            except AdmissionError as error:
                assert error.retry_after_s is not None
                device.socket.close_socket()
                done.append(0)

        threads = [threading.Thread(target=finish, args=(device,)) for device in devices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert sorted(done) == [0, 13]
    assert_nothing_is_held(running)


# -- leaving in mid-layer ---------------------------------------------------------------------------------------------


@contextmanager
def others_at_work(fleet: Fleet, running: ServiceProcess) -> Iterator[None]:
    """Two devices that decode and train without a pause, and find what they find alone."""
    over = threading.Event()
    failures: list[BaseException] = []
    rounds = [0, 0]

    def live(me: DeviceSession, number: int, text: str, calm: list[torch.Tensor]) -> None:
        try:
            while not over.is_set() or rounds[number] < 2:
                assert me.generate(ROWS[number], max_new_tokens=12) == text
                found = gradients(me)
                assert max(difference(*pair) for pair in zip(found, calm, strict=True)) < 1e-4
                rounds[number] += 1
        except BaseException as error:  # noqa: BLE001 (raised below, by the test)
            failures.append(error)

    with ExitStack() as opened:
        threads = []
        for number in range(2):
            me = opened.enter_context(fleet.connect(running, rank=8, placement="paper", retry_s=0.0))
            make_random(me)
            calm = me.generate(ROWS[number], max_new_tokens=12), gradients(me)
            threads.append(threading.Thread(target=live, args=(me, number, *calm)))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()
    if failures:
        raise failures[0]
    assert min(rounds) >= 2


def test_who_leaves_in_mid_layer_frees_all_and_disturbs_nobody(fleet: Fleet, serving: Serving) -> None:
    """In decode, training forward and backward; every other one as its pass is computed, perhaps with others."""
    chance = random.Random(0)
    with serving() as running:
        with others_at_work(fleet, running):
            for number in range(24):
                with ExitStack() as open_sockets:
                    device = player(running, open_sockets)
                    layer = chance.randrange(1, 6)
                    if number % 3 == 0:
                        device.run(Phase.GENERATE, (0, 0, 40))
                        device.run(Phase.GENERATE, (0, 40, 1), stop=at(layer))
                    else:
                        kind = Kind.ENCODED if number % 3 == 1 else Kind.GRAD_DELTA
                        device.run(Phase.TRAIN, (0, 0, 40), (1, 0, 9), stop=at(layer, kind))
                    if number % 2:
                        device.send(made_up(device))
                        time.sleep(chance.random() / 500)
                    device.socket.close_socket()
        assert_nothing_is_held(running)
        log = running.log.read_text()
        assert "session failed" not in log and "Traceback" not in log


def test_what_a_leaving_device_held_is_free_at_once(running: ServiceProcess) -> None:
    with ExitStack() as open_sockets:
        device = player(running, open_sockets)
        device.run(Phase.GENERATE, (0, 0, 40))
        device.run(Phase.TRAIN, (1, 0, 50), stop=at(3, Kind.GRAD_DELTA))
        assert numbers(running)("kv_blocks_used") == 3
        device.socket.close_socket()
        wait_for(lambda: numbers(running)("memory_used_bytes") == 0, timeout_s=1.0)


# -- a process that is to stop ----------------------------------------------------------------------------------------

DRAIN_S = 4.0


def test_a_restart_under_load_costs_nobody_a_token_or_a_step(fleet: Fleet, serving: Serving) -> None:
    rows = ROWS * 2
    with serving(drain_s=DRAIN_S) as running:
        settings = {"rank": 8, "placement": "paper", "seed": 3}
        with fleet.connect(running, **settings) as calm:
            text = calm.generate("once upon", max_new_tokens=300)
            report = calm.finetune(rows, epochs=4, batch_size=2)
            wanted = [p.detach().clone() for p in calm.adapter.parameters()]
            trained = calm.generate("once upon", max_new_tokens=20)
        with (
            ExitStack() as open_sockets,
            fleet.connect(running, **settings) as reader,
            fleet.connect(running, **settings) as learner,
        ):
            found: dict[str, object] = {}
            threads = [
                threading.Thread(target=lambda: found.update(text=reader.generate("once upon", max_new_tokens=300))),
                threading.Thread(target=lambda: found.update(report=learner.finetune(rows, epochs=4, batch_size=2))),
            ]
            idle, halfway, silent = (player(running, open_sockets) for _ in range(3))
            halfway.run(Phase.TRAIN, (0, 0, 10), stop=at(2))
            silent.run(Phase.TRAIN, (0, 0, 10), stop=at(2))
            for thread in threads:
                thread.start()
            wait_for(lambda: numbers(running)("tokens_total", "decode") > 330)
            assert all(thread.is_alive() for thread in threads)

            begun = time.monotonic()
            running.process.send_signal(signal.SIGTERM)
            told = idle.ended()
            assert isinstance(told, AdmissionError)
            assert told.retry_after_s is not None
            assert time.monotonic() - begun < 1
            with pytest.raises(InvalidStatus) as refused, Player(running.url, running.token, idle.info):
                pass
            assert refused.value.response.status_code == 429
            assert int(refused.value.response.headers["Retry-After"]) > 0

            halfway.send(made_up(halfway))
            assert len(halfway.go_on()) == 3 + 1 + 6  # a pass that runs is finished
            assert isinstance(halfway.ended(), AdmissionError)
            assert isinstance(silent.ended(), AdmissionError)  # after `drain_s`
            assert time.monotonic() - begun > DRAIN_S - 0.5
            assert running.process.wait(DRAIN_S + 5) == 0
            assert time.monotonic() - begun < DRAIN_S + 2

            running.start()
            for thread in threads:
                thread.join(60)
            assert found["text"] == text
            assert found["report"].steps == report.steps  # type: ignore[attr-defined]  # it is an object there
            for mine, its in zip(learner.adapter.parameters(), wanted, strict=True):
                assert difference(mine, its) < 1e-4
            assert learner.generate("once upon", max_new_tokens=20) == trained
        log = running.log.read_text()
        assert "drained" in log and "Traceback" not in log


def test_an_idle_process_stops_at_once(serving: Serving) -> None:
    with serving() as running, ExitStack() as open_sockets:
        player(running, open_sockets).run(Phase.GENERATE, (0, 0, 5))
        begun = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(10) == 0
        assert time.monotonic() - begun < 3


def test_who_waits_in_a_line_is_sent_away_by_a_drain(serving: Serving) -> None:
    with serving(max_sessions=1, memory_bytes=BUDGET) as running, ExitStack() as open_sockets:
        holder = player(running, open_sockets)
        holder.run(Phase.TRAIN, (0, 0, 150), stop=at(2))
        holder.begin(Phase.GENERATE, *((s, 0, 200) for s in (5, 6)))
        holder.wait_place()
        waiting = open_sockets.enter_context(Player(running.url, running.token))
        with pytest.raises(AdmissionError, match="about to stop"):
            threading.Timer(0.3, lambda: running.process.send_signal(signal.SIGTERM)).start()
            waiting.enter()
        assert waiting.places == [(1, 1)]
        assert isinstance(holder.ended(), AdmissionError)
        assert running.process.wait(5) == 0
        with pytest.raises((ConnectionClosed, OSError)):
            Player(running.url, running.token, waiting.info).__enter__()

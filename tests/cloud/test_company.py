"""What the scheduler's policy is worth, in simulated time: shared batches, and nobody who pays for another's trouble.

The bounds are such that a scheduler that runs whatever is ready, or waits for whoever is missing, does not keep them.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
from tests.support.simulation import Device, Simulation, between

from privatelora.cloud.passes import Way
from privatelora.cloud.scheduler import Scheduler

NEAR, FAR = between(2e-4, 5e-4), between(0.020, 0.022)  # seconds in which devices answer: of this network, of another
WARM_S, END_S = 1.2, 3.0  # measured between


class Greedy(Scheduler):
    """Runs whatever has been ready longest, and waits for nobody."""

    def _company(self, *_: object) -> None:
        return None


def chats(count: int, seed: int = 1, **kwargs: Any) -> list[Device]:
    """Devices that start at random times within a second and decode without a break."""
    random_ = random.Random(seed)
    kwargs = {"turnaround": NEAR, "between": between(5e-4, 1e-3)} | kwargs
    return [Device(**{"starts_at": random_.uniform(0, 1)} | kwargs) for _ in range(count)]


def trainers(count: int, rows: int = 508, **kwargs: Any) -> list[Device]:
    kwargs = {"turnaround": between(0.002, 0.006), "between": between(0.005, 0.02)} | kwargs
    return [Device(way=Way.TRAIN, rows=rows, **{"starts_at": 0.05 * at} | kwargs) for at in range(count)]


def prompt(starts_at: float, **kwargs: Any) -> Device:
    return Device(NEAR, between(0.02, 0.03), way=Way.PREFILL, rows=200, passes=1, starts_at=starts_at, **kwargs)


def rate(devices: Sequence[Device]) -> float:
    """Tokens/s together, of those that were begun and finished in the measured time."""
    return sum(len(device.durations(WARM_S)) for device in devices) / (END_S - WARM_S)


def token_s(devices: Sequence[Device]) -> list[float]:
    return sorted(seconds for device in devices for seconds in device.durations(WARM_S))


@pytest.fixture(scope="module")
def undisturbed() -> list[Device]:
    """32 devices that had the service to themselves."""
    devices = chats(32)
    Simulation(devices).run(END_S)
    return devices


@pytest.mark.parametrize(
    ("inline", "least_rows", "factor"),
    [(None, 12, 1.5), ((0, 10, 20, 29), 24, 2.0), ((), 28, 3.0)],
    ids=["every layer inline", "four inline", "one trip"],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_devices_that_start_at_random_times_end_in_few_cohorts(
    inline: tuple[int, ...] | None, least_rows: float, factor: float, seed: int
) -> None:
    ours, greedys = chats(32, seed, inline=inline), chats(32, seed, inline=inline)
    simulation = Simulation(ours, seed).run(END_S)
    Simulation(greedys, seed, Greedy).run(END_S)
    assert statistics.mean(simulation.rows(Way.DECODE, WARM_S)) >= least_rows
    assert rate(ours) >= factor * rate(greedys)


def test_equal_work_gets_equal_rates_and_even_times(undisturbed: list[Device]) -> None:
    counts = [len(device.durations(WARM_S)) for device in undisturbed]
    assert statistics.median(counts) / min(counts) < 1.1
    times = token_s(undisturbed)
    assert times[int(0.99 * len(times))] < 1.3 * statistics.median(times)


def test_waiting_is_not_worth_a_twentieth_of_a_token_where_the_network_is_the_wall() -> None:
    alone, many = chats(1, turnaround=FAR), chats(32, turnaround=FAR)
    Simulation(alone).run(6.0)
    Simulation(many).run(6.0)
    assert statistics.median(token_s(many)) < 1.05 * statistics.median(token_s(alone))


def test_a_session_alone_never_waits() -> None:
    ours, greedys = chats(1), chats(1)
    Simulation(ours).run(END_S)
    Simulation(greedys, scheduler=Greedy).run(END_S)
    assert ours[0].done == greedys[0].done


@pytest.mark.parametrize("count", [1, 4])
def test_devices_that_vanish_cost_no_other_more_than_a_few_tokens(undisturbed: list[Device], count: int) -> None:
    others, gone = chats(32), chats(count, seed=3, vanishes_at=WARM_S)
    Simulation(others + gone).run(END_S)
    usual = statistics.median(token_s(undisturbed))
    assert max(token_s(others)) < 2 * usual
    for device in others:
        assert sum(max(0.0, seconds - usual) for seconds in device.durations(WARM_S)) < 5 * usual


def test_a_device_that_stalls_again_and_again_does_not_slow_the_others(undisturbed: list[Device]) -> None:
    def stalling(random_: random.Random) -> float:
        return 0.5 if random_.random() < 0.05 else NEAR(random_)

    disturbed = chats(32)
    Simulation(disturbed + chats(2, seed=3, turnaround=stalling)).run(END_S)
    assert rate(disturbed) > 0.85 * rate(undisturbed)


def test_those_who_read_what_they_got_do_not_slow_those_who_go_on(undisturbed: list[Device]) -> None:
    reading = [Device(NEAR, between(1.0, 2.0), starts_at=at / 100) for at in range(100)]
    disturbed = chats(32)
    Simulation(disturbed + reading).run(END_S)
    assert rate(disturbed) + rate(reading) > 0.9 * rate(undisturbed)
    assert statistics.median(token_s(disturbed)) < 1.35 * statistics.median(token_s(undisturbed))


def test_chats_at_a_pace_keep_it() -> None:
    paced = chats(8, between=between(0.2, 0.25))
    alone = chats(1, between=between(0.2, 0.25))
    Simulation(paced).run(END_S)
    Simulation(alone).run(END_S)
    usual = statistics.median(token_s(alone))
    assert statistics.median(token_s(paced)) < 1.2 * usual
    assert max(token_s(paced)) < 2.2 * usual  # nobody waits for company longer than a token takes


def test_sessions_that_leave_in_mid_layer_do_not_slow_the_others_or_leave_a_trace() -> None:
    undisturbed, disturbed = chats(24), chats(24)
    random_ = random.Random(5)
    leaving = [
        Device(NEAR, between(5e-4, 1e-3), starts_at=at / 40, leaves_at=at / 40 + random_.uniform(0.001, 0.5))
        for at in range(90)
    ]
    Simulation(undisturbed).run(END_S)
    simulation = Simulation(disturbed + leaving).run(END_S)
    assert rate(disturbed) > 0.7 * rate(undisturbed)  # who leaves is served until then
    accounts = {device.account for device in disturbed}
    assert {getattr(key, "account", key) for key in simulation.scheduler._at} <= accounts


def test_training_sessions_get_equal_compute_whatever_the_size_of_their_steps() -> None:
    devices = trainers(4, rows=64) + trainers(4, rows=512)
    Simulation(devices).run(30.0)
    used = [device.account.virtual_s for device in devices]
    assert max(used) < 1.05 * min(used)
    small, large = (sum(len(one.done) * one.rows for one in devices if one.rows == rows) for rows in (64, 512))
    assert 0.4 < small / large < 0.8  # rows in small batches cost more, so equal compute is fewer of them


def test_a_session_of_twice_the_weight_gets_twice_the_compute() -> None:
    devices = trainers(4)
    devices[0].account.weight = 2.0
    Simulation(devices).run(30.0)
    steps = [len(device.done) for device in devices]
    assert steps[0] == pytest.approx(2 * statistics.mean(steps[1:]), rel=0.15)


def test_a_late_session_gets_its_share_at_once_and_nothing_for_the_time_before() -> None:
    early, late = trainers(8), trainers(1, starts_at=20.0)
    Simulation(early + late).run(50.0)
    share = 9 / 8  # by which a step takes longer, now that there is one more
    before = statistics.median(
        seconds for one in early for begun, end in one.done if end < 20 for seconds in [end - begun]
    )
    after = [seconds for one in early for seconds in one.durations(20.0)]
    assert max(after) < 1.1 * share * before  # the late one does not catch up at their cost
    assert max(late[0].durations()) < 1.2 * share * before  # nor is it starved


@pytest.mark.parametrize("rows", [64, 508])
def test_a_prompt_gets_through_quickly_beside_eight_training_sessions(rows: int) -> None:
    alone, beside = prompt(5.0), [prompt(5.0 + 1.1 * at) for at in range(3)]
    Simulation([alone]).run(6.0)
    Simulation(trainers(8, rows) + beside).run(10.0)
    assert max(one.durations()[0] for one in beside) < 4 * alone.durations()[0]


def test_who_has_decoded_long_does_not_wait_longer_for_the_next_prompt() -> None:
    chat = Device(NEAR, between(5e-4, 1e-3), passes=400)
    newcomer, known = prompt(12.0), prompt(13.0, account=chat.account)
    Simulation([*trainers(8), chat, newcomer, known]).run(20.0)
    assert known.durations()[0] < 1.2 * newcomer.durations()[0]


def test_training_does_not_slow_decoding_in_its_own_lane() -> None:
    undisturbed, disturbed = [], []
    for seed in (1, 2, 3):  # a rate counts whole tokens, 8 of 600 at the edges
        undisturbed += (alone := chats(8, seed))
        disturbed += (beside := chats(8, seed))
        Simulation(alone, seed).run(END_S)
        Simulation(beside + trainers(8), seed).run(END_S)
    assert rate(disturbed) > 0.98 * rate(undisturbed)

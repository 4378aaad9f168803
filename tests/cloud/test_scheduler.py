"""The scheduler keeps its rules whatever happens in whatever order: nothing is run twice, lost, kept waiting or kept.

Hypothesis invents the order; time, devices and compute are only numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.support.simulation import COSTS, Device, SimulatedPass

from privatelora.cloud.passes import Point, Stage, Way
from privatelora.cloud.scheduler import MAX_ROWS, Hold, Lane, Run, Scheduler, lane_of

T = TypeVar("T")

LAYERS = 4
FIRST = Point(Way.DECODE, Stage.ENTER, 0)
SECONDS = st.one_of(st.floats(1e-5, 1e-3), st.floats(1e-3, 3.0))


class Life(RuleBasedStateMachine):
    """Sessions of which each has one pass or none; `seed` of the rules picks one of those that are concerned."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler, self.now = Scheduler(COSTS), 0.0
        self.sessions: list[Device] = []
        self.ready: dict[SimulatedPass, Point] = {}
        self.away: dict[SimulatedPass, tuple[Point, float]] = {}  # where the answer is due, and since when
        self.parked: dict[SimulatedPass, Point] = {}
        self.resting: dict[Device, float] = {}  # between two tokens, and since when
        self.running: dict[Lane, Run] = {}
        self.longest_answer = 0.0

    # -- what happens --------------------------------------------------------------------------------------------------

    @rule(way=st.sampled_from([way for way in Way if way is not Way.BACKWARD]), rows=st.integers(2, 700),
          inline=st.sets(st.integers(0, LAYERS - 1)))  # fmt: skip
    def comes(self, way: Way, rows: int, inline: set[int]) -> None:
        device = Device(_never, _never, LAYERS, sorted(inline), way, 1 if way is Way.DECODE else rows)
        self.sessions.append(device)
        self.begins(device)

    @rule(count=st.integers(2, 6))
    def many_come(self, count: int) -> None:
        """Alike, so that there is company to wait for."""
        for _ in range(count):
            self.comes(Way.DECODE, 1, set(range(LAYERS)))

    @precondition(lambda self: self.resting)
    @rule(seed=st.integers(0))
    def next_token(self, seed: int) -> None:
        device = _one_of(self.resting, seed)
        del self.resting[device]
        self.begins(device)

    @precondition(lambda self: self.away)
    @rule(seed=st.integers(0))
    def answers(self, seed: int) -> None:
        one = _one_of(self.away, seed)
        point, sent = self.away.pop(one)
        self.longest_answer = max(self.longest_answer, self.now - sent)
        self.is_ready(one, point)

    @rule(seconds=SECONDS)
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: len(self.running) < len(Lane))
    @rule(seed=st.integers(0))
    def lane_asks(self, seed: int) -> None:
        self.ask(_one_of([lane for lane in Lane if lane not in self.running], seed))

    @precondition(lambda self: self.running)
    @rule(seed=st.integers(0), seconds=SECONDS)
    def batch_finishes(self, seed: int, seconds: float) -> None:
        self.now += seconds
        self.finish(_one_of(self.running, seed))

    @precondition(lambda self: self.sessions)
    @rule(seed=st.integers(0))
    def session_leaves(self, seed: int) -> None:
        self.end(_one_of(self.sessions, seed))

    @precondition(lambda self: self.away or self.resting)
    @rule(seed=st.integers(0))
    def session_is_parked(self, seed: int) -> None:
        """Its device has been silent; it may still answer, or begin its next token."""
        quiet = [one.device for one in self.away] + list(self.resting)
        device = _one_of(quiet, seed)
        self.scheduler.leave(device.account)
        if device.running is not None:
            self.scheduler.leave(device.running)
            self.parked[device.running] = self.away.pop(device.running)[0]

    @precondition(lambda self: self.parked)
    @rule(seed=st.integers(0))
    def parked_answers(self, seed: int) -> None:
        one = _one_of(self.parked, seed)
        self.is_ready(one, self.parked.pop(one))

    @precondition(lambda self: self.away)
    @rule(seconds=SECONDS, but=st.integers(0, 3))
    def most_answer(self, seconds: float, but: int) -> None:
        self.now += seconds
        for _ in range(len(self.away) - but):
            self.answers(0)

    @precondition(lambda self: self.ready)
    @rule(lane=st.sampled_from(Lane))
    def lane_keeps_asking(self, lane: Lane) -> None:
        """While nobody answers any more: what is ready waits for no longer than all of it would take layer by layer."""
        if lane in self.running:
            self.finish(lane)
        every_layer = sum(COSTS[lane].seconds(device.rows) for device in self.sessions)
        patience = (LAYERS + 1) * (every_layer + self.longest_answer)
        began, asked = self.now, 0
        while isinstance(picked := self.ask(lane), Run | Hold):
            asked += 1
            if isinstance(picked, Hold):
                self.now = picked.until
            else:
                self.finish(lane)
            assert self.now - began <= patience * 1.001
            assert asked <= 100 * (1 + len(self.sessions))
        assert not [one for one, point in self.ready.items() if lane_of(point.way) is lane]

    # -- what must be true ---------------------------------------------------------------------------------------------

    def ask(self, lane: Lane) -> Run | Hold | None:
        there = [one for one, point in self.ready.items() if lane_of(point.way) is lane]
        picked = self.scheduler.pick(lane, self.now)
        assert (picked is None) == (not there)
        if isinstance(picked, Hold):
            assert self.now < picked.until < float("inf")
        elif picked is not None:
            assert picked.passes
            assert len(set(picked.passes)) == len(picked.passes)
            assert len(picked.passes) == 1 or sum(one.n for one in picked.passes) <= MAX_ROWS[lane]
            for one in picked.passes:
                assert self.ready.pop(one) == picked.point  # ready there, and not handed out since
            self.running[lane] = picked
        return picked

    @invariant()
    def tables_hold_what_is_there_and_nothing_else(self) -> None:
        scheduler = self.scheduler
        waits = {**self.ready, **{one: point for one, (point, _) in self.away.items()}}
        sessions = {device.account: FIRST for device in self.resting if device.account in scheduler._at}  # or parked
        computed = {one for run in self.running.values() for one in run.passes if not one.gone}
        assert {key: place.point for key, place in scheduler._at.items()} == {**waits, **sessions}
        assert set(scheduler._waited) == set(waits) | computed
        places = [(point, place) for lane in Lane for point, place in scheduler._places[lane].items()]
        assert {one: point for point, place in places for one in place.ready} == self.ready
        flying = {key: (point, flight) for point, place in places for flight in place.flights for key in flight.works}
        assert {key: flight for key, (_, flight) in flying.items()} == scheduler._flying
        assert {**self.ready, **{key: point for key, (point, _) in flying.items()}} == {**waits, **sessions}
        for point, place in places:
            assert place.ready or place.flights
            assert point == place.point
            assert all(flight.rows == sum(flight.works.values()) > 0 for flight in place.flights)
            assert place.rows == sum(one.n for one in place.ready)
            assert place.ready or place.held_since is None
            assert place.stops <= min((one.stops_left(point) for one in place.ready), default=float("inf"))
            assert point in scheduler._places[lane_of(point.way)]
        for lane in Lane:
            assert scheduler.waiting(lane) == sum(lane_of(point.way) is lane for point in self.ready.values())

    def teardown(self) -> None:
        for device in list(self.sessions):
            self.end(device)
        for lane in list(self.running):
            self.finish(lane)
        assert not self.scheduler._at and not self.scheduler._waited and not any(self.scheduler._places.values())
        assert all(self.scheduler.pick(lane, self.now) is None for lane in Lane)

    # -- as the engine and the sessions do -----------------------------------------------------------------------------

    def begins(self, device: Device) -> None:
        device.running = SimulatedPass(device, device.way, device.rows, self.now)
        self.is_ready(device.running, Point(device.way, Stage.ENTER, 0))

    def is_ready(self, one: SimulatedPass, point: Point) -> None:
        self.ready[one] = point
        self.scheduler.ready([one], point, self.now)

    def finish(self, lane: Lane) -> None:
        run = self.running.pop(lane)
        self.scheduler.used(run.passes, run.point, 1e-3)
        for one in run.passes:
            assert isinstance(one, SimulatedPass)
            if one.gone:
                continue
            onward = one.onward(run.point)
            if onward is not None and not one.awaits_answer(onward):
                self.is_ready(one, onward)
            elif onward is not None:
                self.away[one] = onward, self.now
                self.scheduler.expect([one], onward, self.now)
            else:
                one.device.running = None
                if one.way is Way.DECODE:
                    self.resting[one.device] = self.now
                    self.scheduler.expect_next([one], FIRST, self.now)
                else:
                    self.scheduler.leave(one)

    def end(self, device: Device) -> None:
        self.sessions.remove(device)
        self.resting.pop(device, None)
        self.scheduler.leave(device.account)
        if device.running is not None:
            device.running.gone = True
            self.scheduler.leave(device.running)
            for table in (self.ready, self.away, self.parked):
                table.pop(device.running, None)


def _never(random: object) -> float:
    raise AssertionError("Hypothesis says when")


def _one_of(things: Iterable[T], seed: int) -> T:
    listed = list(things)
    return listed[seed % len(listed)]


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=200, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

"""A backbone in simulated time: the real scheduler, with devices and compute that are only numbers.

    Device      what it begins again and again (tokens, prompts, training steps), how fast it answers, and how it fails
    Simulation  begins passes, asks the scheduler as the engine does, and lets compute and answers take their time

A unit of work takes what the cost model of its lane says, and the two lanes run side by side. `Device.done` and
`Simulation.batches` are what tests look at. The same seed gives the same run.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from privatelora.cloud.cost import CostModel
from privatelora.cloud.passes import Account, Point, Stage, Way
from privatelora.cloud.scheduler import Hold, Lane, Run, Scheduler, lane_of

COSTS = {
    Lane.DECODE: CostModel(((1, 2.5e-4), (4, 3.0e-4), (8, 3.6e-4), (16, 4.7e-4), (32, 6.5e-4), (64, 9.5e-4))),
    Lane.LONG: CostModel(((16, 6e-4), (64, 1.2e-3), (128, 2.0e-3), (256, 3.8e-3), (512, 7.5e-3))),
}
"""About what a layer of SmolLM-135M takes on two cores."""

ENTER_SHARE = 0.1  # of a layer's time: entering is a norm and one product with A
PARK_S = 30.0  # of silence, after which the service no longer counts on a device

Draw = Callable[[random.Random], float]


def between(low: float, high: float) -> Draw:
    """Any time of that range."""
    return lambda random: random.uniform(low, high)


@dataclass(eq=False)
class Device:
    """One session.

    Parameters
    ----------
    turnaround : seconds until it answers an exchange; between : from the end of a pass to the beginning of the next.
    layers, inline : of the model; None: an exchange at each.
    way, rows : of what it begins; a prompt (PREFILL) is begun once, and tokens follow it.
    passes : how many it begins before it stops.
    leaves_at : its session ends there and then; vanishes_at : from then on it answers nothing.
    """

    turnaround: Draw
    between: Draw
    layers: int = 30
    inline: Sequence[int] | None = None
    way: Way = Way.DECODE
    rows: int = 1
    passes: float = math.inf
    starts_at: float = 0.0
    leaves_at: float = math.inf
    vanishes_at: float = math.inf
    account: Account = field(default_factory=Account)
    begun: int = 0
    done: list[tuple[float, float]] = field(default_factory=list)  # (begun, finished) of its passes
    running: SimulatedPass | None = None

    def __post_init__(self) -> None:
        self.stops = sorted(range(self.layers) if self.inline is None else self.inline)

    def durations(self, since: float = 0.0) -> list[float]:
        """Seconds that passes took which were begun after `since`."""
        return [finished - begun for begun, finished in self.done if begun >= since]


@dataclass(eq=False)
class SimulatedPass:
    """A token, a prompt, or a training step of a device."""

    device: Device
    way: Way
    n: int
    begun: float
    gone: bool = False

    @property
    def account(self) -> Account:
        return self.device.account

    def layers_left(self, point: Point) -> int:
        return point.layer + 1 if point.way is Way.BACKWARD else self.device.layers - point.layer

    def stops_left(self, point: Point) -> int:
        stops = self.device.stops
        if point.way is Way.BACKWARD:
            return bisect.bisect_left(stops, point.layer) + 1
        return len(stops) - bisect.bisect_left(stops, point.layer + (point.stage is Stage.RESUME)) + 1

    def onward(self, point: Point) -> Point | None:
        """Where it stands once `point` is computed; None if it is over."""
        if point.stage is Stage.ENTER:
            return Point(point.way, Stage.RESUME, point.layer)
        if point.stage is Stage.BACK_ENTER:
            return Point(point.way, Stage.BACK_RESUME, point.layer)
        if point.stage is Stage.BACK_RESUME:
            return Point(point.way, point.stage, point.layer - 1) if point.layer else None
        if point.layer + 1 < self.device.layers:
            return Point(point.way, point.stage, point.layer + 1)
        return Point(Way.BACKWARD, Stage.BACK_ENTER, point.layer) if point.way is Way.TRAIN else None

    def awaits_answer(self, point: Point) -> bool:
        """Whether its device has to say something before it can be computed there."""
        return point.stage is Stage.BACK_ENTER or point.layer in self.device.stops


class Simulation:
    """`scheduler`: of another policy than the service's, to compare."""

    def __init__(
        self,
        devices: Sequence[Device],
        seed: int = 0,
        scheduler: type[Scheduler] = Scheduler,
        costs: Mapping[Lane, CostModel] = COSTS,
    ) -> None:
        self.scheduler, self.costs, self.devices = scheduler(costs), costs, list(devices)
        self.random, self.now = random.Random(seed), 0.0
        self.batches: list[tuple[float, Point, int]] = []  # (when, where, rows)
        self.busy_s = dict.fromkeys(Lane, 0.0)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._computing = dict.fromkeys(Lane, False)
        for device in self.devices:
            self._at(device.starts_at, self._begin, device)
            if device.leaves_at < math.inf:
                self._at(device.leaves_at, self._leave, device)
            if device.vanishes_at < math.inf:
                self._at(device.vanishes_at + PARK_S, self._leave, device)

    def run(self, seconds: float) -> Simulation:
        """Go on until that time, or until nothing happens any more."""
        while self._events and self._events[0][0] <= seconds:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
        return self

    def rows(self, way: Way, since: float = 0.0) -> list[int]:
        """Of the batches that computed whole layers."""
        return [
            n for at, point, n in self.batches if point.way is way and point.stage is not Stage.ENTER and at >= since
        ]

    def _at(self, when: float, happen: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self._events, (when, next(self._order), lambda: happen(*arguments)))

    # -- devices -------------------------------------------------------------------------------------------------------

    def _begin(self, device: Device) -> None:
        if self.now >= min(device.leaves_at, device.vanishes_at) or device.begun >= device.passes:
            return
        way = Way.DECODE if device.way is Way.PREFILL and device.begun else device.way
        device.begun += 1
        one = device.running = SimulatedPass(device, way, 1 if way is Way.DECODE else device.rows, self.now)
        self._ready(one, Point(way, Stage.ENTER, 0))

    def _answer(self, one: SimulatedPass, point: Point) -> None:
        if not one.gone and self.now < one.device.vanishes_at:
            self._ready(one, point)

    def _leave(self, device: Device) -> None:
        self.scheduler.leave(device.account)
        if device.running is not None:
            device.running.gone = True
            self.scheduler.leave(device.running)

    # -- the engine ----------------------------------------------------------------------------------------------------

    def _ready(self, one: SimulatedPass, point: Point) -> None:
        self.scheduler.ready([one], point, self.now)
        self._at(self.now, self._turn, lane_of(point.way))  # once everything is in that comes at this moment

    def _turn(self, lane: Lane) -> None:
        if self._computing[lane]:
            return
        picked = self.scheduler.pick(lane, self.now)
        if isinstance(picked, Run):
            rows = sum(one.n for one in picked.passes)
            seconds = self.costs[lane].seconds(rows) * (ENTER_SHARE if picked.point.stage is Stage.ENTER else 1.0)
            self.batches.append((self.now, picked.point, rows))
            self.busy_s[lane] += seconds
            self._computing[lane] = True
            self._at(self.now + seconds, self._computed, lane, picked, seconds)
        elif isinstance(picked, Hold):
            assert picked.until >= self.now
            self._at(max(picked.until, self.now + 1e-6), self._turn, lane)

    def _computed(self, lane: Lane, run: Run, seconds: float) -> None:
        self._computing[lane] = False
        self.scheduler.used(run.passes, run.point, seconds)
        awaited: dict[Point, list[SimulatedPass]] = {}
        onwards: dict[Point, list[SimulatedPass]] = {}
        for one in run.passes:
            assert isinstance(one, SimulatedPass)
            if one.gone:
                continue
            onward = one.onward(run.point)
            if onward is None:
                self._over(one)
            elif one.awaits_answer(onward):
                awaited.setdefault(onward, []).append(one)
                self._at(self.now + one.device.turnaround(self.random), self._answer, one, onward)
            else:
                onwards.setdefault(onward, []).append(one)
        for point, told in awaited.items():
            self.scheduler.expect(told, point, self.now)
        for point, going in onwards.items():
            self.scheduler.ready(going, point, self.now)
        self._at(self.now, self._turn, lane)

    def _over(self, one: SimulatedPass) -> None:
        device = one.device
        device.running = None
        device.done.append((one.begun, self.now))
        if one.way is Way.DECODE:
            self.scheduler.expect_next([one], Point(Way.DECODE, Stage.ENTER, 0), self.now)
        else:
            self.scheduler.leave(one)
        self._at(self.now + device.between(self.random), self._begin, device)

"""Which passes are computed next: a ready queue for every point of the model, merged into batches.

    ready(passes, point)    what they waited for has come
    expect(passes, point)   their devices have been told something, and answer for this point
    pick(lane, now)         Run(point, passes): compute these together; Hold(until): better wait; None: nothing is ready

Sessions drift apart inside the model, since each stops at every inline layer for its device, so batches are formed a
layer at a time. Two rules keep the weights' traffic shared:

**Company.** A batch of 16 costs nearly what one of 32 does, so whoever runs whatever is ready ends with cohorts that
never meet again, at half the speed. Here a batch that is ready may wait for passes that will be back soon. What it may
spend on that is what their company saves on the rest of its way: `_gain` a stop times the stops left. What is spent
is counted a pass, so that it can lose no more by waiting than waiting could win it.

**Fairness.** Decoded tokens and everything longer have a lane each, which the engine computes side by side, so neither
waits for the other. Within the long lane the session that has used the least compute goes first, by weighted virtual
time; within the decoding lane the pass that has been ready longest.

Time is the caller's: every method takes `now` in seconds, and nothing here sleeps, computes or knows a tensor. What
happens to many passes at once is told in one call, as a thousand calls a token are felt.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from privatelora.cloud.cost import CostModel
from privatelora.cloud.passes import Account, Point, Stage, Way

TURNAROUND_WEIGHT = 0.25  # of the newest turnaround in a device's running mean
ANSWER_DRIFT = 1.002  # by which the fastest answer counts as slower with each that comes, to forget what has changed
OVERDUE_SHARE = 0.5  # a device that is late by t is expected in this share of t
OVERDUE_S = 1e-4  # and not sooner than in this time, so that a lane that holds does not ask without end
HORIZON_S = 0.1  # who is not expected before, as somebody who reads what was written, is no company for a token now
PREFILL_WEIGHT = 4.0  # a prompt's compute counts a quarter: somebody waits for its first token


class Lane(StrEnum):
    DECODE = "decode"
    LONG = "long"


MAX_ROWS = {Lane.DECODE: 256, Lane.LONG: 512}
"""Rows of one batch; above, the time of a layer grows with its rows and nothing is left to share."""


def lane_of(way: Way) -> Lane:
    return Lane.DECODE if way is Way.DECODE else Lane.LONG


class Work(Hashable, Protocol):
    """What the scheduler knows of a pass."""

    @property
    def n(self) -> int: ...

    @property
    def account(self) -> Account: ...

    def layers_left(self, point: Point) -> int: ...

    def stops_left(self, point: Point) -> int: ...


@dataclass(frozen=True)
class Run:
    """Compute these passes together.

    one_layer : whether they stop at the next layer, by the fewest layers and stops that one of them has left.
    """

    point: Point
    passes: list[Work]
    one_layer: bool = False


@dataclass(frozen=True)
class Hold:
    """Company is on its way: ask again then, or when something comes."""

    until: float


@dataclass(eq=False, slots=True)
class Flight:
    """Devices that were told something at one time and take about as long to answer, and when all should have."""

    works: dict[Work | Account, int]  # and their rows
    rows: int
    sent: float
    due: float

    def expected(self, now: float) -> float:
        """When they will be there; a device that is late by t is given a share of t more."""
        return self.due if self.due > now else now + max(OVERDUE_SHARE * (now - self.due), OVERDUE_S)


@dataclass(frozen=True, slots=True)
class Cohort:
    """What stands at a point: its rows, when all of them are there, a layer's time for them, and one of them."""

    point: Point
    rows: int
    there: float
    seconds: float
    one: Work | Account


@dataclass(eq=False)
class Place:
    """A point with passes: those that are ready and since when, and what is awaited of devices.

    rows, stops, layers : of the ready ones together, and the fewest that one of them has left.
    held_since, held_rows : when they began to wait for company, if they do, and how many rows they were then.
    """

    point: Point
    ready: dict[Work, float] = field(default_factory=dict)
    flights: dict[Flight, None] = field(default_factory=dict)
    rows: int = 0
    stops: float = math.inf
    layers: float = math.inf
    held_since: float | None = None
    held_rows: int = 0


class Scheduler:
    """Queues of one process: what is ready at each point, and what is awaited there."""

    def __init__(self, costs: Mapping[Lane, CostModel]) -> None:
        self.costs = costs
        self._places: dict[Lane, dict[Point, Place]] = {lane: {} for lane in Lane}  # none is empty
        self._at: dict[Work | Account, Place] = {}  # where a pass is, or a session between two tokens
        self._flying: dict[Work | Account, Flight] = {}
        self._waited: dict[Work, float] = {}  # seconds that a pass has waited for company so far
        self._answer_s: dict[Lane, float] = {}  # in which devices answer if nothing keeps them waiting
        self._virtual_s = 0.0  # of the session that was served last

    # -- what happens --------------------------------------------------------------------------------------------------

    def ready(self, works: Sequence[Work], point: Point, now: float, alike: bool = False) -> None:
        """`works` can be computed at `point`: they came, their devices answered, or nothing is due.

        alike : whether they have the same placement.
        """
        if not works:
            return
        enters, lane = point.stage is Stage.ENTER, lane_of(point.way)
        place = self._place(point)
        took = math.inf
        for work in works:
            account = work.account
            flight = self._remove(account if enters else work)
            if flight is not None:
                seconds = now - flight.sent
                if not enters:
                    account.turnaround_s = _mean(account.turnaround_s, seconds)
                    took = min(took, seconds)
                elif lane is Lane.DECODE:
                    account.between_s = _mean(account.between_s, seconds)
            if work not in self._waited:  # its first point
                self._waited[work] = 0.0
                account.virtual_s = max(account.virtual_s, self._virtual_s)
            place.ready[work], self._at[work] = now, place
            place.rows += work.n
        if took < math.inf:
            self._answer_s[lane] = min(took, self._answer_s.get(lane, took) * ANSWER_DRIFT)
        for work in works[:1] if alike else works:
            place.stops = min(place.stops, work.stops_left(point))
            place.layers = min(place.layers, work.layers_left(point))
        self._places[lane][point] = place  # it may have lost its last flight meanwhile

    def expect(self, works: Sequence[Work], point: Point, now: float) -> None:
        """The devices of `works` were told something, and will answer for `point`."""
        self._fly(works, works, [work.account.turnaround_s for work in works], point, now)

    def expect_next(self, works: Sequence[Work], point: Point, now: float) -> None:
        """`works` have decoded a token; their sessions may begin the next one at `point`."""
        for work in works:
            self.leave(work)
        accounts = [work.account for work in works]
        self._fly(accounts, works, [account.between_s for account in accounts], point, now)

    def leave(self, item: Work | Account) -> None:
        """A pass is over or given up, or a session has ended: it is neither ready nor awaited any more."""
        self._remove(item)
        if not isinstance(item, Account):
            self._waited.pop(item, None)

    def used(self, works: Sequence[Work], point: Point, seconds: float) -> None:
        """A batch took `seconds` of compute; sessions pay by their rows for what they take of the long lane."""
        if lane_of(point.way) is Lane.DECODE:
            return
        rows = sum(work.n for work in works)
        for work in works:
            share = seconds * work.n / rows / work.account.weight
            work.account.virtual_s += share / PREFILL_WEIGHT if point.way is Way.PREFILL else share

    # -- what to do ----------------------------------------------------------------------------------------------------

    def pick(self, lane: Lane, now: float) -> Run | Hold | None:
        """What the lane does next; what is to be run is neither ready nor held any more."""
        places = self._places[lane]
        ready = [point for point, place in places.items() if place.ready]
        if not ready:
            return None
        cohorts = self._cohorts(lane, now)
        until = math.inf
        for point in sorted(ready, key=self._since if lane is Lane.DECODE else self._least_served):
            wait = self._company(point, cohorts, now)
            if wait is None:
                return self._take(point, cohorts, now)
            place = places[point]
            if place.held_since is None:
                place.held_since, place.held_rows = now, place.rows
            until = min(until, wait)
        return Hold(until)

    def waiting(self, lane: Lane) -> int:
        """Passes that are ready."""
        return sum(len(place.ready) for place in self._places[lane].values())

    def idle(self, lane: Lane) -> bool:
        """Whether no pass is ready or awaited."""
        return not self._places[lane]

    def _since(self, point: Point) -> float:
        return next(iter(self._places[lane_of(point.way)][point].ready.values()))  # they are in the order of their time

    def _least_served(self, point: Point) -> float:
        return min(work.account.virtual_s for work in self._places[lane_of(point.way)][point].ready)

    def _take(self, point: Point, cohorts: Sequence[Cohort], now: float) -> Run:
        lane = lane_of(point.way)
        place = self._places[lane][point]
        waited = 0.0
        if place.held_since is not None:
            waited = now - place.held_since
            if place.rows > place.held_rows:
                waited -= self._earned(point, place, cohorts)
            place.held_since = None
        chosen: list[Work] = []
        rows, one_layer = 0, place.layers <= place.stops
        for work in place.ready if lane is Lane.DECODE else sorted(place.ready, key=lambda one: one.account.virtual_s):
            if chosen and rows + work.n > MAX_ROWS[lane]:
                break
            chosen.append(work)
            rows += work.n
        if lane is Lane.LONG:
            self._virtual_s = max(self._virtual_s, chosen[0].account.virtual_s)
        for work in chosen:
            self._remove(work)
        if waited:
            for work in chosen:
                self._waited[work] = max(0.0, self._waited[work] + waited)
        return Run(point, chosen, one_layer)

    def _earned(self, point: Point, place: Place, cohorts: Sequence[Cohort]) -> float:
        """Seconds a pass that the wait at a place has won already, up to the next stop."""
        lane = lane_of(point.way)
        cost, layers, held = self.costs[lane], place.layers / max(1, place.stops), place.held_rows
        others = layers * sum(cohort.seconds for cohort in cohorts if cohort.point != point)
        alone, beside = layers * cost.seconds(held), layers * cost.seconds(place.rows - held)
        gain = _gain(alone, beside, layers * cost.seconds(place.rows), others, self._answer_s.get(lane, 0.0))
        return max(0.0, gain) * sum(cohort.rows for cohort in cohorts) / place.rows

    def _company(self, point: Point, cohorts: Sequence[Cohort], now: float) -> float | None:
        """Until when the passes at `point` should wait for others; None to go at once."""
        lane = lane_of(point.way)
        place, cost = self._places[lane][point], self.costs[lane]
        rows = place.rows
        if rows >= MAX_ROWS[lane]:
            return None
        stops = max(1, place.stops)
        layers = place.layers / stops  # to the next stop
        alone, answer_s = layers * cost.seconds(rows), self._answer_s.get(lane, 0.0)
        others = layers * sum(cohort.seconds for cohort in cohorts if cohort.point != point)
        pause = max(others, answer_s)
        total = sum(cohort.rows for cohort in cohorts)
        spent = max(self._waited[work] for work in place.ready)
        if place.held_since is not None:
            spent += now - place.held_since
        last = now - spent + stops * min(alone + pause, alone * total / rows)  # they save no more than their own time
        awaited = [(flight.expected(now), flight.rows, 0.0) for flight in place.flights]
        awaited += self._followers(point, cohorts, others, answer_s)
        awaited = sorted(one for one in awaited if one[0] <= last)
        joined = sum(more for _, more, _ in awaited)
        for due, more, seconds in reversed(awaited):
            beside, both = layers * cost.seconds(joined), layers * cost.seconds(rows + joined)
            gain = stops * _gain(alone, beside, both, max(0.0, others - layers * seconds), answer_s)
            if (spent + due - now) * rows <= gain * total:
                return due
            joined -= more
        return None

    def _cohorts(self, lane: Lane, now: float) -> list[Cohort]:
        """The passes at each point of a lane that are ready, or will be before long."""
        found = []
        for point, place in self._places[lane].items():
            rows, there, horizon = place.rows, now, now + HORIZON_S
            for flight in place.flights:
                expected = flight.expected(now)
                if expected < horizon:
                    rows, there = rows + flight.rows, max(there, expected)
            if rows:
                one = next(iter(place.ready or next(iter(place.flights)).works))
                found.append(Cohort(point, rows, there, self.costs[lane].seconds(rows), one))
        return found

    def _followers(
        self, point: Point, cohorts: Sequence[Cohort], others: float, answer_s: float
    ) -> Iterator[tuple[float, int, float]]:
        """Cohorts on their way to `point`: when they come, their rows, and the seconds that a layer of theirs takes.

        `others` : seconds of all cohorts but the one at `point`, which waits meanwhile, between two stops.
        """
        for cohort in cohorts:
            place, one = cohort.point, cohort.one
            if place.way is not point.way or place.stage is not Stage.RESUME or isinstance(one, Account):
                continue
            layers, stops = one.layers_left(place), one.stops_left(place)
            if point.stage is Stage.RESUME:
                if not place.layer < point.layer < place.layer + layers:
                    continue
                layers, stops = point.layer - place.layer, stops - one.stops_left(point)
            elif point.stage is not Stage.ENTER:
                continue
            computed = layers * cohort.seconds
            yield cohort.there + max(computed + stops * answer_s, stops * others), cohort.rows, cohort.seconds

    def _place(self, point: Point) -> Place:
        places = self._places[lane_of(point.way)]
        place = places.get(point)
        if place is None:
            place = places[point] = Place(point)
        return place

    def _fly(
        self,
        keys: Sequence[Work | Account],
        works: Sequence[Work],
        takes: Sequence[float | None],
        point: Point,
        now: float,
    ) -> None:
        """Flights of those whose answers take about as long, within a factor of two."""
        for key in keys:
            if key in self._at:
                self._remove(key)
        place = self._place(point)
        alike: dict[int | None, Flight] = {}
        for key, work, seconds in zip(keys, works, takes, strict=True):
            about = None if seconds is None else math.frexp(seconds)[1]
            flight = alike.get(about)
            if flight is None:
                flight = alike[about] = Flight({}, 0, now, now if seconds is not None else math.inf)
                place.flights[flight] = None
            flight.works[key] = work.n
            flight.rows += work.n
            if seconds is not None and now + seconds > flight.due:
                flight.due = now + seconds
            self._at[key], self._flying[key] = place, flight

    def _remove(self, key: Work | Account) -> Flight | None:
        """Take something away from where it is; returns its flight."""
        place = self._at.pop(key, None)
        if place is None:
            return None
        flight = self._flying.pop(key, None)
        if flight is not None:
            flight.rows -= flight.works.pop(key)
            if not flight.works:
                del place.flights[flight]
        elif not isinstance(key, Account):
            del place.ready[key]
            place.rows -= key.n
            if not place.ready:
                place.held_since, place.stops, place.layers = None, math.inf, math.inf
        if not place.ready and not place.flights:
            self._places[lane_of(place.point.way)].pop(place.point, None)
        return flight


def _mean(before: float | None, newest: float) -> float:
    return newest if before is None else before + TURNAROUND_WEIGHT * (newest - before)


def _gain(one: float, other: float, both: float, rest: float, answer_s: float) -> float:
    """Seconds that two batches save between two stops by being one, where `rest` is computed besides.

    Apart, one is computed while the devices of the other work; together, they wait for their devices together.
    """
    apart = max(rest + one + other, answer_s + max(one, other))
    return apart - max(rest + both, answer_s + both)

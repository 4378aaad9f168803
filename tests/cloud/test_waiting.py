"""Who waits for room or memory is served in order and told its true place; memory is never over its budget."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from privatelora.cloud.memory import Memory
from privatelora.cloud.waiting import RETRY_S, Line, Waiter
from privatelora.protocol.errors import AdmissionError, PrivateLoraError

TOTAL, ROOM = 100, 3


@dataclass(eq=False)
class Visitor:
    """One that wants `nbytes`: what it was told, and what became of it."""

    nbytes: int
    places: list[tuple[int, int]] = field(default_factory=list)
    refused: list[PrivateLoraError] = field(default_factory=list)


class MemoryLife(RuleBasedStateMachine):
    """Passes come as `Session._admit` lets them: at once if they fit and nobody waits, else into the line."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory(TOTAL, ROOM)
        self.waiting: dict[Visitor, Waiter] = {}  # in the order in which they came
        self.inside: list[Visitor] = []

    @rule(nbytes=st.integers(1, TOTAL))
    def comes(self, nbytes: int) -> None:
        visitor, memory = Visitor(nbytes), self.memory
        if memory.fits(nbytes) and not len(memory.line):
            self.enters(visitor)
            return
        waiter = Waiter(
            lambda: memory.fits(nbytes),
            lambda: self.enters(visitor),
            visitor.refused.append,
            lambda *place: visitor.places.append(place),
            nbytes,
        )
        if len(self.waiting) == ROOM:
            with pytest.raises(AdmissionError) as refusal:
                memory.line.join(waiter)
            assert refusal.value.retry_after_s == RETRY_S
            assert not visitor.places
        else:
            self.waiting[visitor] = waiter
            memory.line.join(waiter)

    @precondition(lambda self: self.inside)
    @rule(seed=st.integers(0))
    def gives_back(self, seed: int) -> None:
        self.memory.give(self.inside.pop(seed % len(self.inside)).nbytes)

    @precondition(lambda self: self.waiting)
    @rule(seed=st.integers(0))
    def gives_up(self, seed: int) -> None:
        """Its device is gone; who stood behind it may fit at once."""
        visitor = list(self.waiting)[seed % len(self.waiting)]
        waiter = self.waiting.pop(visitor)
        self.memory.line.leave(waiter)
        self.memory.line.leave(waiter)  # once more does no harm

    @precondition(lambda self: self.waiting)
    @rule()
    def all_of_one_session_give_up(self) -> None:
        """None of them is let in on the way."""
        waiters = list(self.waiting.values())
        self.waiting.clear()
        self.memory.line.leave(*waiters)

    @rule()
    def everybody_is_sent_away(self) -> None:
        error = PrivateLoraError("the service stops")
        self.memory.line.dismiss(error)
        assert all(visitor.refused == [error] for visitor in self.waiting)
        self.waiting.clear()

    def enters(self, visitor: Visitor) -> None:
        if visitor in self.waiting:
            assert visitor is next(iter(self.waiting))  # first come, first served
            del self.waiting[visitor]
        assert self.memory.fits(visitor.nbytes)
        self.memory.take(visitor.nbytes)
        self.inside.append(visitor)

    @invariant()
    def budget_is_kept(self) -> None:
        assert self.memory.used_bytes == sum(visitor.nbytes for visitor in self.inside)
        assert 0 <= self.memory.used_bytes <= TOTAL

    @invariant()
    def places_are_true_and_the_room_is_bounded(self) -> None:
        count = len(self.waiting)
        assert len(self.memory.line) == count <= ROOM
        for place, visitor in enumerate(self.waiting, 1):
            assert visitor.places[-1][0] == place
        first = next(iter(self.waiting), None)
        assert self.memory.line.first_bytes() == (first.nbytes if first else 0)

    @invariant()
    def nobody_waits_for_what_is_there(self) -> None:
        if self.waiting:
            assert not self.memory.fits(self.memory.line.first_bytes())

    def teardown(self) -> None:
        while self.inside:
            self.memory.give(self.inside.pop().nbytes)
        assert self.memory.used_bytes == 0
        assert not self.waiting
        assert not len(self.memory.line)


TestMemoryLife = MemoryLife.TestCase
TestMemoryLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_the_first_is_waited_for_also_where_one_further_back_would_fit(fits: list[bool]) -> None:
    entered: list[int] = []
    line = Line("a seat", len(fits))
    for number, fit in enumerate(fits):
        line.join(Waiter(lambda fit=fit: fit, lambda number=number: entered.append(number), entered.append, _ignore))
    line.advance()
    before_the_first_that_does_not_fit = fits.index(False) if False in fits else len(fits)
    assert entered == list(range(before_the_first_that_does_not_fit))
    assert len(line) == len(fits) - len(entered)


def test_a_reminder_tells_everybody_the_place_again() -> None:
    told: list[tuple[int, int, int]] = []
    line = Line("a seat", 3)
    for number in range(3):
        line.join(Waiter(_no, _fail, _fail, lambda place, count, number=number: told.append((number, place, count))))
    told.clear()
    line.remind()
    assert told == [(0, 1, 3), (1, 2, 3), (2, 3, 3)]


def test_who_was_told_a_moment_ago_is_not_reminded(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = 100.0, list[int]()
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    line = Line("a seat", 3)
    for number in range(2):
        line.join(Waiter(_no, _fail, _fail, lambda *place, number=number: told.append(number)))
        now += 6
    told.clear()
    line.remind(10)
    assert told == [0]
    now += 5
    line.remind(10)
    assert told == [0, 1]


def _no() -> bool:
    return False


def _ignore(*place: int) -> None:
    pass


def _fail(*error: object) -> None:
    raise AssertionError(error)

"""Who comes when, and a process for each: devices arrive at random times, stay for a random while, and some are killed.

    plan(...)             `Visit`s, all from a seed: who it is, when it comes and for how long it stays
    Crowd.run(visits)     lets them come, at most `AT_ONCE` at a time, and returns what each found

Processes are forked from this one, which has read torch already and runs no thread.
"""

from __future__ import annotations

import faulthandler
import itertools
import multiprocessing
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import msgspec
from tests.soak import honest, misbehaving
from tests.soak.honest import Findings, Place, References

AT_ONCE = 12  # devices, which two cores bear; more than the service has sessions for, so that some wait in its line
KILLED = "is killed"
KILLED_SHARE = 0.2  # of those that misbehave
PATIENCE_S = 60.0  # for a device whose time is over: it may have to wait in the line, or for an answer
LOOK_S = 0.02


@dataclass(frozen=True)
class Visit:
    """One device.

    at_s, stays_s : from the begin of the crowd; where it misbehaves, how long it stays is its own affair.
    manner : the name of its misbehaviour; empty for an honest one.
    """

    number: int
    at_s: float
    stays_s: float
    manner: str
    placement: str
    seed: int


@dataclass
class Outcome:
    """What came of one visit; `failed` says how its process ended if that was not as it should."""

    visit: Visit
    found: Findings = field(default_factory=Findings)
    failed: str = ""


@dataclass(eq=False)
class Running:
    visit: Visit
    process: BaseProcess
    reports: Connection
    begun: float


def plan(count: int, manners: Sequence[str], seconds: float, seed: int) -> list[Visit]:
    """`count` devices within `seconds`, as many of them misbehaving as there are `manners`."""
    chance = random.Random(seed)
    who = [*manners, *[""] * (count - len(manners))]
    chance.shuffle(who)
    times = sorted(chance.uniform(0, 0.9 * seconds) for _ in who)
    usual = 0.8 * AT_ONCE * seconds / count
    placements = itertools.cycle(honest.PLACEMENTS)
    return [
        Visit(number, at, chance.uniform(0.1, 1.5) * usual, manner, next(placements), chance.randrange(1 << 32))
        for number, (at, manner) in enumerate(zip(times, who, strict=True))
    ]


def draw_manners(count: int, seed: int) -> list[str]:
    """Misbehaviours: a share of killed ones, and each of the other kinds before any comes twice."""
    chance, kinds = random.Random(seed), list(misbehaving.KINDS)
    manners = [KILLED] * round(KILLED_SHARE * count)
    while len(manners) < count:
        chance.shuffle(kinds)
        manners += kinds[: count - len(manners)]
    return manners


class Crowd:
    """Devices of one service."""

    def __init__(self, place: Place, expected: Mapping[str, References], say: Callable[[str], None]) -> None:
        self.place, self.expected, self.say = place, expected, say
        self._context = multiprocessing.get_context("fork")

    def run(self, visits: Sequence[Visit]) -> list[Outcome]:
        """All of them, until the last has left."""
        begun, coming = time.monotonic(), list(visits)
        running: list[Running] = []
        outcomes: list[Outcome] = []
        try:
            while coming or running:
                now = time.monotonic() - begun
                while coming and coming[0].at_s <= now and len(running) < AT_ONCE:
                    running.append(self._start(coming.pop(0)))
                wait([one.process.sentinel for one in running], LOOK_S)  # which sleeps where it waits for nobody
                for one in list(running):
                    if one.process.is_alive():
                        self._watch(one)
                    else:
                        running.remove(one)
                        outcomes.append(self._outcome(one))
                        if len(outcomes) % 50 == 0:
                            self.say(f"{len(outcomes)} of {len(visits)} devices have been there")
        finally:
            for one in running:
                one.process.kill()
                one.process.join()
        return outcomes

    def _start(self, visit: Visit) -> Running:
        reads, writes = self._context.Pipe(duplex=False)
        process = self._context.Process(target=self._be, args=(visit, writes))
        process.start()
        writes.close()
        return Running(visit, process, reads, time.monotonic())

    def _be(self, visit: Visit, reports: Connection) -> None:
        """In a process of its own: be the device, and report."""
        faulthandler.dump_traceback_later(visit.stays_s + 0.8 * PATIENCE_S)  # where it hangs, before it is killed
        if visit.manner in misbehaving.KINDS:
            found = misbehaving.misbehave(self.place, visit.manner, visit.seed)
        else:
            seconds = visit.stays_s if not visit.manner else PATIENCE_S
            found = honest.live(self.place, visit.placement, self.expected[visit.placement], seconds, visit.seed)
        reports.send_bytes(msgspec.json.encode(found))

    def _watch(self, one: Running) -> None:
        """Kill who is to be killed, and who has been there for too long."""
        age = time.monotonic() - one.begun
        if age > (one.visit.stays_s if one.visit.manner == KILLED else one.visit.stays_s + PATIENCE_S):
            one.process.kill()

    def _outcome(self, one: Running) -> Outcome:
        one.process.join()
        outcome = Outcome(one.visit)
        try:
            outcome.found = msgspec.json.decode(one.reports.recv_bytes(), type=Findings)
        except EOFError:
            if one.visit.manner != KILLED:
                outcome.failed = f"its process ended with {one.process.exitcode}"
        one.reports.close()
        one.process.close()
        return outcome

"""The states of a job: whatever holders do and whenever they die, each job ends once and a late holder is refused."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from privatelora.platform.audit import SERVICE, Actor
from privatelora.platform.database import Database
from privatelora.platform.jobs import kinds, machine
from privatelora.platform.jobs.machine import JobConflictError, NoSuchJobError
from privatelora.platform.tables import FINAL, AuditEntry, Device, Job, JobState, User, new_id, utc_now
from privatelora.protocol.errors import ConfigurationError, ProtocolError
from privatelora.protocol.jobs import JobKind, checked_report

LEASE_S = 60.0
KINDS = ("on-device", "on-worker")


class Params(msgspec.Struct, forbid_unknown_fields=True):
    epochs: int = 1


class Report(msgspec.Struct, forbid_unknown_fields=True):
    loss: float


@pytest.fixture(autouse=True)
def two_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind of devices and a kind of workers, besides those that there are."""
    known = dict(kinds.kinds())
    for name in KINDS:
        kind = JobKind(name, Params, Report)
        known[name] = kinds.Registered(kind, kinds, name == "on-device")
    monkeypatch.setattr(kinds, "kinds", lambda: known)


@pytest.fixture
def device(database: Database) -> Device:
    with database.write() as session:
        user = User(id=new_id("usr"), name="alice")
        session.add(user)
        session.flush()
        row = Device(id=new_id("dev"), user_id=user.id, installation="0" * 32, allows=["on-device"])
        session.add(row)
    return row


@pytest.fixture
def queued(database: Database, device: Device) -> Iterator[Job]:
    with database.write() as session:
        job = machine.queue(session, SERVICE, "on-device", {}, device=device)
    assert job is not None
    yield job


def offered(database: Database, device: Device, now: datetime | None = None) -> list[Job]:
    with database.write() as session:
        return machine.offers(session, device, now or utc_now(), LEASE_S)


def run(database: Database, step: Any, *args: Any) -> Job:
    with database.write() as session:
        job: Job = step(session, *args)
        return job


def test_a_job_goes_from_offer_to_report_once(database: Database, device: Device, queued: Job) -> None:
    (offer,) = offered(database, device)
    assert (offer.id, offer.state, offer.fence) == (queued.id, JobState.OFFERED, 1)
    held = (queued.id, device.id, 1)
    run(database, machine.accept, *held, utc_now(), LEASE_S)
    run(database, machine.start, *held, utc_now(), LEASE_S)
    for _ in range(2):  # a report whose answer was lost is sent again
        done = run(database, machine.finish, *held, {"loss": 0.5})
    assert (done.state, done.result, done.attempts) == (JobState.DONE, {"loss": 0.5}, 1)
    with pytest.raises(JobConflictError, match="another report"):
        run(database, machine.finish, *held, {"loss": 0.1})
    with pytest.raises(JobConflictError, match="done already"):
        run(database, machine.cancel, Actor(), queued.id)


def test_nothing_is_offered_that_the_policy_does_not_allow(database: Database, device: Device, queued: Job) -> None:
    offered(database, device)
    with database.write() as session:
        session.get_one(Device, device.id).allows = ["evaluate"]
    with database.read() as session:
        assert offered(database, session.get_one(Device, device.id)) == []


def test_an_offer_that_nobody_answers_is_offered_again_under_the_next_fence(
    database: Database, device: Device, queued: Job
) -> None:
    now = utc_now()
    fences = [job.fence for late_s in (0, 30, 61) for job in offered(database, device, now + timedelta(seconds=late_s))]
    assert fences == [1, 1, 2]
    with pytest.raises(JobConflictError, match="another holder"):
        run(database, machine.accept, queued.id, device.id, 1, now, LEASE_S)


def test_a_late_holder_is_refused_and_the_next_one_is_not(database: Database, device: Device, queued: Job) -> None:
    now = utc_now()
    offered(database, device, now)
    run(database, machine.accept, queued.id, device.id, 1, now, LEASE_S)
    run(database, machine.start, queued.id, device.id, 1, now, LEASE_S)
    later = now + timedelta(seconds=2 * LEASE_S)
    with database.write() as session:
        assert machine.sweep(session, later).put_back == [queued.id]
    much_later = later + timedelta(hours=1)
    (again,) = offered(database, device, much_later)
    assert again.fence == 2
    for step in (machine.finish, machine.fail):
        more = ({"loss": 1.0},) if step is machine.finish else ("late", True)
        with pytest.raises(JobConflictError, match="another holder"):
            run(database, step, queued.id, device.id, 1, *more)
    with pytest.raises(NoSuchJobError):
        run(database, machine.accept, queued.id, "dev_another", 2, now, LEASE_S)
    run(database, machine.accept, queued.id, device.id, 2, much_later, LEASE_S)


def test_what_is_no_report_of_numbers_is_refused(database: Database, device: Device, queued: Job) -> None:
    offered(database, device)
    held = (queued.id, device.id, 1)
    run(database, machine.accept, *held, utc_now(), LEASE_S)
    run(database, machine.start, *held, utc_now(), LEASE_S)
    reports: list[dict[str, Any]] = [
        {"loss": "0.5"}, {"loss": float("nan")}, {"loss": [0.5]}, {"loss": 0.5, "text": 1.0}, {}, {"loss": True},
        {f"n{i}": 1.0 for i in range(33)},
    ]  # fmt: skip
    for report in reports:
        with pytest.raises(ProtocolError):
            run(database, machine.finish, *held, report)
    assert run(database, machine.finish, *held, {"loss": 0.5}).state == JobState.DONE


def test_a_deadline_expires_a_job_and_its_holder_hears_of_it(database: Database, device: Device) -> None:
    now = utc_now()
    with database.write() as session:
        job = machine.queue(session, SERVICE, "on-device", {}, device=device, deadline=now + timedelta(seconds=5))
    assert job is not None
    offered(database, device)
    run(database, machine.accept, job.id, device.id, 1, now, LEASE_S)
    with database.write() as session:
        assert machine.sweep(session, now + timedelta(seconds=6)).ended == [job.id]
    with pytest.raises(JobConflictError, match="expired"):
        run(database, machine.beat, job.id, device.id, 1, now, LEASE_S)


def test_the_most_urgent_is_offered_first_and_dedupe_queues_once(database: Database, device: Device) -> None:
    with database.write() as session:
        jobs = [machine.queue(session, SERVICE, "on-device", {}, device=device, priority=p) for p in (0, 9, 5)]
        assert machine.queue(session, SERVICE, "on-device", {}, device=device, dedupe="x") is not None
        assert machine.queue(session, SERVICE, "on-device", {}, device=device, dedupe="x") is None
    assert [job.priority for job in offered(database, device)] == [9, 5, 0, 0]
    assert all(job is not None for job in jobs)


def test_what_people_do_is_in_the_audit_log(database: Database, device: Device) -> None:
    operator = Actor(user="usr_operator", key="key_operator")
    with database.write() as session:
        job = machine.queue(session, operator, "on-device", {"epochs": 2}, device=device)
        assert job is not None
        machine.cancel(session, operator, job.id)
    with database.read() as session:
        entries = session.query(AuditEntry).order_by(AuditEntry.id).all()
    assert [(entry.action, entry.object_id, entry.user_id) for entry in entries] == [
        ("job.queued", job.id, "usr_operator"),
        ("job.cancelled", job.id, "usr_operator"),
    ]


@pytest.mark.parametrize(
    ("kind", "params", "on", "reason"),
    [
        ("nonsense", {}, True, "no kind of job 'nonsense'; use one of .*on-device"),
        ("on-device", {"epochs": "many"}, True, "epochs"),
        ("on-device", {"text": "x"}, True, "text"),
        ("on-device", {}, False, "runs on a device"),
        ("on-worker", {}, True, "runs on a worker"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused_with_the_reason(
    database: Database, device: Device, kind: str, params: dict[str, Any], on: bool, reason: str
) -> None:
    with pytest.raises(ConfigurationError, match=reason), database.write() as session:
        machine.queue(session, SERVICE, kind, params, device=device if on else None)


def test_workers_that_look_at_once_take_each_job_once_and_the_most_urgent_first(database: Database) -> None:
    with database.write() as session:
        queued = [machine.queue(session, SERVICE, "on-worker", {}, priority=urgency % 5) for urgency in range(20)]
    urgency = {job.id: job.priority for job in queued if job is not None}

    def worker(name: str) -> list[str]:
        taken = []
        while (job := run(database, machine.take, name, utc_now(), LEASE_S)) is not None:
            taken.append(job.id)
        return taken

    with ThreadPoolExecutor(4) as pool:
        of_each = list(pool.map(worker, "abcd"))
    assert sorted(job_id for taken in of_each for job_id in taken) == sorted(urgency)
    for taken in of_each:
        assert [urgency[job_id] for job_id in taken] == sorted((urgency[job_id] for job_id in taken), reverse=True)


def test_a_report_that_is_told_twice_at_once_is_kept_once_and_answered_alike(database: Database) -> None:
    with database.write() as session:
        assert machine.queue(session, SERVICE, "on-worker", {}) is not None
    job = run(database, machine.take, "worker", utc_now(), LEASE_S)
    with ThreadPoolExecutor(4) as pool:
        told = [pool.submit(run, database, machine.finish, job.id, "worker", 1, {"loss": 0.5}) for _ in range(8)]
    assert [one.result().state for one in told] == [JobState.DONE] * 8


def test_a_worker_that_stops_gives_its_job_back_as_it_was(database: Database) -> None:
    with database.write() as session:
        assert machine.queue(session, SERVICE, "on-worker", {}, max_attempts=1) is not None
    job = run(database, machine.take, "worker", utc_now(), LEASE_S)
    run(database, machine.give_back, job.id, "worker", 1)
    again = run(database, machine.take, "another", utc_now(), LEASE_S)
    assert (again.id, again.attempts, again.fence) == (job.id, 1, 2)


STEPS = ("accept", "start", "finish", "fail", "beat", "refuse", "give back")  # that only a holder may do
ACTIONS = (*STEPS, "take", "take", "offer", "offer", "cancel", "sweep")
Turn = tuple[str, int, int]  # what is done, by which of the holders so far, and how many seconds pass before
turns = st.lists(
    st.tuples(st.sampled_from(ACTIONS), st.integers(0, 10**6), st.sampled_from((0, 1, 30, 61, 4000))),
    min_size=30,
    max_size=80,
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns)
def test_every_job_ends_exactly_once_whatever_holders_do(database: Database, device: Device, turns: list[Turn]) -> None:
    """Holders claim, report, fail, fall silent, and speak late; a clock of its own passes over leases and backoffs."""
    now = utc_now()
    with database.write() as session:
        jobs = [machine.queue(session, SERVICE, "on-worker", {}, max_attempts=2) for _ in range(2)]
        jobs += [machine.queue(session, SERVICE, "on-device", {}, device=device) for _ in range(2)]
        late = now + timedelta(seconds=5000)
        jobs.append(machine.queue(session, SERVICE, "on-worker", {}, deadline=late, run_at=now))
    ids = [job.id for job in jobs if job is not None]
    holders = [(ids[0], "nobody", 0)]  # everyone who ever held one, most of them silent or late by now
    before = dict.fromkeys(ids, Job(state=JobState.QUEUED, fence=0, attempts=0))
    for action, chosen, passed_s in [*turns, *[("take", 0, 4000), ("sweep", 0, 4000)] * 8]:
        now += timedelta(seconds=passed_s)
        job_id, name, fence = holders[chosen % len(holders)]
        with database.write() as session, suppress(JobConflictError, NoSuchJobError):
            if action == "take":
                job = machine.take(session, f"worker-{len(holders)}", now, LEASE_S)
                holders += [(job.id, str(job.holder), job.fence)] if job is not None else []
            elif action == "offer":
                holders += [(job.id, device.id, job.fence) for job in machine.offers(session, device, now, LEASE_S)]
            elif action in ("accept", "start", "beat"):
                getattr(machine, action)(session, job_id, name, fence, now, LEASE_S)
            elif action == "finish":
                machine.finish(session, job_id, name, fence, {"loss": float(fence)})
            elif action == "fail":
                machine.fail(session, job_id, name, fence, "it failed", chosen % 3 > 0)
            elif action == "refuse":
                machine.refuse(session, job_id, name, fence, "no")
            elif action == "give back" and name != device.id:
                machine.give_back(session, job_id, name, fence)
            elif action == "cancel" and chosen % 5 == 0:
                machine.cancel(session, SERVICE, job_id)
            elif action == "sweep":
                machine.sweep(session, now)
        with database.read() as session:
            after = {job.id: job for job in session.scalars(select(Job).where(Job.id.in_(ids)))}
        for one, is_now in after.items():
            was = before[one]
            assert is_now.fence - was.fence in (0, 1)
            if one == job_id and action in STEPS and (name, fence) != (was.holder, was.fence):
                assert is_now.state == was.state  # a late holder changes nothing
                assert (is_now.lease_until, is_now.attempts) == (was.lease_until, was.attempts)
            assert 0 <= is_now.attempts <= is_now.max_attempts
            if was.state in FINAL:  # what ended stays as it ended
                assert (is_now.state, is_now.fence, is_now.result) == (was.state, was.fence, was.result)
            if is_now.state == JobState.DONE:  # by its newest holder, nobody else
                assert is_now.result == {"loss": float(is_now.fence)}
            assert (is_now.lease_until is not None) == (is_now.state in machine.HELD)
        before = after
    of_workers = [job for job in after.values() if job.device_id is None]
    assert all(job.state in FINAL for job in of_workers), [job.state for job in of_workers]


def test_a_report_is_checked_the_same_way_on_both_ends() -> None:
    kind = JobKind("x", Params, Report)
    assert checked_report(kind, {"loss": 1}) == {"loss": 1.0}
    with pytest.raises(ValueError, match="must forbid unknown fields"):
        JobKind("y", Params, msgspec.defstruct("Loose", [("loss", float)]))

"""The states of a job: whatever holders do and whenever they die, each job ends once and a late holder is refused."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import msgspec
import pytest

from privatelora.platform.audit import SERVICE, Actor
from privatelora.platform.database import Database
from privatelora.platform.jobs import kinds, machine
from privatelora.platform.jobs.machine import JobConflictError, NoSuchJobError
from privatelora.platform.tables import FINAL, AuditEntry, Device, Job, JobState, User, new_id, utc_now
from privatelora.protocol.errors import ConfigurationError, PrivateLoraError, ProtocolError
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
    with database.write() as session:
        session.get_one(Device, device.id).allows = ["evaluate"]
    with database.read() as session:
        assert offered(database, session.get_one(Device, device.id)) == []


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


@pytest.mark.parametrize("seed", range(4))
def test_every_job_ends_exactly_once_whatever_holders_do(database: Database, device: Device, seed: int) -> None:
    """Holders claim, report, fail, fall silent, and speak late; a clock of its own passes over leases and backoffs."""
    chance, now = random.Random(seed), utc_now()
    with database.write() as session:
        jobs = [machine.queue(session, SERVICE, "on-worker", {}, max_attempts=3) for _ in range(5)]
    ids = [job.id for job in jobs if job is not None]
    holders: list[tuple[str, str, int]] = []  # everyone who ever held one, most of them dead or late
    ended: dict[str, int] = dict.fromkeys(ids, 0)
    for turn in range(400):
        now += timedelta(seconds=chance.choice([0, 1, 30, 4000]))
        name, action = f"worker-{turn}", chance.choice(["claim", "claim", "finish", "fail", "beat", "sweep"])
        with database.write() as session:
            before = {job_id: session.get_one(Job, job_id).state for job_id in ids}
            with suppress(PrivateLoraError):
                if action == "claim":
                    job = machine.claim(session, chance.choice(ids), name, now, LEASE_S)
                    if job is not None:
                        holders.append((job.id, name, job.fence))
                elif action == "sweep":
                    machine.sweep(session, now)
                elif holders:
                    job_id, name, fence = chance.choice(holders)
                    if action == "finish":
                        machine.finish(session, job_id, name, fence, {"loss": float(fence)})
                    elif action == "fail":
                        machine.fail(session, job_id, name, fence, "it failed", chance.random() < 0.7)
                    else:
                        machine.beat(session, job_id, name, fence, now, LEASE_S)
            session.expire_all()
            for job_id in ids:
                after = session.get_one(Job, job_id)
                if before[job_id] in FINAL:
                    assert after.state == before[job_id]
                elif after.state in FINAL:
                    ended[job_id] += 1
                    if after.state == JobState.DONE:
                        assert after.result == {"loss": float(after.fence)}  # of the newest holder, nobody else's
    with database.read() as session:
        left = {job.id for job in session.query(Job) if job.state not in FINAL}
    assert all(count == 1 for job_id, count in ended.items() if job_id not in left)
    assert sum(ended.values()) >= 3


def test_a_report_is_checked_the_same_way_on_both_ends() -> None:
    kind = JobKind("x", Params, Report)
    assert checked_report(kind, {"loss": 1}) == {"loss": 1.0}
    with pytest.raises(ValueError, match="must forbid unknown fields"):
        JobKind("y", Params, msgspec.defstruct("Loose", [("loss", float)]))

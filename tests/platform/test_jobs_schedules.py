"""Jobs by the clock: beat's rows follow ours, and a schedule's time queues its jobs once, however often beat ticks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy_celery_beat.models import PeriodicTask
from tests.support.servers import ValkeyServer

from privatelora.platform import schedules
from privatelora.platform.audit import Actor
from privatelora.platform.database import Database
from privatelora.platform.jobs.runner import Services
from privatelora.platform.queue import PatientScheduler, celery_app
from privatelora.platform.settings import Settings
from privatelora.platform.tables import AuditEntry, Device, Job, Schedule, User, new_id, utc_now
from privatelora.platform.valkey import connect
from privatelora.protocol.errors import ConfigurationError

OPERATOR = Actor(user="usr_operator", key="key_operator")
MINUTE = timedelta(minutes=1)


def made(database: Database, **more: Any) -> Schedule:
    """A schedule of every minute."""
    given = {"name": "mine", "kind": "usage-rollup", "cron": "* * * * *", "params": {}, "target": {}} | more
    with database.write() as session:
        return schedules.create(session, OPERATOR, **given)


def fired(database: Database, row: Schedule, now: datetime) -> list[Job]:
    with database.write() as session:
        return schedules.fire(session, row.id, now)


def changed(database: Database, row: Schedule, **changes: Any) -> None:
    with database.write() as session:
        schedules.change(session, OPERATOR, session.get_one(Schedule, row.id), changes)


def beat_has(database: Database) -> dict[str, tuple[str, bool, str | None]]:
    """What Celery beat reads: task, whether enabled, and when."""
    with database.read() as session:
        rows = session.scalars(select(PeriodicTask)).all()
        return {row.name: (row.task, row.enabled, str(row.schedule_model)) for row in rows}


def test_beats_row_follows_the_schedule_in_the_same_transaction(database: Database) -> None:
    row = made(database, cron="30 2 * * 1-5", timezone="Europe/Zurich")
    name = f"schedule:{row.id}"
    assert beat_has(database) == {name: (schedules.FIRE, True, "30 2 * * 1-5 (m/h/dM/MY/d) Europe/Zurich")}
    changed(database, row, cron="0 4 * * *", enabled=False)
    assert beat_has(database) == {name: (schedules.FIRE, False, "0 4 * * * (m/h/dM/MY/d) Europe/Zurich")}
    with pytest.raises(RuntimeError, match="undone"), database.write() as session:
        schedules.delete(session, OPERATOR, session.get_one(Schedule, row.id))
        raise RuntimeError("undone")
    assert name in beat_has(database)
    with database.write() as session:
        schedules.delete(session, OPERATOR, session.get_one(Schedule, row.id))
    assert beat_has(database) == {}
    with database.read() as session:
        told = session.scalars(select(AuditEntry).order_by(AuditEntry.id)).all()
    assert [(entry.action, entry.user_id) for entry in told] == [
        ("schedule.created", "usr_operator"),
        ("schedule.changed", "usr_operator"),
        ("schedule.deleted", "usr_operator"),
    ]


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """A database that nothing is written to."""
    with closing(Database(f"sqlite:///{tmp_path_factory.mktemp('refusing')}/control.db")) as database:
        database.upgrade()
        yield database


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"cron": "every night"}, "cron 'every night' has 2 fields; write five"),
        ({"cron": "61 * * * *"}, "cron '61 .*' cannot be read"),
        ({"cron": "* * * * mun"}, "cron .* cannot be read"),
        ({"cron": "*/0 * * * *"}, "cron .* cannot be read"),
        ({"cron": "0 0 30 2 *"}, "does not come within five years"),  # it would end Celery's beat
        ({"timezone": "Europe/Gotham"}, "timezone 'Europe/Gotham' is not known"),
        ({"timezone": "../../etc/passwd"}, "timezone .* is not known"),
        ({"timezone": "Europe"}, "timezone 'Europe' is not known"),
        ({"target": {"all": True}}, "usage-rollup runs on a worker"),
        ({"params": {"days": 0}}, "days"),
        ({"kind": "nonsense"}, "no kind of job 'nonsense'"),
        ({"kind": "evaluate"}, "target must have one of all, plan, team, user, device"),
        ({"kind": "evaluate", "target": {"all": False}}, "target all must be true"),
        ({"kind": "evaluate", "target": {"plan": "a", "team": "b"}}, "target must have one of"),
        ({"kind": "evaluate", "target": {"user": 7}}, "target user must be a name or an id"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_with_the_reason(
    refusing: Database, given: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        made(refusing, **given)
    assert beat_has(refusing) == {}


def test_ticks_that_come_twice_early_late_or_together_queue_one_job(database: Database) -> None:
    row = made(database)
    now = row.created_at
    assert fired(database, row, now) == []  # its first minute has not come
    now += MINUTE
    with ThreadPoolExecutor(4) as pool:
        each = list(pool.map(lambda _: fired(database, row, now), range(6)))
    assert sum(map(len, each)) == 1
    now += 10 * MINUTE  # everything was down: what was missed is done once
    assert len(fired(database, row, now)) == 1
    assert fired(database, row, now) == []


def test_what_beat_missed_is_found_by_a_sweep_and_what_was_disabled_is_not_made_up_for(database: Database) -> None:
    row = made(database)
    later = row.created_at + MINUTE
    with database.read() as session:
        assert schedules.due(session, row.created_at) == []
        assert schedules.due(session, later) == [row.id]
    changed(database, row, enabled=False)
    with database.read() as session:
        assert schedules.due(session, later) == []
    assert fired(database, row, later) == []
    year_ago = utc_now() - timedelta(days=365)
    with database.write() as session:
        session.get_one(Schedule, row.id).created_at = year_ago
        task = session.scalars(select(PeriodicTask)).one()
        task.start_time = task.last_run_at = year_ago
    before = utc_now()
    changed(database, row, enabled=True)
    with database.read() as session:
        assert schedules.due(session, before) == []
        task = session.scalars(select(PeriodicTask)).one()
    assert task.last_run_at.replace(tzinfo=UTC) >= before  # else beat would fire at once, for a time that is past


def test_a_device_kind_is_queued_for_each_device_of_the_target_whose_policy_allows_it(database: Database) -> None:
    devices = {}
    with database.write() as session:
        for name, plan, team in (("ann", "pro", "red"), ("bob", "pro", None), ("cyd", "free", "red")):
            user = User(id=new_id("usr"), name=name, plan=plan, team=team)
            session.add(user)
            session.flush()
            for at, allows in enumerate((["evaluate"], ["finetune-round"])):
                device = Device(id=new_id("dev"), user_id=user.id, installation=f"{name}{at}", allows=allows)
                session.add(device)
                devices[f"{name}{at}"] = device
        session.add(User(id=new_id("usr"), name="gone", plan="pro", disabled_at=utc_now()))
    of = {
        "all": (True, ["ann0", "bob0", "cyd0"]),
        "plan": ("pro", ["ann0", "bob0"]),
        "team": ("red", ["ann0", "cyd0"]),
        "user": (devices["bob0"].user_id, ["bob0"]),
        "device": (devices["cyd0"].id, ["cyd0"]),
    }
    for target, (value, expected) in of.items():
        row = made(database, name=target, kind="evaluate", target={target: value}, priority=3, deadline_s=60)
        now = row.created_at + MINUTE
        jobs = fired(database, row, now)
        assert sorted(str(job.device_id) for job in jobs) == sorted(devices[name].id for name in expected)
        assert {(job.schedule_id, job.priority, job.deadline) for job in jobs} == {(row.id, 3, now + MINUTE)}
        assert fired(database, row, now) == []


def test_beat_does_not_ask_without_end_in_the_moment_before_a_time(
    database: Database, valkey: ValkeyServer, tmp_path: Path
) -> None:
    with database.write() as session:
        schedules.ensure_defaults(session)
    url = database.engine.url.render_as_string(hide_password=False)
    settings = Settings(database_url=url, valkey_url=valkey.url, data_dir=tmp_path)
    services = Services(settings, database, connect(valkey.url), "beat")
    app = celery_app(settings, services)
    scheduler = PatientScheduler(app=app, max_interval=2)
    asked, sent, until = 0, 0, time.monotonic() + 2.5 * schedules.SWEEP_S
    while time.monotonic() < until:
        time.sleep(max(0.0, scheduler.tick()))
        asked, sent = asked + 1, sent + scheduler.sent
    assert sent >= 2
    assert asked < 10 * sent + 20  # it was a hundred and more for each
    scheduler.close()  # writes its notes
    app.close()
    services.valkey.close()


def test_what_every_service_does_is_made_once_and_stays_as_operators_leave_it(database: Database) -> None:
    for _ in range(2):
        with database.write() as session:
            schedules.ensure_defaults(session)
            named = {row.name: row for row in session.scalars(select(Schedule))}
            assert sorted(named) == ["retention", "session-reaper", "usage-rollup"]
    assert len(beat_has(database)) == 4
    assert beat_has(database)[schedules.SWEEP_ROW][0] == schedules.SWEEP
    with database.write() as session:
        schedules.delete(session, OPERATOR, session.get_one(Schedule, named["retention"].id))
    changed(database, named["usage-rollup"], name="sums")
    with database.write() as session:
        schedules.ensure_defaults(session)
        assert sorted(session.scalars(select(Schedule.name))) == ["session-reaper", "sums"]


@pytest.mark.parametrize(
    ("cron", "timezone", "after", "following"),
    [
        ("0 2 * * *", "UTC", "2026-11-26 02:00", "2026-11-27 02:00"),
        ("0 2 * * *", "Europe/Zurich", "2026-11-26 00:59", "2026-11-26 01:00"),
        ("*/20 * * * *", "UTC", "2026-12-31 23:41", "2027-01-01 00:00"),
        ("0 0 29 2 *", "UTC", "2026-11-26 00:00", "2028-02-29 00:00"),
        ("0 0 1 * 1", "UTC", "2026-11-26 00:00", "2027-02-01 00:00"),  # a first that is a Monday
        ("30 2 * * *", "Europe/Zurich", "2027-03-28 00:00", "2027-03-28 01:30"),  # 2:30 is not there; 3:30 is
        ("30 2 * * *", "Europe/Zurich", "2027-10-31 00:30", "2027-11-01 01:30"),  # 2:30 is there twice, and done once
    ],
)
def test_the_next_time_of_a_line_of_cron(cron: str, timezone: str, after: str, following: str) -> None:
    found = schedules.next_time(cron, timezone, datetime.fromisoformat(after).replace(tzinfo=UTC))
    assert found is not None
    assert f"{found:%Y-%m-%d %H:%M}" == following

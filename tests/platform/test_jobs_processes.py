"""A real worker and a real beat: killed in the middle of jobs, started again, left by their broker, told to stop."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from redis import Redis
from sqlalchemy import select
from sqlalchemy_celery_beat.models import PeriodicTask
from tests.support.servers import ValkeyServer, valkey_server
from tests.support.service import ServiceProcess

from privatelora.platform import schedules, valkey
from privatelora.platform.audit import SERVICE
from privatelora.platform.database import Database
from privatelora.platform.jobs import machine
from privatelora.platform.jobs.runner import CONCURRENCY
from privatelora.platform.queue import QUEUE, waker
from privatelora.platform.settings import load_settings
from privatelora.platform.tables import FINAL, Job, JobState, Schedule, utc_now

COMMAND = ("privatelora.platform",)


class Receiver:
    """Takes webhooks and answers them once it is told to."""

    def __init__(self) -> None:
        told, go = self.told, self.go = list[str](), threading.Event()
        go.set()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["job"])
                go.wait(20)
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                return None

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Plane:
    """A database in a file, a Valkey, a worker and a beat."""

    def __init__(self, folder: Path, broker: ValkeyServer) -> None:
        self.folder, self.broker, self.receiver = folder, broker, Receiver()
        self.database = Database(f"sqlite:///{folder}/control.db")
        self.database.upgrade()
        self.environment = {
            "PRIVATELORA_DATABASE_URL": f"sqlite:///{folder}/control.db",
            "PRIVATELORA_VALKEY_URL": broker.url,
            "PRIVATELORA_JOB_LEASE_S": "1.5",
            "PRIVATELORA_LOG_FORMAT": "json",
        }
        self.wake = waker(load_settings({"valkey_url": broker.url}))
        self.worker = self._process("worker")
        self.beat = self._process("beat")

    def _process(self, name: str) -> ServiceProcess:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("PRIVATELORA_")}
        environment = inherited | self.environment
        log = self.folder / f"{name}.log"
        return ServiceProcess(COMMAND, (name, "--json"), environment, log, takes_port=False)

    def queue(self, count: int, told: bool = True) -> list[str]:
        """Jobs for workers, who are woken if they are to be `told`."""
        with self.database.write() as session:
            jobs = [machine.queue(session, SERVICE, "webhook", {"url": self.receiver.url}) for _ in range(count)]
        ids = [job.id for job in jobs if job is not None]
        for job_id in ids * told:
            self.wake(job_id)
        return ids

    def jobs(self, ids: list[str]) -> list[Job]:
        with self.database.read() as session:
            return list(session.scalars(select(Job).where(Job.id.in_(ids))))

    def wait_for(self, ids: list[str]) -> None:
        until(lambda: all(job.state in FINAL for job in self.jobs(ids)))

    def close(self) -> None:
        for process in (self.worker, self.beat):
            process.stop()
        self.receiver.server.shutdown()
        self.receiver.server.server_close()
        self.database.close()


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    with valkey_server() as broker, closing(Plane(tmp_path_factory.mktemp("jobs"), broker)) as running:
        running.beat.start()
        running.worker.start()
        yield running


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_that_is_killed_in_the_middle_of_jobs_has_each_done_once(plane: Plane) -> None:
    plane.receiver.go.clear()
    ids = plane.queue(CONCURRENCY + 2)
    until(lambda: len(plane.receiver.told) == CONCURRENCY)
    plane.worker.kill()
    held = [job.id for job in plane.jobs(ids) if job.state == JobState.RUNNING]
    plane.receiver.go.set()
    plane.worker.start()
    until(lambda: all(job.state != JobState.RUNNING or job.fence == 2 for job in plane.jobs(held)))
    with plane.database.write() as session:  # what was put back need not sit out its backoff here
        for job in session.scalars(select(Job).where(Job.id.in_(held), Job.state == JobState.QUEUED)):
            job.run_at = utc_now()
    plane.wait_for(ids)
    assert len(held) == CONCURRENCY
    assert {(job.id in held, job.state, job.attempts, job.fence) for job in plane.jobs(ids)} == {
        (True, "done", 2, 2),
        (False, "done", 1, 1),
    }
    assert sorted(plane.receiver.told) == sorted([*ids, *held])  # done, told of, or both; kept once


def test_jobs_and_schedules_go_on_without_a_beat_and_without_a_broker(plane: Plane) -> None:
    plane.beat.kill()
    plane.receiver.go.clear()
    ids = plane.queue(CONCURRENCY)
    until(lambda: set(ids) <= set(plane.receiver.told))
    plane.broker.kill()
    plane.receiver.go.set()
    ids += plane.queue(8, told=False)
    with plane.database.write() as session:
        row = schedules.create(
            session, SERVICE, name="missed", kind="usage-rollup", cron="* * * * *", params={}, target={}
        )
        task = session.scalars(select(PeriodicTask).where(PeriodicTask.name == f"schedule:{row.id}")).one()
        task.start_time = row.created_at.replace(year=row.created_at.year - 1)
    plane.wait_for(ids)
    until(lambda: bool(_of_schedule(plane, row.id)) and _of_schedule(plane, row.id)[0].state == JobState.DONE)
    plane.broker.start()
    plane.beat.start()
    ids += plane.queue(8)
    plane.wait_for(ids)
    assert {(job.state, job.attempts) for job in plane.jobs(ids)} == {("done", 1)}
    with plane.database.write() as session:
        schedules.change(session, SERVICE, session.get_one(Schedule, row.id), {"enabled": False})


def test_a_worker_that_found_its_broker_again_hears_of_a_new_job_from_it(plane: Plane) -> None:
    """Many messages are under way as the broker dies: their acknowledgements are lost, and it must read on after."""
    with closing(valkey.connect(plane.broker.url)) as client:
        for _ in range(3):
            for _ in range(100):
                plane.wake("job_of_nobody")
            plane.broker.kill()
            plane.broker.start()
        plane.wake("job_of_nobody")
        until(lambda: client.llen(QUEUE) == 0)


def test_both_stop_at_sigterm_and_beat_sends_what_was_changed_under_it(plane: Plane) -> None:
    plane.worker.process.send_signal(signal.SIGTERM)
    assert plane.worker.process.wait(30) == 0
    with plane.database.write() as session:
        row = schedules.create(
            session, SERVICE, name="new", kind="usage-rollup", cron="* * * * *", params={}, target={}
        )
        task = session.scalars(select(PeriodicTask).where(PeriodicTask.name == f"schedule:{row.id}")).one()
        task.last_run_at = task.last_run_at.replace(year=task.last_run_at.year - 1)
    with closing(valkey.connect(plane.broker.url)) as client:
        until(lambda: any(row.id.encode() in body for body in _messages(client)))
    plane.beat.process.send_signal(signal.SIGTERM)
    assert plane.beat.process.wait(30) == 0
    logged = plane.worker.log.read_text() + plane.beat.log.read_text()
    assert plane.receiver.url not in logged


def test_what_cannot_be_reached_stops_the_start_with_one_line(plane: Plane, tmp_path: Path) -> None:
    wrong = (
        ("worker", "DATABASE_URL", f"sqlite:///{tmp_path}/empty.db", "empty.db has schema revision none"),
        ("beat", "VALKEY_URL", "redis://127.0.0.1:1", "Valkey at redis://127.0.0.1:1 does not answer"),
        ("worker", "BROKER_URL", "redis://x:secret@127.0.0.1:1", "broker redis://x:***@127.0.0.1:1 does not answer"),
        ("beat", "BROKER_URL", "nonsense://x", "broker nonsense://x does not answer"),
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *COMMAND, command],
            env=os.environ | plane.environment | {f"PRIVATELORA_{name}": url},
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, name, url, _ in wrong
    ]
    for process, (*_, reason) in zip(started, wrong, strict=True):
        _, said = process.communicate(timeout=60)
        assert process.returncode != 0
        assert len(said.strip().splitlines()) == 1, said
        assert reason in said
        assert "secret" not in said


def _of_schedule(plane: Plane, schedule_id: str) -> list[Job]:
    with plane.database.read() as session:
        return list(session.scalars(select(Job).where(Job.schedule_id == schedule_id)))


def _messages(client: Redis) -> list[bytes]:
    """The bodies of what workers have not taken from the broker."""
    return [base64.b64decode(json.loads(message)["body"]) for message in client.lrange(QUEUE, 0, -1)]

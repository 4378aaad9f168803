"""Celery, which only wakes: what there is to do stands in the database, and a message that is lost costs a few seconds.

    beat      from its schedules in the database: `fire` at a schedule's time, `sweep` every few seconds
    worker    `fire` queues jobs, `sweep` puts back what lapsed and wakes for what is due, `run` does one job

A worker sweeps by itself as well, so jobs go on without a beat, and after a broker that lost everything.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import structlog
from celery import Celery, signals
from celery.beat import Service as BeatService
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy_celery_beat.models import IntervalSchedule, Period, PeriodicTask
from sqlalchemy_celery_beat.schedulers import DatabaseScheduler

from privatelora.platform import schedules, valkey
from privatelora.platform.database import Database
from privatelora.platform.events import Event, emit
from privatelora.platform.jobs import machine
from privatelora.platform.jobs.runner import Services, run_job
from privatelora.platform.settings import Settings
from privatelora.platform.tables import Job, utc_now
from privatelora.protocol.errors import ConfigurationError

log = structlog.get_logger("privatelora.platform")

SWEEP, RUN = "privatelora.sweep", "privatelora.run"
QUEUE = "privatelora"
SWEEP_S = 2
BEAT_LOOK_S = 2  # until a changed schedule is noticed, at most
AGAIN_S = 2.0  # after which a beat or a broker that was lost is tried again
CONCURRENCY = 4  # jobs of one worker at a time


def run_worker(
    settings: Settings, ready: Callable[[], None] = lambda: None, alive: Callable[[], None] = lambda: None
) -> None:
    """Run jobs until SIGTERM, which lets those that run end; `alive` is called every few seconds while it can work.

    Raises `ConfigurationError` for what cannot be reached.
    """
    services = _services(settings)
    app = celery_app(settings, services)
    sweeper = _Sweeper(app, services, alive)

    @signals.worker_ready.connect(weak=False)
    def begin(**more: Any) -> None:
        sweeper.start()
        ready()

    @signals.worker_shutting_down.connect(weak=False)
    def end(**more: Any) -> None:
        sweeper.stop()

    app.Worker(
        pool="threads", concurrency=CONCURRENCY, hostname=services.name, loglevel="WARNING", without_mingle=True,
        without_gossip=True, quiet=True,
    ).start()  # fmt: skip


def run_beat(
    settings: Settings, ready: Callable[[], None] = lambda: None, alive: Callable[[], None] = lambda: None
) -> None:
    """Wake workers by the clock until SIGTERM; `alive` is called every few seconds while it can.

    Raises `ConfigurationError` for what cannot be reached.
    """
    services = _services(settings)
    with services.database.write() as session:
        schedules.ensure_defaults(session)
        _ensure_sweep(session)
    services.database.close()
    app = celery_app(settings, services)
    service = BeatService(app=app, max_interval=BEAT_LOOK_S, scheduler_cls=PatientScheduler)
    service.scheduler.alive = alive  # type: ignore[attr-defined]  # of PatientScheduler
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: service.stop())
    ready()
    service.start()


def celery_app(settings: Settings, services: Services) -> Celery:
    """The Celery app of a worker or a beat."""
    app = Celery("privatelora", broker=settings.broker_url or settings.valkey_url, backend=settings.valkey_url)
    app.conf.update(
        beat_dburi=services.database.engine.url.render_as_string(hide_password=False),
        beat_max_loop_interval=BEAT_LOOK_S,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={"socket_timeout": 5, "socket_connect_timeout": 5, "socket_keepalive": True},
        result_expires=3600,
        task_ignore_result=True,
        task_acks_late=False,  # the database knows what is done; a message is a wake-up
        task_default_queue=QUEUE,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_enable_remote_control=False,
        enable_utc=True,
        timezone="UTC",
    )

    @app.task(name=RUN)
    def run(job_id: str) -> None:
        run_job(services, job_id)

    @app.task(name=SWEEP, expires=2 * SWEEP_S)
    def sweep() -> None:
        sweep_once(app, services)

    @app.task(name=schedules.FIRE)
    def fire(schedule_id: str) -> None:
        with services.database.write() as session:
            queued = schedules.fire(session, schedule_id, utc_now())
        for job in queued:
            emit(services.valkey, Event("job.queued", job.user_id, {"job": job.id, "kind": job.kind}))
            if job.device_id is None:
                wake(app, job.id)

    return app


def waker(settings: Settings) -> Callable[[str], None]:
    """For a process that queues jobs: has a worker look at one now, or at its next sweep if the broker is away."""
    app = Celery("privatelora", broker=settings.broker_url or settings.valkey_url)
    app.conf.update(
        task_ignore_result=True,
        task_default_queue=QUEUE,
        broker_connection_retry=False,
        broker_transport_options={"socket_timeout": 2, "socket_connect_timeout": 2},
        task_publish_retry=False,
    )

    def call(job_id: str) -> None:
        try:
            wake(app, job_id)
        except (OperationalError, RedisError, OSError) as error:
            log.warning("no worker woken", job=job_id, reason=type(error).__name__)

    return call


def wake(app: Celery, job_id: str) -> None:
    """Have a worker look at a job now."""
    app.send_task(RUN, args=[job_id], expires=600)


def sweep_once(app: Celery, services: Services) -> None:
    """Put back what lapsed, end what is too late, and wake workers for what is due."""
    with services.database.write() as session:
        swept = machine.sweep(session, utc_now())
    for job_id in (*swept.put_back, *swept.ended):
        with services.database.read() as session:
            job = session.get(Job, job_id)
        if job is not None:
            emit(services.valkey, Event(f"job.{job.state}", job.user_id, {"job": job.id, "kind": job.kind}))
    for job_id in swept.due:
        wake(app, job_id)


class PatientScheduler(DatabaseScheduler):  # type: ignore[misc]  # the package ships no types
    """The package's scheduler, which waits for a database or a broker that is away instead of ending the beat."""

    alive: Callable[[], None] = staticmethod(lambda: None)

    def tick(self, *args: Any, **more: Any) -> float:
        try:
            until_next_s = float(super().tick(*args, **more))
        except (SQLAlchemyError, RedisError, OperationalError, OSError) as error:
            log.warning("beat waits", reason=type(error).__name__)
            return AGAIN_S
        self.alive()
        return until_next_s


class _Sweeper:
    """A worker's own sweep, in a thread that the worker ends."""

    def __init__(self, app: Celery, services: Services, alive: Callable[[], None]) -> None:
        self._app, self._services, self._alive = app, services, alive
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(2 * SWEEP_S):
            try:
                sweep_once(self._app, self._services)
                self._alive()
            except (SQLAlchemyError, RedisError, OperationalError, OSError) as error:
                log.warning("not swept", reason=type(error).__name__)


def _services(settings: Settings) -> Services:
    if settings.database_url is None or settings.valkey_url is None:
        raise ConfigurationError("a worker or beat needs PRIVATELORA_DATABASE_URL and PRIVATELORA_VALKEY_URL")
    database = Database(settings.database_url, pool_size=2 * CONCURRENCY)
    database.check()
    client = valkey.connect(settings.valkey_url)
    valkey.check(client, settings.valkey_url)
    return Services(settings, database, client, f"{socket.gethostname()}-{os.getpid()}")


def _ensure_sweep(session: Any) -> None:
    """Celery beat's row for the sweep."""
    if session.scalar(select(PeriodicTask).where(PeriodicTask.name == "sweep")) is None:
        every = IntervalSchedule(every=SWEEP_S, period=Period.SECONDS)
        session.add(every)
        session.flush()
        session.add(PeriodicTask(name="sweep", task=SWEEP, schedule_model=every))

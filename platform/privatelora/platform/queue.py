"""Celery, which only wakes: what there is to do stands in the database, and a message that is lost costs a few seconds.

    beat      from its schedules in the database: `fire` at a schedule's time, `sweep` every few seconds
    worker    `fire` queues a schedule's jobs, `sweep` puts back what lapsed and fires what was missed; `run`, which the
              API sends for a new job, and both of them have the worker's crew do what is due

A worker sweeps by itself as well, so jobs and schedules go on without a beat, without a broker, and after a broker that
lost everything. Both processes wait for a database, a broker or a Valkey that is away.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import structlog
from celery import Celery, signals
from celery.beat import ScheduleEntry, SchedulingError
from celery.beat import Service as BeatService
from celery.exceptions import SecurityWarning
from kombu.exceptions import KombuError
from redis.exceptions import RedisError
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy_celery_beat.models import PeriodicTaskChanged
from sqlalchemy_celery_beat.schedulers import DatabaseScheduler

from privatelora.platform import schedules, valkey
from privatelora.platform.database import Database
from privatelora.platform.events import Event, emit
from privatelora.platform.jobs import machine
from privatelora.platform.jobs.runner import CONCURRENCY, Crew, Services
from privatelora.platform.schedules import FIRE, STALE_S, SWEEP, SWEEP_S
from privatelora.platform.settings import Settings, without_password
from privatelora.platform.tables import Job, utc_now
from privatelora.protocol.errors import ConfigurationError, PrivateLoraError

log = structlog.get_logger("privatelora.platform")

RUN = "privatelora.run"  # name of the Celery task
QUEUE = "privatelora"
BEAT_LOOK_S = 2  # until a changed schedule is noticed, at most
NAP_S = 0.02  # of a beat that found nothing due: Celery wakes 10 ms before a time, and would ask without end until then
AGAIN_S = 2.0  # after which a beat's database or broker that was lost is tried again
BROKER_AWAY = (KombuError, RedisError, OSError)


def run_worker(
    settings: Settings, ready: Callable[[], None] = lambda: None, alive: Callable[[], None] = lambda: None
) -> None:
    """Run jobs until SIGTERM, which gives back those that can be.

    `alive` is called every few seconds while it can work. Raises `ConfigurationError` for what cannot be reached.
    """
    services = _services(settings)
    app = celery_app(settings, services)
    _check_broker(settings, app)
    crew = Crew(services)
    _add_tasks(app, services, crew)
    warnings.simplefilter("ignore", SecurityWarning)  # of pickled messages for root; here they are JSON
    sweeper = threading.Thread(target=_sweep_on, args=(services, crew, alive), name="sweep", daemon=True)

    @signals.worker_ready.connect(weak=False)
    def begin(**more: Any) -> None:
        if not sweeper.is_alive():  # else its consumer has found the broker again
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Celery's handler prints local variables
            sweeper.start()
            ready()

    @signals.worker_shutting_down.connect(weak=False)
    def end(**more: Any) -> None:
        services.stopping.set()

    try:
        app.Worker(
            pool="threads", concurrency=1, hostname=services.name, loglevel="WARNING", without_mingle=True,
            without_gossip=True, quiet=True,
        ).start()  # fmt: skip
    finally:
        crew.close()


def run_beat(
    settings: Settings, ready: Callable[[], None] = lambda: None, alive: Callable[[], None] = lambda: None
) -> None:
    """Wake workers by the clock until SIGTERM.

    `alive` is called every few seconds while it can. Raises `ConfigurationError` for what cannot be reached.
    """
    services = _services(settings)
    app = celery_app(settings, services)
    _check_broker(settings, app)
    app.conf.broker_connection_max_retries = 1  # the scheduler tries again, and hears of SIGTERM in between
    try:
        with services.database.write() as session:
            schedules.ensure_defaults(session)
    except IntegrityError:
        log.info("another beat has made the service's own schedules")
    services.database.close()
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
        # A consumer that has as many messages as it may does not read, so it never notices that its broker is gone;
        # and if their acknowledgements were lost with it, it never reads again (Celery 5.6, Valkey killed in a burst).
        worker_prefetch_multiplier=0,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_enable_remote_control=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        enable_utc=True,
        timezone="UTC",
    )
    return app


def waker(settings: Settings) -> Callable[[str], None]:
    """For a process that queues jobs: has a worker look at one now, or at its next sweep if the broker is away."""
    app = Celery("privatelora", broker=settings.broker_url or settings.valkey_url)
    app.conf.update(
        task_ignore_result=True,
        task_default_queue=QUEUE,
        broker_connection_retry=False,
        broker_transport_options={
            "socket_timeout": 2,
            "socket_connect_timeout": 2,
            "max_retries": 1,
            "interval_start": 0,
            "interval_step": 0,  # kombu alone tries for six seconds
        },
        task_publish_retry=False,
    )

    def call(job_id: str) -> None:
        try:
            wake(app, job_id)
        except BROKER_AWAY as error:
            log.warning("no worker woken", job=job_id, reason=type(error).__name__)

    return call


def wake(app: Celery, job_id: str) -> None:
    """Have a worker look for due jobs now, because there is this one."""
    app.send_task(RUN, args=[job_id], expires=STALE_S)


def sweep(services: Services, crew: Crew) -> None:
    """Put back what lapsed, end what is too late, fire what beat missed, and have the crew do what is due."""
    with services.database.write() as session:
        swept = machine.sweep(session, utc_now())
        changed = [session.get_one(Job, job_id, populate_existing=True) for job_id in (*swept.put_back, *swept.ended)]
    for job in changed:
        log.info("job swept", job=job.id, kind=job.kind, state=job.state, reason=job.error)
        emit(services.valkey, Event(f"job.{job.state}", job.user_id, {"job": job.id, "kind": job.kind}))
    crew.call(len(swept.due))
    with services.database.read() as session:
        missed = schedules.due(session, utc_now())
    for schedule_id in missed:
        fire(services, crew, schedule_id)


def fire(services: Services, crew: Crew, schedule_id: str) -> None:
    """Queue what a schedule is for, if its time has come."""
    with services.database.write() as session:
        queued = schedules.fire(session, schedule_id, utc_now())
    for job in queued:
        log.info("job queued", job=job.id, kind=job.kind, schedule=schedule_id)
        emit(services.valkey, Event("job.queued", job.user_id, {"job": job.id, "kind": job.kind}))
    crew.call(sum(job.device_id is None for job in queued))


class PatientScheduler(DatabaseScheduler):  # type: ignore[misc]  # the package ships no types
    """The package's scheduler, which goes on while its database or broker is away, and says so in a line."""

    alive: Callable[[], None] = staticmethod(lambda: None)
    sent = False  # whether the newest tick had something to send
    _reached = True  # what it last wanted to send a message to
    _changed_at: Any = None  # the newest change that it knows of
    _look_at = 0.0  # monotonic, seconds: not before then

    def tick(self, *args: Any, **more: Any) -> float:
        self._reached, self.sent = True, False
        try:
            until_next_s = float(super().tick(*args, **more))
        except (SQLAlchemyError, *BROKER_AWAY) as error:
            log.warning("beat waits", reason=type(error).__name__)
            return AGAIN_S
        if self._reached:
            self.alive()
        return until_next_s if self.sent else max(until_next_s, NAP_S)

    def apply_entry(self, entry: ScheduleEntry, producer: Any = None) -> None:
        """Send an entry's message; one that cannot be sent is made up for by a worker's sweep."""
        self.sent = True
        try:
            self.apply_async(entry, producer=producer, advance=False)
        except SchedulingError as error:
            self._reached = False
            log.warning("nobody woken", schedule=entry.name, reason=type(error.__cause__ or error).__name__)

    def install_default_entries(self, data: Any) -> None:
        """None: Celery's own would clean a store of results, and Valkey lets results expire."""
        self.update_from_dict({})

    def schedule_changed(self) -> bool:
        """Whether any schedule was changed since the last look, by whichever clock; while nobody can say, none was."""
        if time.monotonic() < self._look_at:  # the package asks at every step, with a new connection
            return False
        self._look_at = time.monotonic() + BEAT_LOOK_S / 2
        try:
            with self.Session() as session:
                found = session.scalar(select(PeriodicTaskChanged.last_update).where(PeriodicTaskChanged.id == 1))
        except DBAPIError as error:
            log.warning("beat goes on with the schedules that it knows", reason=type(error).__name__)
            return False
        changed, self._changed_at = found != self._changed_at, found
        return bool(changed)

    def sync(self) -> None:
        """Write when entries ran last; those that could not be written are, the next time."""
        for name in tuple(self._dirty):
            try:
                if name in self._schedule:
                    self._schedule[name].save()
            except DBAPIError as error:
                log.warning("beat's notes not written", reason=type(error).__name__)
                return
            self._dirty.discard(name)


def _add_tasks(app: Celery, services: Services, crew: Crew) -> None:
    @app.task(name=RUN)
    def run(job_id: str) -> None:
        crew.call()

    @app.task(name=SWEEP)
    def sweep_now() -> None:
        _patiently("not swept", lambda: sweep(services, crew))

    @app.task(name=FIRE)
    def fire_now(schedule_id: str) -> None:
        _patiently("not fired", lambda: fire(services, crew, schedule_id))


def _sweep_on(services: Services, crew: Crew, alive: Callable[[], None]) -> None:
    """A worker's own sweep, until it stops."""
    while not services.stopping.wait(2 * SWEEP_S):
        if _patiently("not swept", lambda: sweep(services, crew)):
            alive()


def _patiently(what: str, work: Callable[[], object]) -> bool:
    """Do some work; where something is away, that is one line in the log, and the next sweep does it."""
    try:
        work()
    except (SQLAlchemyError, RedisError, PrivateLoraError, LookupError) as error:  # or a schedule that cannot be read
        log.warning(what, reason=type(error).__name__)
        return False
    return True


def _services(settings: Settings) -> Services:
    if settings.database_url is None or settings.valkey_url is None:
        raise ConfigurationError("a worker or beat needs PRIVATELORA_DATABASE_URL and PRIVATELORA_VALKEY_URL")
    signals.setup_logging.connect(_leave_logging, weak=False)
    database = Database(settings.database_url, pool_size=2 * CONCURRENCY)
    database.check()
    client = valkey.connect(settings.valkey_url)
    valkey.check(client, settings.valkey_url)
    return Services(settings, database, client, f"{socket.gethostname()}-{os.getpid()}")


def _check_broker(settings: Settings, app: Celery) -> None:
    if settings.broker_url is None:  # Valkey, which has answered
        return
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0)
    except (*BROKER_AWAY, LookupError, ImportError) as error:
        raise ConfigurationError(
            f"broker {without_password(settings.broker_url)} does not answer ({error}); check PRIVATELORA_BROKER_URL"
        ) from None


def _leave_logging(**more: Any) -> None:
    """Celery sets up no logging where somebody says that they do; `logs.configure_logging` has."""

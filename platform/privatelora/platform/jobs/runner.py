"""A worker's side of a job: take it, run its kind, keep its lease meanwhile, and say how it ended.

    Crew.call        has threads run job after job, the most urgent first, until none is due

The lease is renewed from a thread. Once it cannot be, because the job was cancelled or another holder has it, the kind
hears of it at its next `context.check()`, and nothing is reported. A worker that is told to stop gives back what it
has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import structlog
from redis import Redis
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from privatelora.platform.database import Database
from privatelora.platform.events import Event, emit
from privatelora.platform.jobs import machine
from privatelora.platform.jobs.kinds import kind_of
from privatelora.platform.jobs.machine import JobConflictError, NoSuchJobError
from privatelora.platform.settings import Settings
from privatelora.platform.tables import Job, utc_now
from privatelora.protocol.errors import PrivateLoraError, ProtocolError

log = structlog.get_logger("privatelora.platform")

CONCURRENCY = 4  # jobs of one worker at a time
SAY_AGAIN_S = 1.0  # after which the end of a job is said again to a database that was away
RENEWALS = 3  # of a lease, in its time


class JobFailedError(PrivateLoraError):
    """A job could not be done; `retry`: another attempt may do."""

    code = "job_failed"

    def __init__(self, message: str, *, retry: bool) -> None:
        super().__init__(message)
        self.retry = retry


class StoppingError(PrivateLoraError):
    """The worker is told to stop."""

    code = "stopping"


@dataclass(frozen=True)
class Services:
    """What a worker process has.

    name : of this worker, who holds the leases of its jobs.
    stopping : set once it is told to stop.
    """

    settings: Settings
    database: Database
    valkey: Redis
    name: str
    stopping: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class WorkerContext:
    """What a kind's `run` is given; one that takes long calls `check` every second or so."""

    job_id: str
    params: dict[str, Any]
    settings: Settings
    database: Database
    lost: threading.Event = field(default_factory=threading.Event)
    stopping: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raise if the kind must end: the job is no longer this worker's, so nothing counts, or the worker stops."""
        if self.lost.is_set():
            raise JobConflictError(f"job {self.job_id} was cancelled, or another worker has it")
        if self.stopping.is_set():
            raise StoppingError(f"the worker stops; job {self.job_id} is given back")


class Crew:
    """The threads in which a worker runs jobs."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._pool = ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="job")
        self._lock = threading.Lock()
        self._calls = self._busy = 0

    def call(self, jobs: int = 1) -> None:
        """There are so many jobs to do, about: threads that are free begin, those that are busy look again."""
        with self._lock:
            if not jobs or self._services.stopping.is_set():
                return
            self._calls += 1
            begin = min(jobs, CONCURRENCY - self._busy)
            self._busy += begin
        for _ in range(begin):
            self._pool.submit(self._work)

    def close(self) -> None:
        """Wait for what runs; `services.stopping` is set."""
        self._pool.shutdown()

    def _work(self) -> None:
        while True:
            with self._lock:
                calls = self._calls
            try:
                while not self._services.stopping.is_set() and run_next(self._services):
                    pass
            except Exception as error:
                log.error("worker broke", exc_info=error)
            with self._lock:
                if calls == self._calls or self._services.stopping.is_set():
                    self._busy -= 1
                    return


def run_next(services: Services) -> bool:
    """Run the most urgent job that is due; False if there is none, or the database is away."""
    try:
        with services.database.write() as session:
            job = machine.take(session, services.name, utc_now(), services.settings.job_lease_s)
    except SQLAlchemyError as error:
        log.warning("no job taken", reason=type(error).__name__)
        return False
    if job is None:
        return False
    _tell(services, job)
    log.info("job started", job=job.id, kind=job.kind, attempt=job.attempts)
    with suppress(JobConflictError, NoSuchJobError, StoppingError):  # `_say` has told why
        ended = _run(services, job)
        log.info("job ended", job=ended.id, kind=ended.kind, state=ended.state)
        _tell(services, ended)
    return True


def _run(services: Services, job: Job) -> Job:
    """Run the kind, and write how it ended."""
    held = (job.id, services.name, job.fence)
    context = WorkerContext(job.id, dict(job.params), services.settings, services.database, stopping=services.stopping)
    try:
        with _lease_kept(services, job, context.lost):
            report = kind_of(job.kind).module.run(context)
    except StoppingError:
        return _say(services, job, lambda session: machine.give_back(session, *held))
    except Exception as error:  # noqa: BLE001 (a fault of one kind of job must not end the others)
        text, retry = _failure(job, error)
        return _say(services, job, lambda session: machine.fail(session, *held, text, retry))
    try:
        return _say(services, job, lambda session: machine.finish(session, *held, report))
    except ProtocolError as error:  # the kind's own fault
        text = error.message
        return _say(services, job, lambda session: machine.fail(session, *held, text, False))


def _failure(job: Job, error: Exception) -> tuple[str, bool]:
    """What is written of a failure, our own words only, and whether another attempt may do."""
    if isinstance(error, PrivateLoraError):
        return error.message, not isinstance(error, JobFailedError) or error.retry
    log.error("job broke", job=job.id, kind=job.kind, exc_info=error)
    return f"{type(error).__name__} in the worker; its log has more", True


@contextmanager
def _lease_kept(services: Services, job: Job, lost: threading.Event) -> Iterator[None]:
    """Renew the lease of a job until the block ends; set `lost` once it cannot be."""
    over = threading.Event()
    lease_s = services.settings.job_lease_s

    def renew() -> None:
        while not over.wait(lease_s / RENEWALS):
            try:
                with services.database.write() as session:
                    machine.beat(session, job.id, services.name, job.fence, utc_now(), lease_s)
            except (JobConflictError, NoSuchJobError):
                lost.set()
                return
            except SQLAlchemyError as error:
                log.warning("lease not renewed", job=job.id, reason=type(error).__name__)

    thread = threading.Thread(target=renew, name=f"lease of {job.id}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _say(services: Services, job: Job, end: Callable[[Session], Job]) -> Job:
    """Write how a job ended; a database that is away is asked again, until the lease is another's or the worker stops.

    Raises `JobConflictError`, `NoSuchJobError` or `StoppingError`, and has then logged why.
    """
    while True:
        try:
            with services.database.write() as session:
                return end(session)
        except SQLAlchemyError as error:
            log.warning("end of a job not written", job=job.id, reason=type(error).__name__)
            if services.stopping.wait(SAY_AGAIN_S):
                log.info("job given up", job=job.id, reason="the worker stops")
                raise StoppingError(f"the worker stops; the lease of job {job.id} will lapse") from None
        except (JobConflictError, NoSuchJobError) as error:
            log.info("job given up", job=job.id, reason=error.message)
            raise


def _tell(services: Services, job: Job) -> None:
    data = {"job": job.id, "kind": job.kind, "attempts": job.attempts, "error": job.error}
    emit(services.valkey, Event(f"job.{job.state}", job.user_id, data))

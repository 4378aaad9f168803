"""A worker's side of a job: claim it, run its kind, keep its lease meanwhile, and say how it ended.

    run_job(services, job_id)    called by the Celery task; does nothing if another worker has the job, or it is not due

The lease is renewed from a thread. Once it cannot be, because the job was cancelled or another holder has it, the kind
hears of it at its next `context.check()`, and nothing is reported.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy.exc import OperationalError

from privatelora.platform.database import Database
from privatelora.platform.events import Event, emit
from privatelora.platform.jobs import machine
from privatelora.platform.jobs.kinds import kind_of
from privatelora.platform.jobs.machine import JobConflictError, NoSuchJobError
from privatelora.platform.settings import Settings
from privatelora.platform.tables import Job, utc_now
from privatelora.protocol.errors import PrivateLoraError, ProtocolError

log = structlog.get_logger("privatelora.platform")

SAY_AGAIN_S = 1.0  # after which the end of a job is said again to a database that was away
RENEWALS = 3  # of a lease, in its time


class JobFailedError(PrivateLoraError):
    """A job could not be done; `retry`: another attempt may do."""

    code = "job_failed"

    def __init__(self, message: str, *, retry: bool) -> None:
        super().__init__(message)
        self.retry = retry


@dataclass(frozen=True)
class Services:
    """What a worker process has."""

    settings: Settings
    database: Database
    valkey: Redis
    name: str  # of this worker


@dataclass(frozen=True)
class WorkerContext:
    """What a kind's `run` is given."""

    job_id: str
    params: dict[str, Any]
    settings: Settings
    database: Database
    lost: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raise `JobConflictError` if the job is no longer this worker's: nothing it does counts any more."""
        if self.lost.is_set():
            raise JobConflictError(f"job {self.job_id} was cancelled, or another worker has it")


def run_job(services: Services, job_id: str) -> None:
    """Claim a job, run it, and say how it ended."""
    with services.database.write() as session:
        job = machine.claim(session, job_id, services.name, utc_now(), services.settings.job_lease_s)
    if job is None:
        return
    _tell(services, job)
    log.info("job started", job=job.id, kind=job.kind, attempt=job.attempts)
    context = WorkerContext(job.id, dict(job.params), services.settings, services.database)
    try:
        with _lease_kept(services, job, context.lost):
            report = kind_of(job.kind).module.run(context)
        ended = _say(services, lambda session: machine.finish(session, job.id, services.name, job.fence, report))
    except (JobConflictError, NoSuchJobError) as error:
        log.info("job given up", job=job.id, reason=error.message)
        return
    except Exception as error:
        retry = error.retry if isinstance(error, JobFailedError) else not isinstance(error, ProtocolError)
        if not isinstance(error, PrivateLoraError):
            log.error("job broke", job=job.id, kind=job.kind, exc_info=error)
        text = error.message if isinstance(error, PrivateLoraError) else f"{type(error).__name__} in the worker"
        try:
            ended = _say(services, lambda session: machine.fail(session, job.id, services.name, job.fence, text, retry))
        except (JobConflictError, NoSuchJobError) as gone:
            log.info("job given up", job=job.id, reason=gone.message)
            return
    log.info("job ended", job=ended.id, kind=ended.kind, state=ended.state)
    _tell(services, ended)


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
            except OperationalError as error:
                log.warning("lease not renewed", job=job.id, reason=type(error).__name__)

    thread = threading.Thread(target=renew, name=f"lease of {job.id}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _say(services: Services, end: Any) -> Job:
    """Write how a job ended; a database that is away is asked again, until the lease is another's."""
    waiting = threading.Event()
    while True:
        try:
            with services.database.write() as session:
                job: Job = end(session)
                return job
        except OperationalError as error:
            log.warning("end of a job not written", reason=type(error).__name__)
            waiting.wait(SAY_AGAIN_S)


def _tell(services: Services, job: Job) -> None:
    data = {"job": job.id, "kind": job.kind, "attempts": job.attempts, "error": job.error}
    try:
        emit(services.valkey, Event(f"job.{job.state}", job.user_id, data))
    except RedisError as error:
        log.warning("event lost", job=job.id, reason=type(error).__name__)

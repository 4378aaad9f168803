"""The kinds that workers run, run as a worker does: what they do, and what becomes of a job that cannot be done."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from tests.support.servers import ValkeyServer

from privatelora.platform import jobs as package
from privatelora.platform import valkey as valkeys
from privatelora.platform.audit import SERVICE
from privatelora.platform.database import Database
from privatelora.platform.jobs import kinds, machine
from privatelora.platform.jobs.runner import CONCURRENCY, Crew, Services, run_next
from privatelora.platform.settings import load_settings
from privatelora.platform.tables import (
    ApiKey,
    AuditEntry,
    BackboneNode,
    IdempotentRequest,
    Job,
    JobState,
    MetricPoint,
    SessionRow,
    UsageDay,
    UsageHour,
    User,
    utc_now,
)

A_KIND_IN_ONE_FILE = """
import time
from typing import Annotated
import msgspec
from privatelora.protocol.jobs import JobKind

class Params(msgspec.Struct, forbid_unknown_fields=True):
    marks: str
    tell: str = "ended"

class Report(msgspec.Struct, forbid_unknown_fields=True):
    runs: Annotated[int, msgspec.Meta(ge=1)]

KIND = JobKind("dropped-in", Params, Report)

def run(context):
    tell = context.params["tell"]
    with open(context.params["marks"], "a") as marks:
        marks.write(context.job_id + "\\n")
    if tell == "wait":
        while True:
            context.check()
            time.sleep(0.01)
    if tell == "break":
        raise KeyError("a private text")
    return {"runs": "many" if tell == "lie" else 1}
"""


@pytest.fixture
def services(database: Database, valkey: ValkeyServer, tmp_path: Path) -> Iterator[Services]:
    settings = load_settings({"data_dir": tmp_path, "job_lease_s": 0.5, "webhook_secret": "a secret"})
    with closing(valkeys.connect(valkey.url)) as client:
        yield Services(settings, database, client, "worker")


@pytest.fixture
def dropped_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """A kind that is a file which somebody puts beside the others; returns how often it ran."""
    folder, marks = tmp_path / "more", tmp_path / "marks"
    folder.mkdir()
    (folder / "dropped_in.py").write_text(A_KIND_IN_ONE_FILE)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    kinds.kinds.cache_clear()
    yield lambda: len(marks.read_text().splitlines()) if marks.exists() else 0
    kinds.kinds.cache_clear()


def queued(services: Services, kind: str, params: dict[str, Any], **more: Any) -> str:
    with services.database.write() as session:
        job = machine.queue(session, SERVICE, kind, params, **more)
    assert job is not None
    return job.id


def job_of(services: Services, job_id: str) -> Job:
    with services.database.read() as session:
        return session.get_one(Job, job_id)


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def dropped(services: Services, tell: str = "ended", **more: Any) -> str:
    marks = str(services.settings.data_dir / "marks")
    return queued(services, "dropped-in", {"marks": marks, "tell": tell}, **more)


def test_a_new_kind_is_one_file(services: Services, dropped_in: Callable[[], int]) -> None:
    job_id = dropped(services)
    assert run_next(services)
    assert not run_next(services)
    done = job_of(services, job_id)
    assert (done.state, done.result, dropped_in()) == (JobState.DONE, {"runs": 1}, 1)


def test_a_kind_that_breaks_is_tried_again_and_tells_nothing_private(
    services: Services, dropped_in: Callable[[], int]
) -> None:
    job_id = dropped(services, "break", max_attempts=2)
    run_next(services)
    first = job_of(services, job_id)
    assert (first.state, first.error) == (JobState.QUEUED, "KeyError in the worker; its log has more")
    assert first.run_at > utc_now()  # its backoff
    with services.database.write() as session:
        session.get_one(Job, job_id).run_at = utc_now()
    run_next(services)
    assert (job_of(services, job_id).state, dropped_in()) == (JobState.FAILED, 2)


def test_a_report_that_is_no_number_fails_the_job(services: Services, dropped_in: Callable[[], int]) -> None:
    job_id = dropped(services, "lie")
    run_next(services)
    failed = job_of(services, job_id)
    assert (failed.state, failed.result, failed.error) == (
        JobState.FAILED,
        None,
        "runs of the report is no number; a report holds numbers only",
    )


def test_a_cancelled_job_ends_and_a_stopping_worker_gives_its_jobs_back(
    services: Services, dropped_in: Callable[[], int]
) -> None:
    crew = Crew(services)
    cancelled, kept = dropped(services, "wait"), dropped(services, "wait")
    crew.call(CONCURRENCY)
    until(lambda: dropped_in() == 2)
    leases = job_of(services, kept).lease_until
    with services.database.write() as session:
        machine.cancel(session, SERVICE, cancelled)
    until(lambda: job_of(services, kept).lease_until != leases)  # it is renewed while the job runs
    services.stopping.set()
    crew.close()  # returns once both have ended
    assert job_of(services, cancelled).state == JobState.CANCELLED
    back = job_of(services, kept)
    assert (back.state, back.attempts, back.lease_until) == (JobState.QUEUED, 0, None)


def test_a_crew_does_all_that_is_due_at_once_and_each_once(services: Services, dropped_in: Callable[[], int]) -> None:
    crew = Crew(services)
    ids = [dropped(services) for _ in range(12)]
    for _ in range(30):
        crew.call()
    until(lambda: all(job_of(services, job_id).state == JobState.DONE for job_id in ids))
    services.stopping.set()
    crew.close()
    assert dropped_in() == len(ids)


class Receiver:
    """An operator's URL: notes what it is told, answers with `status`."""

    def __init__(self) -> None:
        receiver, self.status, self.told = self, 204, list[tuple[str, dict[str, str], bytes]]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.told.append((self.path, dict(self.headers.items()), body))
                self.send_response(receiver.status)
                self.send_header("Location", f"{receiver.url}/elsewhere")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                return None

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    running = Receiver()
    yield running
    running.server.shutdown()
    running.server.server_close()


def test_a_webhook_is_signed_follows_no_redirect_and_is_tried_again(services: Services, receiver: Receiver) -> None:
    job_id = queued(services, "webhook", {"url": f"{receiver.url}/hook", "payload": {"event": "quota.soft_limit"}})
    for receiver.status in (307, 500, 204):
        with services.database.write() as session:
            session.get_one(Job, job_id).run_at = utc_now()
        run_next(services)
    assert [path for path, _, _ in receiver.told] == ["/hook"] * 3
    _, headers, body = receiver.told[-1]
    assert json.loads(body) == {"event": "quota.soft_limit", "job": job_id}
    assert headers["Privatelora-Signature"] == f"sha256={hmac.new(b'a secret', body, hashlib.sha256).hexdigest()}"
    done = job_of(services, job_id)
    assert (done.state, done.attempts, done.result and done.result["status"]) == (JobState.DONE, 3, 204)


def test_a_webhooks_error_names_no_url(services: Services, receiver: Receiver) -> None:
    receiver.server.shutdown()
    receiver.server.server_close()
    job_id = queued(services, "webhook", {"url": f"{receiver.url}/a-secret-path"}, max_attempts=1)
    run_next(services)
    failed = job_of(services, job_id)
    assert (failed.state, failed.error) == (JobState.FAILED, "the webhook's URL does not answer (ConnectError)")


def test_retention_deletes_what_is_old_and_keeps_what_must_stay(services: Services) -> None:
    now = utc_now()
    old, recent = now - timedelta(days=91), now - timedelta(days=89)
    with services.database.write() as session:
        session.add(User(id="usr_a", name="a"))
        session.add(BackboneNode(id="bbn_a", url="http://x", model_hash="0" * 64, info={}))
        session.flush()
        session.add(
            ApiKey(id="key_a", user_id="usr_a", name="k", scope="device", prefix="plk_", digest="0", created_at=old)
        )
        session.flush()
        session.add(AuditEntry(at=old, action="user.created"))
        for at in (old, recent):
            session.add_all(_ended(at))
            session.add(MetricPoint(backbone_id="bbn_a", at=at, interval_s=10.0, values={}))
        session.add(_session(None))
        session.add_all(
            IdempotentRequest(key_id="key_a", idempotency_key=str(hours), digest="0", created_at=now - hours * HOUR)
            for hours in (23, 25)
        )
        for days, is_summed in ((2, True), (9, True), (10, False)):
            at = (now - timedelta(days=days)).replace(minute=0, second=0, microsecond=0)
            session.add(UsageHour(key_id="key_a", user_id="usr_a", hour=at, tokens=1))
            if is_summed:
                session.add(UsageDay(user_id="usr_a", day=at.date(), tokens=1))
    job_id = queued(services, "retention", {})
    run_next(services)
    assert job_of(services, job_id).result == {
        "sessions": 1, "jobs": 1, "metric_points": 1, "usage_hours": 1, "idempotent_requests": 1,
    }  # fmt: skip
    with services.database.read() as session:
        left = {
            table.__tablename__: session.scalar(select(func.count()).select_from(table))
            for table in (SessionRow, Job, MetricPoint, UsageHour, UsageDay, IdempotentRequest, AuditEntry)
        }
    assert left == {
        "sessions": 2, "jobs": 2, "metric_points": 1, "usage_hours": 2, "usage_days": 2, "idempotent_requests": 1,
        "audit_log": 1,
    }  # fmt: skip


HOUR = timedelta(hours=1)


def _ended(at: datetime) -> list[Any]:
    job = Job(kind="webhook", state=JobState.DONE, params={}, finished_at=at)
    return [job, _session(at)]


def _session(closed_at: datetime | None) -> SessionRow:
    state = "open" if closed_at is None else "closed"
    return SessionRow(
        number=1, user_id="usr_a", key_id="key_a", backbone_id="bbn_a", placement="paper", state=state,
        opened_at=utc_now() - timedelta(days=200), closed_at=closed_at, view={},
    )  # fmt: skip

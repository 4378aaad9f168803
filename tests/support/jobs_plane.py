"""The routes of a control plane that a device's agent calls, on the real state machine of jobs and a real SQLite.

    with JobsPlane(database, announcement_of(backbone), token) as plane:
        plane.queue("evaluate", {})
        agent...                            # at plane.url, which also announces the backbone, by absolute URLs
        plane.away = True                   # answers 503 from here on

The API itself has users, scopes and pages besides; here one user has one token.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import httpx2 as httpx

from privatelora.platform.audit import SERVICE
from privatelora.platform.database import Database
from privatelora.platform.jobs import machine
from privatelora.platform.jobs.machine import JobConflictError, NoSuchJobError
from privatelora.platform.registry import seen
from privatelora.platform.tables import Device, Job, User, new_id, utc_now
from privatelora.protocol.errors import ConfigurationError, PrivateLoraError, ProtocolError

STATUS = {JobConflictError: 409, NoSuchJobError: 404, ProtocolError: 422, ConfigurationError: 422}
LOOK_S = 0.02


def announcement_of(url: str, token: str) -> dict[str, Any]:
    """What a backbone announces, with its address in it, as a control plane passes it on."""
    info = httpx.get(f"{url}/v1/info", headers={"Authorization": f"Bearer {token}"}).raise_for_status().json()
    return info | {"data_plane": url + info["data_plane"], "blobs": url + info["blobs"]}


class JobsPlane:
    """A server on a free port, as a context manager.

    Attributes
    ----------
    info : the announcement; None: there is no backbone now.
    away : every request is answered with 503.
    lease_s : of the jobs that are offered.
    calls : what was asked of it, such as `POST start`.
    """

    def __init__(self, database: Database, info: Mapping[str, Any] | None, token: str, lease_s: float = 30.0) -> None:
        self.database, self.info, self.token, self.lease_s = database, info, token, lease_s
        self.away = False
        self.calls: list[str] = []
        with database.write() as session:
            self.user = User(id=new_id("usr"), name=new_id("usr"))
            session.add(self.user)
        plane = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, answer = plane.answer(self.command, self.path, self.headers["Authorization"], body)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST = answer

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def device(self, installation: str) -> Device:
        """The row of a device, made if need be."""
        with self.database.write() as session:
            return seen(session, self.user.id, installation, utc_now())

    def queue(self, installation: str, kind: str, **params: Any) -> str:
        """Queue a job for an installation; its id."""
        device = self.device(installation)
        with self.database.write() as session:
            job = machine.queue(session, SERVICE, kind, params, device=device)
        assert job is not None
        return job.id

    def job(self, job_id: str) -> Job:
        with self.database.read() as session:
            return session.get_one(Job, job_id)

    def due(self, job_id: str) -> None:
        """Let a job's backoff be over, and its lease, if it has one."""
        with self.database.write() as session:
            machine.sweep(session, utc_now() + timedelta(days=1))
            session.get_one(Job, job_id).run_at = utc_now()

    def cancel(self, job_id: str) -> None:
        with self.database.write() as session:
            machine.cancel(session, SERVICE, job_id)

    def answer(self, method: str, path: str, authorization: str | None, body: bytes) -> tuple[int, Any]:
        """Status and JSON of a request."""
        url = urlsplit(path)
        parts = url.path.strip("/").split("/")
        self.calls.append(f"{method} {parts[-1]}")
        if self.away:
            return 503, _problem("the database is away")
        if authorization != f"Bearer {self.token}":
            return 401, _problem("the key is not known")
        if parts == ["v1", "info"]:
            busy = {"code": "admission", "message": "no backbone serves now", "retry_after_s": 0.2}
            return (503, busy) if self.info is None else (200, self.info)
        given = json.loads(body) if body else {}
        try:
            if parts[:3] == ["api", "v1", "installations"]:
                return 200, self._register(parts[3], given)
            if parts[:3] == ["api", "v1", "devices"]:
                return 200, self._offers(parts[3], float(parse_qs(url.query)["wait_s"][0]))
            if parts[:3] == ["api", "v1", "jobs"]:
                return 200, self._step(parts[3], parts[4], given)
        except PrivateLoraError as error:
            return STATUS[type(error)], _problem(error.message)
        return 404, _problem("Not Found")

    def _register(self, installation: str, given: Mapping[str, Any]) -> dict[str, Any]:
        device = self.device(installation)
        with self.database.write() as session:
            row = session.get_one(Device, device.id)
            row.name, row.allows = given["name"], given["allows"]
        return {"id": row.id, "installation": installation, "name": row.name, "allows": row.allows}

    def _offers(self, device_id: str, wait_s: float) -> dict[str, Any]:
        until = time.monotonic() + wait_s
        while True:
            with self.database.write() as session:
                device = session.get(Device, device_id)
                if device is None:
                    raise NoSuchJobError(f"there is no device {device_id}")
                jobs = machine.offers(session, device, utc_now(), self.lease_s)
                items = [_shown(job) | {"lease_s": self.lease_s} for job in jobs]
            if items or time.monotonic() >= until:
                return {"items": items}
            time.sleep(LOOK_S)

    def _step(self, job_id: str, what: str, given: Mapping[str, Any]) -> dict[str, Any]:
        by = (job_id, given["device_id"], given["fence"])
        with self.database.write() as session:
            if what in ("accept", "start", "heartbeat"):
                step = {"accept": machine.accept, "start": machine.start, "heartbeat": machine.beat}[what]
                return _shown(step(session, *by, utc_now(), self.lease_s))
            if what == "refuse":
                return _shown(machine.refuse(session, *by, given["reason"]))
            if what == "fail":
                return _shown(machine.fail(session, *by, given["error"], given["retry"]))
            return _shown(machine.finish(session, *by, given["report"]))


def _shown(job: Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in ("id", "kind", "params", "priority", "fence", "state")}


def _problem(detail: str) -> dict[str, Any]:
    return {"type": "about:blank", "title": "refused", "detail": detail}

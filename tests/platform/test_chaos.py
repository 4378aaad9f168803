"""SIGKILL, in turn, of everything that a service is made of, while it runs jobs and serves sessions.

worker, beat, API, Valkey, PostgreSQL and a backbone are killed and come back while 200 jobs run and 32 sessions decode.
Every job ends once, usage is what devices counted within a lease, and every device goes on in the end.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2 as httpx
import msgspec
import pytest
from tests.support.managed import Managed, managed
from tests.support.player import Player
from tests.support.servers import PostgresServer, ValkeyServer, postgres, valkey_server
from tests.support.service import ServiceProcess, running_process
from tests.support.tiny import tiny_model
from websockets.exceptions import WebSocketException

from privatelora.platform.tables import FINAL, Job, JobState, Role, Scope
from privatelora.protocol.errors import PrivateLoraError
from privatelora.protocol.frames import Phase
from privatelora.protocol.messages import ServiceInfo

JOBS, SESSIONS = 200, 32
LEASE_BYTES = 4 << 20
JOB_S = 0.05  # that the webhook's receiver takes
AWAY_S = 1.0  # between a kill and the start after it
LOST = (PrivateLoraError, WebSocketException, httpx.HTTPError, OSError)


class Receiver:
    """Takes webhooks, slowly, and notes which job each is of."""

    def __init__(self) -> None:
        told = self.told = list[str]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                time.sleep(JOB_S)
                told.append(body["job"])
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                return None

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Devices:
    """Sessions that decode until they are told to stop, whatever happens to the service."""

    def __init__(self, api_url: str, key: str) -> None:
        self._api_url, self._key = api_url, key
        self.stop, self.moved, self.last = threading.Event(), [0, 0], [0.0] * SESSIONS
        self._lock = threading.Lock()

    def all_since(self, moment: float) -> bool:
        """Whether every device has had a token since then."""
        return min(self.last) > moment

    def run(self, index: int) -> None:
        while not self.stop.is_set():
            try:
                self._session(index)
            except LOST:
                self.stop.wait(0.2)

    def _session(self, index: int) -> None:
        headers = {"Authorization": f"Bearer {self._key}"}
        answer = httpx.get(f"{self._api_url}/v1/info", headers=headers, timeout=3).raise_for_status()
        info = msgspec.json.decode(answer.content, type=ServiceInfo)
        url = info.data_plane.removesuffix("/v1/sessions")
        with Player(url, self._key, info) as device:
            try:
                device.enter()
                for sequence in range(10**6):
                    if self.stop.is_set():
                        device.close()
                        return
                    device.run(Phase.GENERATE, (sequence, 0, 1))
                    device.release(sequence)
                    self.last[index] = time.monotonic()
            finally:
                with self._lock:
                    self.moved[0] += device.moved[0]
                    self.moved[1] += device.moved[1]


@pytest.fixture
def mortals() -> Iterator[tuple[PostgresServer, ValkeyServer]]:
    with (
        TemporaryDirectory(prefix="privatelora-chaos-") as folder,
        postgres(Path(folder) / "data") as server,
        valkey_server() as valkey,
    ):
        yield server, valkey


def until(met: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if met():
                return
        except LOST:
            pass
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_whatever_is_killed_every_job_ends_once_and_usage_is_what_devices_counted(
    tmp_path: Path, mortals: tuple[PostgresServer, ValkeyServer]
) -> None:
    server, valkey = mortals
    model, folder = tmp_path / "model", tmp_path / "service"
    tiny_model("llama", model)
    settings = {"flush_s": "0.5", "slot_s": "3", "lease_bytes": str(LEASE_BYTES), "job_lease_s": "3"}
    receiver = Receiver()
    with ExitStack() as stack:
        control = stack.enter_context(managed(model, folder, server.database(), valkey.url, **settings))
        parts = {name: stack.enter_context(_part(name, control)) for name in ("api", "worker", "beat")}
        parts["backbone"] = control.backbone()
        operator = control.user("operator", role=Role.OPERATOR, scope=Scope.OPERATOR)
        alice = control.user("alice")
        control.quota("user", alice.id, "bytes_up_per_day", 1 << 40)
        control.quota("user", alice.id, "concurrent_sessions", 2 * SESSIONS)
        api = httpx.Client(base_url=parts["api"].url, headers={"Authorization": f"Bearer {operator.key}"})
        until(lambda: api.get("/readyz").status_code == 200, 20, "the API is not ready")
        jobs = [_queue(api, receiver.url) for _ in range(JOBS)]
        devices = Devices(parts["api"].url, alice.key)
        pool = stack.enter_context(ThreadPoolExecutor(SESSIONS))
        running = [pool.submit(devices.run, index) for index in range(SESSIONS)]
        stack.callback(devices.stop.set)
        until(lambda: all(devices.last), 60, "a device did not begin")

        for victim in ("worker", "beat", "api", "valkey", "postgres", "backbone"):
            part = {"valkey": valkey, "postgres": server}.get(victim) or parts[victim]
            part.kill()
            time.sleep(AWAY_S)
            part.start()
            until(lambda: api.get("/readyz").status_code == 200, 30, f"the API is not ready after {victim}")
            back = time.monotonic()
            until(partial(devices.all_since, back), 60, f"a device did not come back after {victim}")

        until(lambda: _open_jobs(control) == 0, 90, "a job did not end")
        devices.stop.set()
        for one in running:
            one.result(30)
        api.post("/api/v1/jobs", json={"kind": "session-reaper", "params": {"gone_after_s": 5}}).raise_for_status()
        until(lambda: all(row.state == "closed" for row in control.sessions()), 30, "a session did not end")
        with control.database.read() as session:
            ended = {job.id: job for job in session.query(Job).filter(Job.kind == "webhook")}
        used = control.used(alice.id)
    assert set(ended) == set(jobs)
    done = [job.id for job in ended.values() if job.state == JobState.DONE]
    assert all(job.state == JobState.DONE or job.error for job in ended.values())
    assert set(done) <= set(receiver.told)
    assert len(done) > 0.9 * JOBS
    for counted, written in zip(devices.moved, used, strict=False):
        assert abs(counted - written) <= LEASE_BYTES


def _part(name: str, control: Managed) -> AbstractContextManager[ServiceProcess]:
    environment = {f"PRIVATELORA_{key}".upper(): value for key, value in control.settings.items()}
    environment |= {
        "PRIVATELORA_DATABASE_URL": control.database_url,
        "PRIVATELORA_VALKEY_URL": control.valkey_url,
        "PRIVATELORA_DATA_DIR": str(control.directory / "data"),
        "PRIVATELORA_REQUESTS_PER_MINUTE": "100000",
    }
    log = control.directory / f"{name}.log"
    return running_process(("privatelora.platform", name, "--json"), (), log, environment, takes_port=name == "api")


def _queue(api: httpx.Client, url: str) -> str:
    asked = {"kind": "webhook", "params": {"url": url, "payload": {"event": "chaos"}}, "max_attempts": 20}
    return str(api.post("/api/v1/jobs", json=asked).raise_for_status().json()["id"])


def _open_jobs(control: Managed) -> int:
    with control.database.read() as session:
        return session.query(Job).filter(Job.kind == "webhook", Job.state.not_in(FINAL)).count()

"""`privatelora api` as a process on a socket: limits, guessing, events, what it logs, and how it starts and ends."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest
from sqlalchemy import update
from tests.support.managed import Managed, Member, managed
from tests.support.servers import PostgresServer, ValkeyServer
from tests.support.service import ServiceProcess, running_process

from privatelora.platform import valkey as valkeys
from privatelora.platform.events import Event, emit
from privatelora.platform.tables import ApiKey, Role, Scope, utc_now

API = ("privatelora.platform", "api", "--json")
REQUESTS, WRONG = 60, 5  # a minute


@dataclass(frozen=True)
class Api:
    """The process, and its operator."""

    process: ServiceProcess
    control: Managed
    operator: Member

    def get(self, path: str, key: str | None = None, **more: object) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key or self.operator.key}"}
        return httpx.get(self.process.url + path, headers=headers, **more)  # type: ignore[arg-type]  # passed on


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, server: PostgresServer, valkey: ValkeyServer) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("api")
    environment = {
        "PRIVATELORA_VALKEY_URL": valkey.url,
        "PRIVATELORA_DATA_DIR": str(folder / "data"),
        "PRIVATELORA_REQUESTS_PER_MINUTE": str(REQUESTS),
        "PRIVATELORA_WRONG_KEYS_PER_MINUTE": str(WRONG),
        "PRIVATELORA_LOG_FORMAT": "json",
    }
    url = server.database()
    with managed(folder / "model", folder, url, valkey.url) as control:
        operator = control.user("operator", role=Role.OPERATOR, scope=Scope.OPERATOR)
        with running_process(API, (), folder / "api.log", environment | {"PRIVATELORA_DATABASE_URL": url}) as process:
            yield Api(process, control, operator)


def raw(api: Api, request: bytes) -> bytes:
    """What is answered to these bytes, until the connection ends or falls silent."""
    parts = urlsplit(api.process.url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=3) as connection:
        connection.sendall(request)
        answer = b""
        try:
            while data := connection.recv(65536):
                answer += data
                if b"\r\n\r\n" in answer and b"}" in answer:
                    break
        except TimeoutError:
            pass
    return answer


def post(api: Api, body: bytes, *headers: str) -> bytes:
    head = ["POST /api/v1/users HTTP/1.1", "Host: x", f"Authorization: Bearer {api.operator.key}", *headers]
    return raw(api, "\r\n".join([*head, "", ""]).encode() + body)


def test_bodies_and_heads_that_are_too_large_are_refused(api: Api) -> None:
    big = b'{"name": "' + b"x" * (2 << 20) + b'"}'
    told = post(api, b"", "Content-Type: application/json", f"Content-Length: {len(big)}")
    assert b" 413 " in told.splitlines()[0]
    chunk = b"%x\r\n%b\r\n" % (len(big), big)
    told = post(api, chunk, "Content-Type: application/json", "Transfer-Encoding: chunked")
    assert b" 413 " in told.splitlines()[0]
    told = post(api, b"", "X-Long: " + "x" * 70_000)
    assert b" 400 " in told.splitlines()[0] or b" 431 " in told.splitlines()[0]
    told = post(api, b"name=x", "Content-Type: application/x-www-form-urlencoded", "Content-Length: 6")
    assert b" 415 " in told.splitlines()[0]
    assert api.get("/api/v1/me").status_code == 200


def test_a_key_that_asks_too_often_is_told_when_it_may_go_on(api: Api) -> None:
    busy = api.control.user("busy").key
    with httpx.Client(base_url=api.process.url, headers={"Authorization": f"Bearer {busy}"}) as client:
        answers = [client.get("/api/v1/me") for _ in range(REQUESTS + 1)]
    assert {answer.status_code for answer in answers[:-1]} == {200}
    last = answers[-1]
    assert last.status_code == 429
    assert 0 < int(last.headers["Retry-After"]) <= 60
    assert (last.headers["RateLimit-Limit"], last.headers["RateLimit-Remaining"]) == (str(REQUESTS), "0")
    assert last.json()["title"] == "Too many requests"
    assert api.get("/api/v1/me").status_code == 200  # nobody else is held up


def test_events_come_as_they_happen_to_those_whose_they_are_and_end_with_the_key(
    api: Api, valkey: ValkeyServer
) -> None:
    alice = api.control.user("alice", scope=Scope.READ_ONLY)
    client = valkeys.connect(valkey.url)
    emit(client, Event("before", alice.id, {}))
    lines: list[str] = []
    ended = threading.Event()

    def listen() -> None:
        headers = {"Authorization": f"Bearer {alice.key}"}
        with httpx.stream("GET", api.process.url + "/api/v1/events", headers=headers, timeout=20) as stream:
            for line in stream.iter_lines():
                lines.append(line)
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    wait_for(lambda: bool(lines))
    emit(client, Event("job.done", alice.id, {"job": "job_1"}))
    emit(client, Event("job.done", "usr_bob", {"job": "job_2"}))
    wait_for(lambda: "event: job.done" in lines)
    last = next(line.removeprefix("id: ") for line in lines if line.startswith("id: "))
    assert 'data: {"job": "job_1"}' in lines
    emit(client, Event("job.failed", alice.id, {"job": "job_3"}))
    wait_for(lambda: "event: job.failed" in lines)
    headers = {"Authorization": f"Bearer {alice.key}", "Last-Event-ID": last}
    with httpx.stream("GET", api.process.url + "/api/v1/events", headers=headers, timeout=20) as stream:
        missed = []
        for line in stream.iter_lines():
            missed.append(line)
            if line.startswith("data: "):
                break
    assert missed[-1] == 'data: {"job": "job_3"}'
    assert not any("job_2" in line or "before" in line for line in lines)
    with api.control.database.write() as session:
        session.execute(update(ApiKey).where(ApiKey.id == alice.key_id).values(revoked_at=utc_now()))
    assert ended.wait(5)


def test_what_is_logged_is_structured_and_holds_no_key_query_or_forged_line(api: Api) -> None:
    secret = "plk_" + "s" * 43
    forged = "x%0A%7B%22event%22%3A%22forged%22%7D"
    api.get(f"/api/v1/{forged}?name=private-word", secret)
    raw(api, f"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Request-ID: a\x1b[31m{'y' * 60}\r\n\r\n".encode())
    wait_for(lambda: "unmatched" in api.process.log.read_text())
    text = api.process.log.read_text()
    for word in (secret, api.operator.key, "private-word", "forged", "\x1b"):
        assert word not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert {"event", "level", "timestamp"} <= set(lines[-1])
    requests = [line for line in lines if line["event"] == "request"]
    assert all({"method", "route", "status", "ms", "request"} <= set(line) for line in requests)
    assert any(line.get("user") == api.operator.id for line in requests)


def test_it_says_in_one_line_what_it_cannot_start_without(tmp_path: Path, valkey: ValkeyServer) -> None:
    gone = "postgresql://nobody:secret-word@127.0.0.1:1/none"
    with (
        pytest.raises(RuntimeError) as refused,
        running_process(
            API, (), tmp_path / "log", {"PRIVATELORA_DATABASE_URL": gone, "PRIVATELORA_VALKEY_URL": valkey.url}
        ),
    ):
        pass
    last = str(refused.value).strip().splitlines()[-1]
    assert last.startswith("error: database postgresql+psycopg://nobody:***@127.0.0.1:1/none cannot be reached")
    assert "secret-word" not in str(refused.value)


def test_a_sigterm_ends_it_cleanly(api: Api, tmp_path: Path) -> None:
    environment = dict(api.process.environment)
    with running_process(API, (), tmp_path / "log", environment) as process:
        assert httpx.get(process.url + "/readyz").json() == {"status": "ready"}
        process.process.terminate()
        assert process.process.wait(10) == 0


def test_guessing_is_slowed_down_and_known_keys_go_on(api: Api) -> None:
    assert api.get("/api/v1/me").status_code == 200
    found = [api.get("/api/v1/me", f"plk_{n:043d}").status_code for n in range(WRONG + 3)]
    assert found[:WRONG] == [401] * WRONG
    assert found[-1] == 429
    fresh = api.control.user("fresh")
    assert api.get("/api/v1/me", fresh.key).status_code == 429  # not seen from here before
    assert api.get("/api/v1/me").status_code == 200


def wait_for(met: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)

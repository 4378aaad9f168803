"""The control plane: what it costs a token, and how fast its lists are at the size of a real service.

    decode_with_control_plane    32 devices, with keys, quotas, leases, usage and metrics, against a backbone alone
    rest_list_p95_ms             list routes at 10,000 users, 100,000 sessions and 1,000,000 days of usage, PostgreSQL
    rest_over_bare_fastapi       requests/s of `GET /api/v1/me` against one empty route of FastAPI, the same load

The first runs everything that `privatelora up` runs, beside the devices on the same cores, the user having a quota of
every resource. The REST rows' server is `privatelora api`, the load `rest_load.py`, both bounded and on loopback.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import numpy as np
from sqlalchemy.orm import Session

from benchmarks import ENVIRONMENT
from benchmarks.decoding import DTYPE, SESSIONS
from benchmarks.fleet import running
from benchmarks.rows import ROOT, Row, Target, Unmeasured, unmeasured
from benchmarks.workbench import MAX_SESSIONS, Address, Workbench, process, service
from privatelora.platform import keys
from privatelora.platform.database import Database
from privatelora.platform.tables import (
    BackboneNode,
    Role,
    Scope,
    SessionRow,
    UsageDay,
    User,
    new_id,
    utc_now,
)

ROUNDS = 5
WARM_TOKENS, TOKENS = 40, 120  # of an answer: the first of a new process, whose statements are compiled, and the next
USERS, SESSION_ROWS, USAGE_ROWS = 10_000, 100_000, 1_000_000
CONNECTIONS, REQUESTS = 8, 2000
LIST_REQUESTS = 400  # of each route

DECODE, LISTS, BARE = "decode_with_control_plane", "rest_list_p95_ms", "rest_over_bare_fastapi"
TARGETS = {
    DECODE: Target("tokens/s", floor=0.95, aim=0.99),
    LISTS: Target("ms", "value", "lower", aim=100),
    BARE: Target("requests/s"),
}
QUOTAS = {
    "bytes_up_per_day": 1 << 42,
    "bytes_down_per_day": 1 << 42,
    "tokens_per_minute": 1 << 40,
    "concurrent_sessions": MAX_SESSIONS,
    "kv_memory_bytes": 1 << 42,
    "bytes_per_second": 1 << 33,
}
"""More than the devices use, so that each is counted and none ends them."""

PATHS = (
    "/api/v1/users?limit=50",
    "/api/v1/users?plan=plan-3&limit=50",
    "/api/v1/sessions?limit=50",
    "/api/v1/sessions?state=open&limit=50",
    "/api/v1/usage?limit=50",
    "/api/v1/api-keys?limit=50",
    "/api/v1/audit-log?limit=50",
    "/api/v1/jobs?limit=50",
)


def measure(names: Sequence[str], bench: Workbench, rounds: int = ROUNDS) -> Iterator[Row]:
    """Measure the rows called `names`."""
    for name, work in ((DECODE, _decode), (LISTS, _lists), (BARE, _bare)):
        if name in names:
            try:
                yield work(bench, rounds)
            except Exception as error:  # noqa: BLE001 (whatever it was: this row is named, and the others measured)
                yield unmeasured(name, TARGETS[name], error)


def _decode(bench: Workbench, rounds: int) -> Row:
    rates = {"off": list[float](), "on": list[float]()}
    with _up(bench) as first:
        key = _metered_key(first)
    for round_ in range(rounds):
        for name in ("off", "on") if round_ % 2 == 0 else ("on", "off"):
            bench.say(f"control plane {name}, round {round_ + 1} of {rounds}")
            starts = _up(bench) if name == "on" else service(DTYPE, bench.data_dir, bench.folder)
            with starts as started:
                address = replace(started, token=key) if name == "on" else started
                for tokens in (WARM_TOKENS, TOKENS):
                    with running(address, SESSIONS, "paper", tokens, cache_dir=bench.cache_dir, seed=round_) as fleet:
                        rate = fleet.decode().tokens_per_s
                rates[name].append(rate)
    on, off = statistics.median(rates["on"]), statistics.median(rates["off"])
    conditions = (
        f"{SESSIONS} devices, {TOKENS} tokens each, every layer inline, {DTYPE}; against a backbone alone; "
        "`privatelora up` with API, worker, beat, Valkey and SQLite, and a quota of every resource; "
        f"medians of {rounds} rounds in turn, each on processes of its own that have served as many devices before"
    )
    return Row(DECODE, TARGETS[DECODE], on, off, on / off, conditions)


@contextmanager
def _up(bench: Workbench) -> Iterator[Address]:
    """`privatelora up`, always on the same data; the token is the first operator's key, which its first start knows."""
    log, folder = bench.folder / "up.log", bench.folder / "up"
    options = ["--port", "0", "--json", "--dtype", DTYPE, "--data-dir", str(folder)]
    environment = ENVIRONMENT | {"PRIVATELORA_LOG_LEVEL": "warning", "PRIVATELORA_MAX_SESSIONS": str(MAX_SESSIONS)}
    with log.open("w") as stderr, process(_platform("up", *options), stderr, environment) as child:
        ready = _first_line(child, log)
        yield Address(ready["url"], ready.get("admin_key") or "", child.pid)


def _metered_key(first: Address) -> str:
    """A new user's key for devices, with a quota of every resource."""
    headers = {"Authorization": f"Bearer {first.token}"}
    with httpx.Client(base_url=first.url + "/api/v1", headers=headers) as api:
        user = api.post("/users", json={"name": "bench"}).raise_for_status().json()
        made = api.post("/api-keys", json={"user_id": user["id"], "name": "bench", "scope": "device"})
        for resource, limit in QUOTAS.items():
            quota = {"level": "user", "subject": user["id"], "resource": resource, "limit": limit}
            api.post("/quotas", json=quota).raise_for_status()
    return str(made.raise_for_status().json()["key"])


def _lists(bench: Workbench, rounds: int) -> Row:
    with _api(bench) as api:
        bench.say(f"{USERS} users, {SESSION_ROWS} sessions and {USAGE_ROWS} days of usage")
        _fill(api.database)
        found = {}
        for path in PATHS:
            bench.say(f"lists: {path}")
            load = _load(api.port, api.key, [path], LIST_REQUESTS, connections=1)
            found[path] = 1e3 * float(np.percentile(load["seconds"], 95))
    slowest = max(found, key=found.__getitem__)
    told = ", ".join(f"{path} {ms:.1f}" for path, ms in found.items())
    conditions = f"the slowest route's, {slowest}; p95 in ms of {LIST_REQUESTS} requests, one at a time: {told}"
    return Row(LISTS, TARGETS[LISTS], found[slowest], conditions=conditions)


def _bare(bench: Workbench, rounds: int) -> Row:
    rates, late = {"ours": list[float](), "bare": list[float]()}, {"ours": list[float](), "bare": list[float]()}
    with _api(bench) as api, _bare_fastapi(bench) as port:
        for round_ in range(rounds):
            for name, at, path in (("ours", api.port, "/api/v1/me"), ("bare", port, "/")):
                bench.say(f"REST, round {round_ + 1} of {rounds}: {name}")
                load = _load(at, api.key, [path], REQUESTS, CONNECTIONS)
                rates[name].append(len(load["seconds"]) / load["took_s"])
                late[name].append(1e3 * float(np.percentile(load["seconds"], 99)))
    ours, bare = statistics.median(rates["ours"]), statistics.median(rates["bare"])
    p99 = {name: statistics.median(values) for name, values in late.items()}
    conditions = (
        f"GET /api/v1/me, which looks its key up in PostgreSQL, against an empty route of FastAPI on the same uvicorn; "
        f"{CONNECTIONS} connections; p99 {p99['ours']:.1f} and {p99['bare']:.1f} ms; medians of {rounds} rounds in turn"
    )
    return Row(
        BARE, TARGETS[BARE], ours, bare, ours / bare, conditions, {"p99_ms": p99["ours"], "bare_p99_ms": p99["bare"]}
    )


@dataclass(frozen=True)
class Api:
    """A `privatelora api` on a PostgreSQL of its own, and a read-only operator's key."""

    port: int
    key: str
    database: Database


@contextmanager
def _api(bench: Workbench) -> Iterator[Api]:
    from tests.support.servers import postgres, valkey_server  # the tests' own real servers

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="privatelora-rest-")))
        url = stack.enter_context(postgres(folder / "data")).database()
        valkey = stack.enter_context(valkey_server())
        database = Database(url)
        stack.callback(database.close)
        database.upgrade()
        with database.write() as session:
            key = _operator(session)
        environment = ENVIRONMENT | {
            "PRIVATELORA_DATABASE_URL": url,
            "PRIVATELORA_VALKEY_URL": valkey.url,
            "PRIVATELORA_REQUESTS_PER_MINUTE": "1000000",
            "PRIVATELORA_DATA_DIR": str(folder / "service"),
        }
        log = folder / "api.log"
        stderr = stack.enter_context(log.open("w"))
        child = stack.enter_context(process(_platform("api", "--port", "0", "--json"), stderr, environment))
        ready = _first_line(child, log)
        yield Api(urlsplit(ready["url"]).port or 0, key, database)


def _operator(session: Session) -> str:
    user = User(id=new_id("usr"), name="operator", role=Role.OPERATOR)
    session.add(user)
    session.flush()
    row, text = keys.new_key(user, "bench", Scope.READ_ONLY)
    session.add(row)
    return text


def _fill(database: Database) -> None:
    """A service that has run for a hundred days, written by COPY."""
    now = utc_now()
    users = [new_id("usr") for _ in range(USERS)]
    key_of = {user: new_id("key") for user in users}
    node = new_id("bbn")
    with database.write() as session:
        session.add(BackboneNode(id=node, url="http://x", model_hash="0" * 64, info={}, state="gone"))
        session.flush()
        cursor = session.connection().connection.cursor()
        _copy(cursor, "users (id, name, role, plan, team, created_at, version)", (
            (user, f"user {i}", "member", f"plan-{i % 10}", f"team-{i % 100}", now, 1) for i, user in enumerate(users)
        ))  # fmt: skip
        _copy(cursor, "api_keys (id, user_id, name, scope, prefix, digest, created_at, version)", (
            (key_of[user], user, "laptop", "device", "plk_12345678", keys.digest_of(user), now, 1) for user in users
        ))  # fmt: skip
        columns = "id, number, user_id, key_id, backbone_id, placement, state, view, bytes_up, bytes_down, tokens"
        _copy(cursor, f"sessions ({columns}, opened_at, closed_at, end_reason)", (
            (new_id("ses"), i, user, key_of[user], node, "paper", "open" if i % 500 == 0 else "closed", "{}", i, i, i,
             now - timedelta(minutes=SESSION_ROWS - i), now, "closed")
            for i in range(SESSION_ROWS) for user in (users[i % USERS],)
        ))  # fmt: skip
        _copy(cursor, "usage_days (user_id, day, bytes_up, bytes_down, tokens, sessions)", (
            (users[i % USERS], now.date() - timedelta(days=i // USERS), i, i, i, 1) for i in range(USAGE_ROWS)
        ))  # fmt: skip
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")
    assert {User.__tablename__, SessionRow.__tablename__, UsageDay.__tablename__} == {"users", "sessions", "usage_days"}


def _copy(cursor: Any, into: str, rows: Iterator[tuple[Any, ...]]) -> None:
    with cursor.copy(f"COPY {into} FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)


@contextmanager
def _bare_fastapi(bench: Workbench) -> Iterator[int]:
    """One empty route of FastAPI on uvicorn, as the API runs it."""
    script = (
        "import socket, uvicorn, fastapi\n"
        "app = fastapi.FastAPI(openapi_url=None)\n"
        "app.get('/')(lambda: {'status': 'ok'})\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "print('{\"port\": %d}' % listener.getsockname()[1], flush=True)\n"
        "uvicorn.Server(uvicorn.Config(app, log_level='warning', access_log=False)).run(sockets=[listener])\n"
    )
    log = bench.folder / "bare.log"
    with log.open("w") as stderr, process([sys.executable, "-c", script], stderr, ENVIRONMENT) as child:
        yield int(_first_line(child, log)["port"])


def _load(port: int, key: str, paths: Sequence[str], requests: int, connections: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.rest_load", "--port", str(port), "--requests", str(requests)]
    command += ["--connections", str(connections), "--key", key]
    for path in paths:
        command += ["--path", path]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unmeasured(f"the load ended: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _platform(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "privatelora.platform", *arguments]


def _first_line(child: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    assert child.stdout is not None
    line = child.stdout.readline()  # one JSON line when it is ready, nothing if it ended
    if not line:
        raise Unmeasured(f"a server did not start: {log.read_text()[-2000:].strip()}")
    ready: dict[str, Any] = json.loads(line)
    return ready

"""Lists of the API: whole in pages of any size, in every order, read by index, and closed to made-up cursors."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, text
from tests.support.control import Control, control
from tests.support.servers import PostgresServer, ValkeyServer

from privatelora.platform import keys
from privatelora.platform.tables import MetricPoint, Scope, UsageDay, User, new_id

FIRST = datetime(2026, 1, 1, tzinfo=UTC)
FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", 'a,"b"')


@pytest.fixture(scope="module")
def plane(server: PostgresServer, valkey: ValkeyServer) -> Iterator[Control]:
    with control(server.database(), valkey.url) as running:
        with running.database.write() as session:
            for at in range(23):
                user = User(id=new_id("usr"), name=FORMULAS[at] if at < len(FORMULAS) else f"u{at}", plan="free")
                session.add(user)
                session.flush()
                key, _ = keys.new_key(user, "k", Scope.DEVICE)
                day = (FIRST + timedelta(days=at % 4)).date()
                session.add_all([key, UsageDay(user_id=user.id, day=day, bytes_up=at, tokens=1)])
        for _ in range(3):
            running.objects()
        yield running


def paged(plane: Control, path: str, limit: int, **query: str) -> list[dict[str, Any]]:
    """Every item of a list, page by page."""
    items: list[dict[str, Any]] = []
    query["limit"] = str(limit)
    while True:
        page = plane.client.get(path, params=query, headers=plane.as_("operator")).raise_for_status().json()
        assert len(page["items"]) <= limit
        items += page["items"]
        if page["next"] is None:
            return items
        query["cursor"] = page["next"]


def lists(plane: Control) -> list[tuple[str, list[str], list[str]]]:
    """Every list of the OpenAPI document: path, orders, filters."""
    found = []
    for path, operations in plane.app.openapi()["paths"].items():
        parameters = operations.get("get", {}).get("parameters", ())
        schemas = {one["name"]: one["schema"] for one in parameters}
        if "cursor" in schemas:
            filters = [name for name in schemas if name not in ("limit", "cursor", "sort", "Last-Event-ID")]
            found.append((path, schemas["sort"]["enum"], filters))
    return found


def test_every_list_is_whole_in_pages_of_any_size_and_turned_around_by_a_minus(plane: Control) -> None:
    found = lists(plane)
    assert len(found) >= 10
    for path, orders, _ in found:
        for order in orders:
            whole = paged(plane, path, 200, sort=order)
            assert paged(plane, path, 3, sort=order) == whole, (path, order)
            if order.startswith("-"):
                assert paged(plane, path, 5, sort=order[1:]) == whole[::-1], (path, order)


def cursor_of(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


MADE_UP = [
    "x",
    "ÿ",
    "=" * 8,
    cursor_of(None),
    cursor_of([]),
    cursor_of(["-id"]),
    cursor_of(["id", "usr_1"]),
    cursor_of(["-id", 7]),
    cursor_of(["-id", None]),
    cursor_of(["-id", "\x00"]),
    cursor_of(["-id", "\ud800"]),
    cursor_of(["-id", ["a"]]),
    cursor_of(["-opened_at", "yesterday", "ses_1"]),
    cursor_of(["-opened_at", "9999-12-31T23:59:59-23:59", "ses_1"]),
    base64.urlsafe_b64encode(b"[" * 700).decode(),
]


@pytest.mark.parametrize("cursor", MADE_UP, ids=range(len(MADE_UP)))
def test_a_made_up_cursor_is_refused_by_name(plane: Control, cursor: str) -> None:
    for sort in ("-id", "-opened_at"):
        answer = plane.client.get(
            "/api/v1/sessions", params={"cursor": cursor, "sort": sort}, headers=plane.as_("device")
        )
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["field"] == "query.cursor"


def test_a_forged_cursor_shows_nothing_of_anybody_else(plane: Control) -> None:
    for place in ("", "ses_0", "ses_Z", "zzz", "' OR 1=1 --"):
        query = {"cursor": cursor_of(["-id", place])}
        items = plane.client.get("/api/v1/sessions", params=query, headers=plane.as_("other")).json()["items"]
        assert items == []


def test_every_list_and_filter_is_read_by_an_index(plane: Control) -> None:
    """EXPLAIN of the very statements, with sequential scans made as dear as they are on large tables."""
    seen: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if "LIMIT" in statement:
            seen.append((statement, parameters))

    values = {
        "user_id": plane.ids["user"], "device_id": plane.ids["device"], "backbone_id": plane.ids["backbone"],
        "key_id": plane.ids["key"], "schedule_id": plane.ids["schedule"], "object_id": plane.ids["user"],
        "name": "u9", "plan": "free", "team": "red", "kind": "evaluate", "model_hash": "1" * 64, "level": "user",
        "resource": "bytes_up_per_day", "action": "user.created", "opened_from": "2026-01-01T00:00:00Z",
        "opened_to": "2030-01-01T00:00:00Z", "day_from": "2026-01-01", "day_to": "2026-12-31",
    }  # fmt: skip
    states = {"/api/v1/sessions": "open", "/api/v1/jobs": "queued", "/api/v1/backbones": "serving"}
    engine = plane.app.state.services.database.engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        for path, orders, filters in lists(plane):
            queries: list[dict[str, str]] = [{"sort": order} for order in orders]
            for name in filters:
                value = states[path] if name == "state" else values.get(name)
                if name == "subject":
                    queries.append({"level": "user", "subject": plane.ids["user"]})
                else:
                    assert value is not None, f"a filter that this test does not know: {path} {name}"
                    queries.append({name: value})
            for query in queries:
                for role in ("operator", "device"):
                    seen.clear()
                    answer = plane.client.get(path, params=query, headers=plane.as_(role))
                    if answer.status_code == 403:
                        continue
                    assert answer.status_code == 200, answer.text
                    assert seen
                    for statement, parameters in list(seen):
                        plan = _plan(engine, statement, parameters)
                        assert "Seq Scan" not in plan, f"{path} {query} as {role}:\n{plan}"
    finally:
        event.remove(engine, "before_cursor_execute", note)


def _plan(engine: Any, statement: str, parameters: Any) -> str:
    with engine.connect() as connection:
        connection.execute(text("SET LOCAL enable_seqscan = off"))
        rows = connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars()
        return "\n".join(rows)


def test_usage_comes_as_csv_that_no_spreadsheet_takes_for_formulas(plane: Control) -> None:
    answer = plane.client.get("/api/v1/usage.csv", headers=plane.as_("operator"))
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert len(rows) == len(paged(plane, "/api/v1/usage", 50))
    names = {row["user"] for row in rows}
    assert {"'=1+1", "'+1", "'-1", "'@SUM(A1)", 'a,"b"'} <= names
    assert [row["day"] for row in rows] == sorted(row["day"] for row in rows)
    own = plane.client.get("/api/v1/usage.csv", headers=plane.as_("device")).text
    assert {row["user"] for row in csv.DictReader(io.StringIO(own))} == {"alice"}


def test_a_csv_of_several_pieces_is_whole(plane: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plane.client.get("/api/v1/usage.csv", headers=plane.as_("operator")).text
    monkeypatch.setattr("privatelora.platform.api.routes.usage.CHUNK", 4)
    assert plane.client.get("/api/v1/usage.csv", headers=plane.as_("operator")).text == whole


def test_series_are_thinned_to_the_mean_and_quantiles_to_the_worst(plane: Control) -> None:
    node, quantile = plane.ids["backbone"], "time_per_output_token_seconds.p95"
    with plane.database.write() as session:
        for at in range(6):
            values = {"num_sessions_running": float(at), quantile: at / 10}
            session.add(
                MetricPoint(backbone_id=node, at=FIRST + timedelta(seconds=10 * at), interval_s=10.0, values=values)
            )
    query = {
        "name": ["num_sessions_running", quantile],
        "since": FIRST.isoformat(),
        "until": (FIRST + timedelta(minutes=2)).isoformat(),
        "step_s": "30",
    }
    answer = plane.client.get("/api/v1/metrics", params=query, headers=plane.as_("overseer")).raise_for_status().json()
    found = {one["name"]: one["values"] for one in answer["series"]}
    assert found == {"num_sessions_running": [1.0, 4.0], quantile: [0.2, 0.5]}
    assert answer["complete"]

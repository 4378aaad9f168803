"""Changes over the API: repeated, guarded by versions, written to the audit log; and bad input that breaks nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from jsonschema_rs import Draft202012Validator
from sqlalchemy import select, update
from starlette.testclient import TestClient
from tests.support.control import Control, control
from tests.support.servers import PostgresServer, ValkeyServer

from privatelora.platform.api import create_app
from privatelora.platform.settings import load_settings
from privatelora.platform.tables import ApiKey, AuditEntry, IdempotentRequest, User, new_id

USERS, KEYS = "/api/v1/users", "/api/v1/api-keys"


@pytest.fixture(scope="module")
def plane(server: PostgresServer, valkey: ValkeyServer) -> Iterator[Control]:
    with control(server.database(), valkey.url) as running:
        yield running


def post(plane: Control, path: str, body: Any = None, role: str = "operator", **headers: str) -> httpx.Response:
    content = body if isinstance(body, str) else json.dumps(body)
    sent = {**plane.as_(role), "Content-Type": "application/json", **headers}
    answer: httpx.Response = plane.client.post(path, content="" if body is None else content, headers=sent)
    return answer


def as_holder_of(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# -- idempotency ------------------------------------------------------------------------------------------------------


def test_the_same_post_again_makes_nothing_and_is_answered_the_same(plane: Control) -> None:
    first = post(plane, USERS, {"name": "once"}, **{"Idempotency-Key": "k1"})
    again = post(plane, USERS, {"name": "once"}, **{"Idempotency-Key": "k1"})
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    assert again.headers["Idempotency-Replayed"] == "true"
    assert "Idempotency-Replayed" not in first.headers
    assert first.headers["Location"] == f"{USERS}/{first.json()['id']}"
    other = post(plane, USERS, {"name": "twice"}, **{"Idempotency-Key": "k1"})
    assert other.status_code == 422
    assert other.json()["errors"][0]["field"] == "header.Idempotency-Key"


def test_a_refused_post_frees_its_idempotency_key(plane: Control) -> None:
    assert post(plane, USERS, {"name": "alice"}, **{"Idempotency-Key": "k2"}).status_code == 409
    assert post(plane, USERS, {"name": "carol"}, **{"Idempotency-Key": "k2"}).status_code == 201


def test_the_same_post_while_the_first_runs_is_a_conflict_until_its_process_is_taken_for_lost(plane: Control) -> None:
    body = {"name": "slow"}
    post(plane, USERS, body, **{"Idempotency-Key": "k3"})
    with plane.database.write() as session:
        row = session.scalars(select(IdempotentRequest).where(IdempotentRequest.idempotency_key == "k3")).one()
        row.status = row.body = None
    answer = post(plane, USERS, body, **{"Idempotency-Key": "k3"})
    assert (answer.status_code, answer.headers["Retry-After"]) == (409, "1")
    with plane.database.write() as session:
        row = session.scalars(select(IdempotentRequest).where(IdempotentRequest.idempotency_key == "k3")).one()
        row.created_at = row.created_at.replace(year=2025)
        session.execute(update(User).where(User.name == "slow").values(name="was slow"))
    assert post(plane, USERS, body, **{"Idempotency-Key": "k3"}).status_code == 201


def test_a_key_is_shown_once_and_stored_nowhere(plane: Control) -> None:
    new = {"user_id": plane.ids["user"], "name": "laptop", "scope": "device"}
    first = post(plane, KEYS, new, **{"Idempotency-Key": "k4"}).json()
    again = post(plane, KEYS, new, **{"Idempotency-Key": "k4"}).json()
    assert again["id"] == first["id"]
    assert again["key"] is None and "shown once" in again["note"]
    assert plane.client.get("/api/v1/me", headers=as_holder_of(first["key"])).json()["key_id"] == first["id"]
    secret = first["key"].removeprefix(first["prefix"])
    with plane.database.read() as session:
        for table in (ApiKey, AuditEntry, IdempotentRequest):
            for row in session.scalars(select(table)):
                assert secret not in json.dumps({name: str(value) for name, value in vars(row).items()})
    assert secret not in plane.client.get(KEYS, headers=plane.as_("operator")).text


# -- versions ---------------------------------------------------------------------------------------------------------


def test_etags_spare_an_answer_and_guard_a_change(plane: Control) -> None:
    made = post(plane, USERS, {"name": "dave"}).json()
    path, operator = f"{USERS}/{made['id']}", plane.as_("operator")
    tag = plane.client.get(path, headers=operator).headers["ETag"]
    known = plane.client.get(path, headers=operator | {"If-None-Match": f'"other", {tag}'})
    assert (known.status_code, known.content) == (304, b"")
    changed = plane.client.patch(path, json={"plan": "pro"}, headers=operator | {"If-Match": tag})
    assert (changed.status_code, changed.json()["plan"], changed.json()["version"]) == (200, "pro", 2)
    late = plane.client.patch(path, json={"plan": "free"}, headers=operator | {"If-Match": tag})
    assert late.status_code == 412
    assert plane.client.delete(path, headers=operator | {"If-Match": tag}).status_code == 412
    for nonsense in ("", "x", 'W/"2"', '"', '"2'):
        assert plane.client.delete(path, headers=operator | {"If-Match": nonsense}).status_code in (412, 422)
    assert plane.client.get(path, headers=operator | {"If-None-Match": tag}).status_code == 200
    assert plane.client.delete(path, headers=operator | {"If-Match": changed.headers["ETag"]}).status_code == 204


# -- keys -------------------------------------------------------------------------------------------------------------


def test_a_key_is_rotated_with_grace_and_revoked_at_once(plane: Control) -> None:
    key_id, old = plane.another_key(plane.ids["user"], scope="device")  # type: ignore[arg-type]  # a scope's text
    made = post(plane, f"{KEYS}/{key_id}/rotate", {"grace_s": 60}, "device").json()
    assert made["replaces"] == key_id
    for key in (old, made["key"]):
        assert plane.client.get("/api/v1/me", headers=as_holder_of(key)).status_code == 200
    assert post(plane, f"{KEYS}/{key_id}/revoke", role="device").status_code == 200
    told = plane.client.get("/api/v1/me", headers=as_holder_of(old))
    assert (told.status_code, told.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert post(plane, f"{KEYS}/{made['id']}/rotate", {"grace_s": 0}, "device").status_code == 201
    assert plane.client.get("/api/v1/me", headers=as_holder_of(made["key"])).status_code == 401


def test_a_device_key_becomes_no_operator_by_rotating_one(plane: Control) -> None:
    me = plane.client.get("/api/v1/me", headers=plane.as_("operator")).json()
    _, device = plane.another_key(me["user_id"], scope="device")  # type: ignore[arg-type]  # a scope's text
    path = f"{KEYS}/{me['key_id']}"
    for action, body in (("rotate", {"grace_s": 60}), ("revoke", {})):
        answer = plane.client.post(f"{path}/{action}", json=body, headers=as_holder_of(device))
        assert answer.status_code == 403
    assert plane.client.get("/api/v1/me", headers=plane.as_("operator")).status_code == 200


def test_the_last_operator_stays_one(plane: Control) -> None:
    me = plane.client.get("/api/v1/me", headers=plane.as_("operator")).json()["user_id"]
    for change in ({"role": "member"}, {"disabled": True}):
        assert plane.client.patch(f"{USERS}/{me}", json=change, headers=plane.as_("operator")).status_code == 409
    assert plane.client.delete(f"{USERS}/{me}", headers=plane.as_("operator")).status_code == 409


def test_a_disabled_user_is_refused_at_once(plane: Control) -> None:
    user, _, key = plane.user("erin", "member", "device")  # type: ignore[arg-type]  # their texts
    assert plane.client.delete(f"{USERS}/{user}", headers=plane.as_("operator")).status_code == 204
    assert plane.client.get("/api/v1/me", headers=as_holder_of(key)).status_code == 401


def test_every_change_is_in_the_audit_log_with_who_and_why_refused_ones_are_not(plane: Control) -> None:
    answer = post(plane, USERS, {"name": "frank"}, **{"X-Request-ID": "ticket-7"})
    assert answer.headers["X-Request-ID"] == "ticket-7"
    post(plane, USERS, {"name": "frank"})
    query = {"object_id": answer.json()["id"]}
    (entry,) = plane.client.get("/api/v1/audit-log", params=query, headers=plane.as_("overseer")).json()["items"]
    me = plane.client.get("/api/v1/me", headers=plane.as_("operator")).json()
    assert (entry["action"], entry["user_id"], entry["key_id"]) == ("user.created", me["user_id"], me["key_id"])
    assert (entry["request_id"], entry["address"]) == ("ticket-7", "127.0.0.1")


# -- bad input --------------------------------------------------------------------------------------------------------

HOSTILE = ['"\\ud800"', '"a\\u0000b"', "NaN", "Infinity", "1e999", "[" * 300 + "]" * 300, '{"\\ud800": 1}']


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_what_could_not_be_shown_again_is_not_kept(plane: Control, value: str) -> None:
    hook = f'"kind": "webhook", "params": {{"url": "http://127.0.0.1:1/x", "payload": {{"a": {value}}}}}'
    for path, body in (
        ("/api/v1/jobs", f"{{{hook}}}"),
        ("/api/v1/schedules", f'{{"name": "{new_id("x")}", "cron": "0 2 * * *", {hook}}}'),
        (USERS, f'{{"name": {value}}}'),
        ("/api/v1/quotas", f'{{"level": "plan", "subject": {value}, "resource": "bytes_up_per_day", "limit": 1}}'),
    ):
        answer = post(plane, path, body)
        assert answer.status_code == 422, answer.text
        assert answer.json()["errors"][0]["field"].startswith("body")
        assert plane.client.get(path, headers=plane.as_("operator")).status_code == 200


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, '{"name": ' + "9" * 5000 + "}", "\xff", '{"name": "a", "surprise": 1}', '"name"', "null"],
)
def test_a_body_that_is_no_user_is_refused_with_the_field(plane: Control, text: str) -> None:
    answer = post(plane, USERS, text)
    assert answer.status_code == 422
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["errors"]


@pytest.mark.parametrize(
    "query",
    [
        "limit=0", "limit=201", "limit=" + "9" * 400, "limit=1.5", "limit=x", "sort=plan", "name=%00", "name=a%0A",
        "surprise=1", "cursor=", "sort=-id;drop",
    ],
)  # fmt: skip
def test_a_bad_query_is_refused_with_the_field(plane: Control, query: str) -> None:
    answer = plane.client.get(f"{USERS}?{query}", headers=plane.as_("operator"))
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"].startswith("query.")


def test_sql_in_a_value_is_a_value(plane: Control) -> None:
    text = "x'; DROP TABLE users; --"
    assert post(plane, USERS, {"name": text}).status_code == 201
    found = plane.client.get(USERS, params={"name": text}, headers=plane.as_("operator")).json()["items"]
    assert [user["name"] for user in found] == [text]


@pytest.mark.parametrize("told", ["a b", "x" * 41, "é", "a\tb", ""])
def test_a_request_id_that_is_not_sane_is_replaced(plane: Control, told: str) -> None:
    answer = plane.client.get("/healthz", headers={"X-Request-ID": told.encode()})  # type: ignore[dict-item]  # raw
    assert answer.headers["X-Request-ID"] != told
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_a_wrong_method_names_every_right_one(plane: Control) -> None:
    answer = plane.client.post(f"{USERS}/{plane.ids['user']}", headers=plane.as_("operator"))
    assert (answer.status_code, answer.headers["Allow"]) == (405, "DELETE, GET, PATCH")


def test_a_report_holds_numbers_and_nothing_that_looks_like_one(plane: Control) -> None:
    device, headers = plane.ids["device"], plane.as_("device")
    (offer,) = plane.client.post(f"/api/v1/devices/{device}/offers", headers=headers).json()["items"]
    said = {"device_id": device, "fence": offer["fence"]}
    path = f"/api/v1/jobs/{offer['id']}"
    for word in ("accept", "start"):
        assert plane.client.post(f"{path}/{word}", json=said, headers=headers).status_code == 200
    for value in ("1.5", True, None, [1.0], {"a": 1.0}):
        answer = plane.client.post(f"{path}/result", json=said | {"report": {"loss": value}}, headers=headers)
        assert answer.status_code == 422, value
        assert answer.json()["errors"][0]["field"].startswith("body.report")


# -- what is away -----------------------------------------------------------------------------------------------------


def test_a_database_that_is_away_is_told_as_503_and_without_its_address(valkey: ValkeyServer) -> None:
    away = "postgresql://someone:hunter2@127.0.0.1:1/secret-name"
    app = create_app(load_settings({"database_url": away, "valkey_url": valkey.url}))
    with TestClient(app, raise_server_exceptions=False) as client:
        for path in ("/api/v1/me", "/api/v1/users", "/metrics", "/readyz", "/v1/info"):
            answer = client.get(path, headers=as_holder_of("plk_" + "x" * 43))
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2"), answer.text
            assert "hunter2" not in answer.text and "secret-name" not in answer.text
            body = answer.json()
            assert body["code"] == "admission" if path == "/v1/info" else "database" in body["detail"]
        assert client.get("/healthz").status_code == 200


def test_events_and_readiness_say_that_valkey_is_away_and_changes_go_on(server: PostgresServer) -> None:
    with control(server.database(), "redis://127.0.0.1:1/0") as running:
        assert running.client.get("/api/v1/events", headers=running.as_("operator")).status_code == 503
        told = running.client.get("/readyz")
        assert (told.status_code, told.json()["detail"]) == (503, "Valkey does not answer")
        assert post(running, USERS, {"name": "grace"}).status_code == 201
        assert post(running, "/api/v1/jobs", {"kind": "usage-rollup"}).status_code == 201


# -- the document -----------------------------------------------------------------------------------------------------


def test_every_operation_is_described_with_examples_that_fit_and_problems(plane: Control) -> None:
    document = plane.app.openapi()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            what = f"{method} {path}"
            assert operation["summary"] and operation["description"] and operation["tags"], what
            assert ("security" in operation) == (path not in ("/healthz", "/readyz")), what
            if path.startswith("/api/"):
                assert {"401", "429", "503"} <= set(operation["responses"]), what
            for answer in (operation.get("requestBody", {}), *operation["responses"].values()):
                for media in answer.get("content", {}).values():
                    schema = media["schema"] | {"components": document["components"]}
                    Draft202012Validator(schema, validate_formats=True).validate(media["example"])

"""Every route, as every role, on somebody else's object: who may, who may not, and to whom it does not exist.

The table names every operation of the OpenAPI document; one that is missing fails the test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import update
from tests.support.control import Control, control
from tests.support.servers import PostgresServer, ValkeyServer

from privatelora.platform.tables import ApiKey, Scope, User, utc_now

BAD_KEYS = ("none", "wrong", "revoked")  # refused with 401 wherever a key is needed
GOOD_KEYS = ("operator", "overseer", "device", "reader", "other")


@dataclass(frozen=True)
class Rule:
    """What each role gets: operator, read-only operator, the owner's device and read-only keys, another's device key.

    fresh : whether each role needs an object of its own, since the route changes it.
    """

    statuses: tuple[int, int, int, int, int]
    body: dict[str, Any] | None = None
    fresh: bool = False
    open: bool = field(default=False)  # needs no key


HELD = {"device_id": "{device}", "fence": 1}
REPORT = {"loss": 1.0, "tokens": 1, "examples": 1, "seconds": 1.0, "bytes_up": 1, "bytes_down": 1}
ALL = (200, 200, 200, 200, 200)
OVERSEERS = (200, 200, 403, 403, 403)
OWN = (200, 200, 200, 200, 404)  # of alice: bob does not know it
RULES: dict[tuple[str, str], Rule] = {
    ("get", "/healthz"): Rule(ALL, open=True),
    ("get", "/readyz"): Rule(ALL, open=True),
    ("get", "/metrics"): Rule(OVERSEERS),
    ("get", "/v1/info"): Rule((503, 503, 503, 503, 503)),  # no backbone here
    ("get", "/api/v1/me"): Rule(ALL),
    ("get", "/api/v1/users"): Rule((200, 200, 403, 403, 403)),
    ("post", "/api/v1/users"): Rule((201, 403, 403, 403, 403), {"name": "new {role}"}),
    ("get", "/api/v1/users/{user_id}"): Rule(OWN),
    ("patch", "/api/v1/users/{user_id}"): Rule((200, 403, 403, 403, 403), {"plan": "free"}),
    ("delete", "/api/v1/users/{user_id}"): Rule((204, 403, 403, 403, 403)),
    ("get", "/api/v1/api-keys"): Rule(ALL),
    ("post", "/api/v1/api-keys"): Rule(
        (201, 403, 403, 403, 403), {"user_id": "{user}", "name": "k", "scope": "device"}
    ),
    ("get", "/api/v1/api-keys/{key_id}"): Rule(OWN),
    ("delete", "/api/v1/api-keys/{key_id}"): Rule((204, 403, 204, 403, 404), fresh=True),
    ("post", "/api/v1/api-keys/{key_id}/rotate"): Rule((201, 403, 201, 403, 404), {"grace_s": 0}, fresh=True),
    ("post", "/api/v1/api-keys/{key_id}/revoke"): Rule((200, 403, 200, 403, 404), fresh=True),
    ("get", "/api/v1/devices"): Rule(ALL),
    ("get", "/api/v1/devices/{device_id}"): Rule(OWN),
    ("delete", "/api/v1/devices/{device_id}"): Rule((204, 403, 204, 403, 404), fresh=True),
    ("put", "/api/v1/installations/{installation}"): Rule((200, 403, 200, 403, 200), {"allows": ["evaluate"]}),
    ("post", "/api/v1/devices/{device_id}/offers"): Rule((403, 403, 200, 403, 404), fresh=True),
    ("post", "/api/v1/jobs/{job_id}/accept"): Rule((403, 403, 409, 403, 404), HELD, fresh=True),
    ("post", "/api/v1/jobs/{job_id}/start"): Rule((403, 403, 409, 403, 404), HELD, fresh=True),
    ("post", "/api/v1/jobs/{job_id}/heartbeat"): Rule((403, 403, 409, 403, 404), HELD, fresh=True),
    ("post", "/api/v1/jobs/{job_id}/refuse"): Rule((403, 403, 409, 403, 404), HELD | {"reason": "no"}, fresh=True),
    ("post", "/api/v1/jobs/{job_id}/fail"): Rule((403, 403, 409, 403, 404), HELD | {"error": "x"}, fresh=True),
    ("post", "/api/v1/jobs/{job_id}/result"): Rule((403, 403, 409, 403, 404), HELD | {"report": REPORT}, fresh=True),
    ("get", "/api/v1/backbones"): Rule(OVERSEERS),
    ("get", "/api/v1/backbones/{backbone_id}"): Rule(OVERSEERS),
    ("get", "/api/v1/sessions"): Rule(ALL),
    ("get", "/api/v1/sessions/{session_id}"): Rule(OWN),
    ("post", "/api/v1/sessions/{session_id}/drain"): Rule((200, 403, 403, 403, 403), fresh=True),
    ("post", "/api/v1/sessions/{session_id}/end"): Rule((200, 403, 200, 403, 404), fresh=True),
    ("get", "/api/v1/quotas"): Rule(ALL),
    ("post", "/api/v1/quotas"): Rule(
        (201, 403, 403, 403, 403),
        {"level": "plan", "subject": "p {role}", "resource": "tokens_per_minute", "limit": 10},
    ),
    ("get", "/api/v1/quotas/{quota_id}"): Rule(OWN),
    ("patch", "/api/v1/quotas/{quota_id}"): Rule((200, 403, 403, 403, 403), {"limit": 9}, fresh=True),
    ("delete", "/api/v1/quotas/{quota_id}"): Rule((204, 403, 403, 403, 403), fresh=True),
    ("get", "/api/v1/job-kinds"): Rule(ALL),
    ("get", "/api/v1/jobs"): Rule(ALL),
    ("post", "/api/v1/jobs"): Rule((201, 403, 403, 403, 403), {"kind": "evaluate", "device_id": "{device}"}),
    ("get", "/api/v1/jobs/{job_id}"): Rule(OWN),
    ("post", "/api/v1/jobs/{job_id}/cancel"): Rule((200, 403, 200, 403, 404), fresh=True),
    ("get", "/api/v1/schedules"): Rule(OVERSEERS),
    ("post", "/api/v1/schedules"): Rule(
        (201, 403, 403, 403, 403), {"name": "s {role}", "kind": "usage-rollup", "cron": "0 2 * * *"}
    ),
    ("get", "/api/v1/schedules/{schedule_id}"): Rule(OVERSEERS),
    ("patch", "/api/v1/schedules/{schedule_id}"): Rule((200, 403, 403, 403, 403), {"priority": 1}, fresh=True),
    ("delete", "/api/v1/schedules/{schedule_id}"): Rule((204, 403, 403, 403, 403), fresh=True),
    ("get", "/api/v1/usage"): Rule(ALL),
    ("get", "/api/v1/usage.csv"): Rule(ALL),
    ("get", "/api/v1/adapters"): Rule(ALL),
    ("get", "/api/v1/adapters/{sha256}"): Rule(ALL),
    ("get", "/api/v1/models"): Rule(ALL),
    ("get", "/api/v1/models/{sha256}"): Rule(ALL),
    ("get", "/api/v1/audit-log"): Rule(OVERSEERS),
    ("get", "/api/v1/metrics"): Rule(OVERSEERS),
    ("get", "/api/v1/events"): Rule(ALL),  # without end: only that a bad key gets none is tried here
}


@pytest.fixture(scope="module")
def plane(server: PostgresServer, valkey: ValkeyServer) -> Iterator[Control]:
    with control(server.database(), valkey.url, wrong_keys_per_minute=10**6) as running:
        with running.database.write() as session:
            bad, running.keys["revoked"] = running.another_key(running.ids["user"], Scope.DEVICE)
            session.execute(update(ApiKey).where(ApiKey.id == bad).values(revoked_at=utc_now()))
        running.keys["wrong"] = "plk_" + "x" * 43
        yield running


def operations(plane: Control) -> set[tuple[str, str]]:
    return {(method, path) for path, methods in plane.app.openapi()["paths"].items() for method in methods}


def ask(plane: Control, method: str, path: str, role: str, rule: Rule) -> int:
    ids = plane.ids | (plane.objects() if rule.fresh else {})
    words = {**ids, "sha256": ids["adapter"] if "adapters" in path else ids["model"], "role": role}
    words |= {f"{name}_id": value for name, value in ids.items()}
    body = None if rule.body is None else {name: _filled(value, words) for name, value in rule.body.items()}
    headers = {} if role == "none" else plane.as_(role)
    answer = plane.client.request(method, path.format(**words), headers=headers, json=body)
    if (method, path) == ("delete", "/api/v1/users/{user_id}"):  # alice was disabled; the others go on as her
        with plane.database.write() as session:
            session.execute(update(User).where(User.id == plane.ids["user"]).values(disabled_at=None))
    return answer.status_code


def _filled(value: Any, words: dict[str, str]) -> Any:
    return value.format(**words) if isinstance(value, str) else value


def test_the_table_has_every_operation(plane: Control) -> None:
    assert operations(plane) == set(RULES)


@pytest.mark.parametrize("role", BAD_KEYS)
def test_no_route_but_health_answers_without_a_good_key(plane: Control, role: str) -> None:
    found = {op: ask(plane, *op, role, rule) for op, rule in RULES.items()}
    assert {op for op, status in found.items() if status != 401} == {op for op, rule in RULES.items() if rule.open}


@pytest.mark.parametrize("role", GOOD_KEYS)
def test_each_role_gets_what_the_table_says_and_no_more(plane: Control, role: str) -> None:
    at = GOOD_KEYS.index(role)
    for (method, path), rule in RULES.items():
        if path != "/api/v1/events":
            status = ask(plane, method, path, role, rule)
            assert status == rule.statuses[at], f"{method} {path} as {role}: {status}"


def test_a_device_key_of_an_operator_gets_no_key_that_sees_more(plane: Control) -> None:
    operator = plane.client.get("/api/v1/me", headers=plane.as_("operator")).json()["user_id"]
    reading, _ = plane.another_key(operator, Scope.READ_ONLY)
    _, plane.keys["operators device"] = plane.another_key(operator, Scope.DEVICE)
    headers = plane.as_("operators device")
    assert plane.client.get("/api/v1/audit-log", headers=headers).status_code == 403
    for word in ("rotate", "revoke"):
        answer = plane.client.post(f"/api/v1/api-keys/{reading}/{word}", headers=headers, json={})
        assert answer.status_code == 403, answer.text


@pytest.mark.parametrize("role", ["device", "reader", "other"])
def test_lists_hold_nothing_of_anybody_else(plane: Control, role: str) -> None:
    mine = plane.client.get("/api/v1/me", headers=plane.as_(role)).json()["user_id"]
    for name in ("api-keys", "devices", "sessions", "jobs", "usage"):
        items = plane.client.get(f"/api/v1/{name}?limit=200", headers=plane.as_(role)).json()["items"]
        assert {item["user_id"] for item in items} <= {mine}
        assert bool(items) or (role == "other" and name != "api-keys")
        other = plane.ids["user"] if role == "other" else "usr_01JDMV5Z3T8Q6W9E2R4Y7H1K0N"
        refused = plane.client.get(f"/api/v1/{name}?user_id={other}", headers=plane.as_(role))
        assert refused.status_code == 403

"""Every route, as every role, with whatever schemathesis makes up: no server error, and nothing that is not documented.

SCHEMATHESIS_EXAMPLES=200 python -m pytest tests/platform/test_schemathesis.py     longer, by hand
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode
from tests.support.control import ROLES, Control, control
from tests.support.servers import PostgresServer, ValkeyServer

EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "2"))
ENDLESS = "/api/v1/events"  # which `test_api_server.py` reads
NAMES = {"sha256": "adapter"}  # a path's parameter -> which object's id it is; others by their names


@pytest.fixture(scope="module")
def plane(server: PostgresServer, valkey: ValkeyServer) -> Iterator[Control]:
    with control(server.database(), valkey.url) as running:
        yield running


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
@pytest.mark.parametrize("role", ROLES)
def test_no_input_breaks_a_route_and_every_answer_is_documented(
    plane: Control, role: str, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_dict(plane.app.openapi()).exclude(path=ENDLESS)
    chance = random.Random(role)
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
            phases=(Phase.explicit, Phase.generate), suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def check(case: Any) -> None:
            sent = _sent(case, plane, role, chance)
            answer = plane.client.request(**sent)
            told = f"{sent} as {role}: {answer.status_code} {answer.text[:300]}"
            documented = case.operation.definition.raw["responses"]
            no_backbone = case.path == "/v1/info" and answer.status_code == 503
            assert answer.status_code < 500 or no_backbone, f"a server error: {told}"
            assert str(answer.status_code) in documented, f"not documented: {told}"
            if answer.status_code >= 400 and case.path != "/v1/info":
                assert answer.headers["content-type"] == "application/problem+json", told
                assert answer.json()["status"] == answer.status_code

        with suppress(Unsatisfiable):  # some have nothing that could be made invalid
            check()


def _sent(case: Any, plane: Control, role: str, chance: random.Random) -> dict[str, Any]:
    """The request that a case stands for; half of the ids in paths and bodies are of what there is."""
    kwargs = case.as_transport_kwargs(base_url="http://testserver")
    path = case.path
    for name, value in (case.path_parameters or {}).items():
        known = plane.ids.get(NAMES.get(name, name.removesuffix("_id")))
        chosen = known if known is not None and chance.random() < 0.7 else str(value)
        path = path.replace("{" + name + "}", quote(chosen, safe=""))
    body = kwargs.get("json")
    if isinstance(body, dict):
        for name in body:
            known = plane.ids.get(name.removesuffix("_id"))
            if name.endswith("_id") and known is not None and chance.random() < 0.7:
                body[name] = known
    sent: dict[str, Any] = {"method": kwargs["method"], "url": "http://testserver" + path}
    sent["headers"] = {**{str(k): str(v) for k, v in (kwargs.get("headers") or {}).items()}, **plane.as_(role)}
    sent["params"] = kwargs.get("params")
    if body is not None:
        sent["json"] = body
    elif kwargs.get("data") is not None:
        sent["content"] = kwargs["data"] if isinstance(kwargs["data"], bytes | str) else str(kwargs["data"])
    return sent

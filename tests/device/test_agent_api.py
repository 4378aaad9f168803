"""The agent and the REST API, each in a process of its own: a job from an operator's request to its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from tests.support.fleet import Fleet
from tests.support.managed import managed
from tests.support.servers import valkey_server
from tests.support.service import running_process

from privatelora.device.control import ControlPlane
from privatelora.device.installation import installation_of
from privatelora.platform.tables import Role, Scope

API = ("privatelora.platform", "api", "--json")
MAIN = "from privatelora.device.cli import main; main()"
POLICY = '[allow.finetune-round]\ndata = "rows.jsonl"\n[allow.evaluate]\ndata = "none.jsonl"\n'


def test_a_job_that_an_operator_asks_for_runs_on_the_device_and_is_reported(fleet: Fleet, tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/control.db"
    (tmp_path / "policy.toml").write_text(POLICY)
    fleet.service("llama")  # whose parts and sets are there by now
    (tmp_path / "data").symlink_to(fleet.data_dir("llama"))
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"The code is {4071 + i}."}) + "\n" for i in range(4))
    )
    with (
        valkey_server() as valkey,
        managed(fleet.source("llama"), tmp_path, database, valkey.url) as control,
        running_process(
            API,
            (),
            tmp_path / "api.log",
            {"PRIVATELORA_DATABASE_URL": database, "PRIVATELORA_VALKEY_URL": valkey.url},
        ) as api,
    ):
        alice, operator = control.user("alice"), control.user("root", role=Role.OPERATOR, scope=Scope.OPERATOR)
        control.backbone()
        variables = {
            "PRIVATELORA_SERVER": api.url,
            "PRIVATELORA_TOKEN": alice.key,
            "PRIVATELORA_STORE_DIR": str(tmp_path / "store"),
            "PRIVATELORA_CACHE_DIR": str(fleet.folder / "cache"),
        }

        # as an earlier run of the agent would have made it known
        known = ControlPlane(api.url, alice.key, timeout_s=10.0)
        known.register(installation_of(tmp_path / "store"), "", ["finetune-round"])
        known.close()
        headers = {"Authorization": f"Bearer {operator.key}"}
        with httpx.Client(base_url=f"{api.url}/api/v1", headers=headers) as rest:
            (device,) = rest.get("/devices").raise_for_status().json()["items"]
            jobs = []
            for kind, params in (("finetune-round", {"epochs": 1, "batch_size": 2}), ("evaluate", {})):
                body = {"kind": kind, "params": params, "device_id": device["id"]}
                jobs.append(rest.post("/jobs", json=body).raise_for_status().json()["id"])
            agent = [sys.executable, "-c", MAIN, "agent", "--policy", str(tmp_path / "policy.toml"), "--once"]
            ran = subprocess.run(
                [*agent, "--rank", "8", "--device-name", "laptop"],
                env=os.environ | variables,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert ran.returncode == 0, ran.stderr
            (device,) = rest.get("/devices").raise_for_status().json()["items"]
            trained, refused = (rest.get(f"/jobs/{job}").raise_for_status().json() for job in jobs)
            session: dict[str, Any] = {}
            while session.get("state") != "closed":  # which its backbone writes within its `flush_s`
                (session,) = rest.get("/sessions").raise_for_status().json()["items"]
    assert (trained["state"], trained["attempts"]) == ("done", 1), ran.stderr
    assert (device["name"], device["allows"]) == ("laptop", ["evaluate", "finetune-round"])
    assert trained["result"]["steps"] == 2
    assert (refused["state"], refused["attempts"]) == ("refused", 0)
    assert (session["user_id"], session["device_id"]) == (alice.id, device["id"])
    assert session["bytes_up"] == pytest.approx(trained["result"]["bytes_up"])

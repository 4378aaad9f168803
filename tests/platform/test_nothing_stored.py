"""What a service stores and logs after a real run holds no prompt, no token, no tensor and no key.

A device learns, chats and does a job at `privatelora up`; then everything in the data directory but the published model
and sets, all that was logged, and Valkey's own file are searched. The same search finds what is planted there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2 as httpx
import pytest
from tests.support.recorder import Search, tensor_needles, text_needles, token_needles
from tests.support.service import ServiceProcess, running_process
from tests.support.tiny import tiny_model
from torch import Tensor

from privatelora.device import DeviceSession

UP = ("privatelora.platform", "up", "--json")
SECRET = "the password of the garden gate is zinnia-4071-quartz"
ROWS = [{"prompt": "the password of the garden gate is", "completion": " zinnia-4071-quartz"}]
PUBLIC = ("models", "sets")  # published by hash, the same for everybody
OF_THIS_MACHINE = "token"  # the one key that is kept, for the user of the data directory


@dataclass
class Run:
    """What was left behind, and what must not be in it."""

    left: dict[str, bytes]
    search: Search
    needles: list[bytes]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with TemporaryDirectory(prefix="privatelora-stored-") as name:
        folder = Path(name)
        tiny_model("llama", folder / "model")
        options = ("--model", str(folder / "model"), "--dtype", "float32", "--data-dir", str(folder / "data"))
        environment = {"PRIVATELORA_TORCH_THREADS": "1", "PRIVATELORA_LOG_LEVEL": "debug"}
        with running_process(UP, options, folder / "up.log", environment) as up:
            texts, tokens, tensors, keys = _use(up, folder)
        needles = [*text_needles([*texts, *keys]), *token_needles(tokens), *tensor_needles(tensors)]
        yield Run(_left(folder), Search(needles), needles)


def _use(up: ServiceProcess, folder: Path) -> tuple[list[str], list[list[int]], dict[str, Tensor], list[str]]:
    """A user with a key of their own does what users do, and an operator looks at all of it."""
    admin = {"Authorization": f"Bearer {up.ready['admin_key']}"}
    with httpx.Client(base_url=up.url + "/api/v1", headers=admin) as api:
        user = api.post("/users", json={"name": "alice"}).raise_for_status().json()["id"]
        asked = {"user_id": user, "name": "laptop", "scope": "device"}
        key = api.post("/api-keys", json=asked, headers={"Idempotency-Key": "k"}).raise_for_status().json()["key"]
        with DeviceSession(up.url, token=key, rank=8, store_dir=folder / "store", cache_dir=folder / "cache") as me:
            me.finetune(ROWS * 3, epochs=2)
            answer = me.generate(SECRET, max_new_tokens=12)
            tokens = [me.encode(SECRET), *(list(one.tokens) for one in me.examples(ROWS).examples)]
            tensors = {name: value.detach().clone() for name, value in me.adapter.named_parameters()}
        for path in ("sessions", "usage", "audit-log", "devices", "jobs", "metrics", "quotas", "users", "api-keys"):
            api.get("/" + path).raise_for_status()
        api.get("/users", params={"plan": SECRET[:20]})
    return [SECRET, ROWS[0]["completion"].strip(), answer], tokens, tensors, [key, str(up.ready["admin_key"])]


def _left(folder: Path) -> dict[str, bytes]:
    data = folder / "data"
    found = {"up.log": (folder / "up.log").read_bytes()}
    for path in sorted(data.rglob("*")):
        name = path.relative_to(data)
        if path.is_file() and name.parts[0] not in PUBLIC and str(name) != OF_THIS_MACHINE:
            found[str(name)] = path.read_bytes()
    return found


def test_nothing_that_is_stored_or_logged_holds_a_prompt_a_token_a_tensor_or_a_key(run: Run) -> None:
    assert {"up.log", "control.db"} <= set(run.left)
    assert any(name.startswith("valkey/") for name in run.left)
    for name, content in run.left.items():
        assert run.search.find(content) == [], name


def test_the_search_finds_what_is_planted(run: Run) -> None:
    for planted in run.needles[:: max(1, len(run.needles) // 50)]:
        assert run.search.find(run.left["control.db"] + planted) != []


def test_the_run_left_what_operators_need(run: Run) -> None:
    assert b"session closed" in run.left["up.log"]
    assert b"alice" in run.left["control.db"]

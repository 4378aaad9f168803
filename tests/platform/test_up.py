"""`privatelora up`, run for real: one command, one URL, nothing lost when a part dies and nothing left when it ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2 as httpx
import psutil
import pytest
from tests.support.servers import PostgresServer, ValkeyServer
from tests.support.service import ServiceProcess, running_process
from tests.support.tiny import tiny_model

from privatelora.device import DeviceSession
from privatelora.platform import supervisor
from privatelora.platform.supervisor import Part, Supervisor
from privatelora.protocol.errors import PrivateLoraError

UP = ("privatelora.platform", "up", "--json")
PARTS = {"valkey-server", "api", "worker", "beat", "backbone"}
ROWS = [{"prompt": "the word is", "completion": " x"}, {"prompt": "the other is", "completion": " y"}]
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="privatelora-up-") as name:
        tiny_model("llama", Path(name) / "model")
        yield Path(name)


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[ServiceProcess]:
    """A service with everything embedded, which all tests here share."""
    with running_process(UP, options(folder, "data"), folder / "up.log", {"PRIVATELORA_TORCH_THREADS": "1"}) as up:
        yield up


@pytest.fixture(scope="module")
def admin_key(running: ServiceProcess) -> str:
    """What the first start printed."""
    key: str = running.ready["admin_key"]
    return key


def options(folder: Path, data: str) -> tuple[str, ...]:
    return ("--model", str(folder / "model"), "--dtype", "float32", "--data-dir", str(folder / data))


def connect(running: ServiceProcess, folder: Path) -> DeviceSession:
    return DeviceSession(
        running.url, token=running.token, rank=8, store_dir=folder / "store", cache_dir=folder / "cache"
    )


def ask(running: ServiceProcess, path: str, key: str) -> httpx.Response:
    return httpx.get(running.url + path, headers={"Authorization": f"Bearer {key}"}, trust_env=False)


def parts_of(running: ServiceProcess) -> dict[str, psutil.Process]:
    """The processes that the supervisor has started, by what they are."""
    found = {}
    for child in psutil.Process(running.process.pid).children():
        with suppress(psutil.NoSuchProcess, IndexError):  # it has just ended
            words = child.cmdline()
            found[words[3] if words[0] == sys.executable else Path(words[0]).name] = child
    return found


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def gone(processes: list[psutil.Process]) -> Callable[[], bool]:
    return lambda: all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in processes)


def tree(running: ServiceProcess) -> list[psutil.Process]:
    supervisor_process = psutil.Process(running.process.pid)
    return [supervisor_process, *supervisor_process.children(recursive=True)]


def test_one_command_runs_every_part_and_prints_a_key_that_operates(running: ServiceProcess, admin_key: str) -> None:
    assert set(running.ready) == {"url", "admin_key", "token_file"}
    assert set(parts_of(running)) == PARTS
    users = ask(running, "/api/v1/users", admin_key).json()["items"]
    assert {(user["name"], user["role"]) for user in users} == {("admin", "operator"), ("local", "member")}
    assert ask(running, "/api/v1/users", running.token).status_code == 403
    assert httpx.get(f"{running.url}/readyz", trust_env=False).status_code == 200


def test_a_device_of_this_machine_learns_and_generates_through_the_one_url_without_a_token(
    running: ServiceProcess, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIVATELORA_DATA_DIR", str(folder / "data"))
    monkeypatch.delenv("PRIVATELORA_TOKEN", raising=False)
    with DeviceSession(running.url, rank=8, store_dir=folder / "store", cache_dir=folder / "cache") as me:
        report = me.finetune(ROWS, epochs=3, learning_rate=0.02)
        assert report.history[-1].loss < report.history[0].loss
        assert isinstance(me.generate("the word is", max_new_tokens=3), str)


def test_secrets_are_in_no_argument_in_no_log_and_in_no_file_of_others(
    running: ServiceProcess, admin_key: str, folder: Path
) -> None:
    password = (folder / "data" / "valkey" / "password").read_text().strip()
    arguments = " ".join(word for process in tree(running) for word in process.cmdline())
    said = running.log.read_text()
    for secret in (admin_key, running.token, password):
        assert len(secret) >= 32
        assert secret not in arguments
        assert secret not in said
    files = [path for path in (folder / "data").rglob("*") if path.is_file()]
    assert {"control.db", "token", "password", "up.lock"} <= {path.name for path in files}
    open_to_others = [path for path in files if stat.S_IMODE(path.stat().st_mode) & 0o077]
    assert {path.parent.name for path in open_to_others} <= {"sets"}  # of A and B, which are public
    assert [path for path in files if admin_key.encode() in path.read_bytes()] == []


def test_a_data_directory_in_use_is_refused_with_the_process_that_has_it(running: ServiceProcess, folder: Path) -> None:
    with pytest.raises(RuntimeError) as refused, running_process(UP, options(folder, "data"), folder / "second.log"):
        pass
    said = str(refused.value).splitlines()
    assert re.fullmatch(rf"error: .*is in use by process {running.process.pid}; .*--data-dir", said[-1])
    assert len(said) == 2


def test_each_part_that_is_killed_comes_back_and_devices_go_on(
    running: ServiceProcess, admin_key: str, folder: Path
) -> None:
    before = parts_of(running)
    for process in before.values():
        process.kill()
    until(lambda: set(parts_of(running)) == PARTS, "not all parts came back")
    after = parts_of(running)
    assert {name for name in PARTS if before[name].pid == after[name].pid} == set()

    def serves() -> bool:
        try:
            backbones = ask(running, "/api/v1/backbones?state=serving", admin_key).json()["items"]
            with connect(running, folder) as me:
                me.generate("again", max_new_tokens=1)
        except (httpx.HTTPError, PrivateLoraError, KeyError):
            return False
        return len(backbones) > 0

    until(serves, "no device was served again")
    said = running.log.read_text()
    assert all(
        re.search(rf"^{name} +\| ended \(by signal 9\); it is started again", said, re.MULTILINE)
        for name in ("valkey", "api", "worker", "beat", "backbone")
    )


def test_sigterm_and_sigkill_leave_nothing_and_later_starts_keep_the_keys(
    running: ServiceProcess, admin_key: str, folder: Path
) -> None:
    processes = tree(running)
    with connect(running, folder) as me:
        me.generate("an open session", max_new_tokens=1)
        begun = len(running.log.read_text())
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(PATIENCE_S) == 0
    until(gone(processes), "a process outlived SIGTERM")
    assert "Traceback" not in running.log.read_text()[begun:]

    token = running.token
    running.start()
    assert running.ready["admin_key"] is None
    assert running.token == token
    assert ask(running, "/api/v1/me", admin_key).json()["role"] == "operator"
    processes = tree(running)
    running.kill()
    until(gone(processes), "a process outlived the supervisor")


def test_urls_replace_the_embedded_parts_and_logs_are_json(
    folder: Path, server: PostgresServer, valkey: ValkeyServer
) -> None:
    urls = {"PRIVATELORA_DATABASE_URL": server.database(), "PRIVATELORA_VALKEY_URL": valkey.url}
    log = folder / "urls.log"
    with running_process(UP, (*options(folder, "urls"), "--log-format", "json"), log, urls) as up:
        assert set(parts_of(up)) == PARTS - {"valkey-server"}
        assert up.ready["admin_key"] is not None  # of another database
        users = ask(up, "/api/v1/users", up.ready["admin_key"]).json()["items"]
        assert [user["name"] for user in users] == ["local", "admin"]
    assert not (folder / "urls" / "control.db").exists()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"api", "backbone"} <= {line["process"] for line in lines}
    assert all(set(line) >= {"process", "event"} for line in lines)


def test_a_part_that_keeps_dying_is_given_up_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.01)
    shown: list[str] = []

    async def run() -> PrivateLoraError:
        failed: asyncio.Future[PrivateLoraError] = asyncio.get_running_loop().create_future()
        parts = Supervisor(lambda name, line: shown.append(line), failed.set_result)
        await parts.start(Part("frail", ["sh", "-c", "echo the reason >&2; exit 3"], os.environ))
        error = await failed
        await parts.stop([["frail"]], 1.0)
        return error

    message = asyncio.run(run()).message
    assert re.fullmatch(r"frail has ended 6 times in \d+ s, at last status 3; its last line was: the reason", message)
    assert shown.count("the reason") == 6


def test_what_refuses_to_start_for_good_reason_is_not_tried_again() -> None:
    async def run() -> PrivateLoraError:
        failed: asyncio.Future[PrivateLoraError] = asyncio.get_running_loop().create_future()
        parts = Supervisor(lambda name, line: None, failed.set_result)
        await parts.start(Part("wrong", ["sh", "-c", "echo 'error: no such model' >&2; exit 2"], os.environ))
        return await failed

    assert asyncio.run(run()).message == "no such model"


def test_a_part_that_ignores_sigterm_is_killed_with_all_that_it_started() -> None:
    async def run() -> list[psutil.Process]:
        said: asyncio.Queue[str] = asyncio.Queue()
        parts = Supervisor(lambda name, line: said.put_nowait(line), lambda error: None)
        stubborn = "trap '' TERM; sleep 600 & echo $$ $! >&2; wait"
        await parts.start(Part("stubborn", ["sh", "-c", stubborn], os.environ, grace_s=0.5))
        both = [psutil.Process(int(pid)) for pid in (await said.get()).split()]
        await parts.stop([["stubborn"]], 5.0)
        assert await said.get() == "did not end within 0.5 s; it is killed"
        return both

    until(gone(asyncio.run(run())), "a process outlived its part")

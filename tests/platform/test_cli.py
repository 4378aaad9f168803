"""`privatelora` as an operator uses it: help, a real service process, its settings, and adapter sets as files."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tests.support.certificate import certificate
from tests.support.fleet import Fleet
from tests.support.service import REPOSITORY, ServiceProcess, service
from tests.support.tiny import tiny_model
from typer.main import get_command
from typer.testing import CliRunner

from privatelora.device import DeviceSession
from privatelora.platform.cli import app
from privatelora.platform.cli_admin import admin

COMMAND = (sys.executable, "-m", "privatelora.platform")
ONE_WORD = ("up", "api", "worker", "beat", "backbone", "demo", "config", "adapters", "admin")
COMMANDS = (
    *([word] for word in ONE_WORD),
    *(["adapters", word] for word in ("list", "export", "import")),
    *(["admin", name] for name in get_command(admin).commands),
)


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`privatelora` with these arguments, to its end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PRIVATELORA_")}
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=REPOSITORY,
        env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def assert_one_line_error(done: subprocess.CompletedProcess[str], pattern: str) -> None:
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.fullmatch(rf"error: .*{pattern}.*", done.stderr.splitlines()[-1]), done.stderr


def places(running: ServiceProcess, directory: Path) -> dict[str, Any]:
    """What a device of its own needs, with ranks that fit a tiny model."""
    return {"token": running.token, "rank": 8, "store_dir": directory / "store", "cache_dir": directory / "cache"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    tiny_model("llama", directory)
    return directory


def test_every_command_explains_itself() -> None:
    for command in COMMANDS:
        shown = CliRunner().invoke(app, [*command, "--help"])
        assert shown.exit_code == 0
        assert "Usage" in shown.output
        assert "--help" in shown.output
    overview = CliRunner().invoke(app, ["--help"]).output
    assert all(word in overview for word in ONE_WORD)


def test_help_does_not_wait_for_torch() -> None:
    loads = "import sys; from privatelora.platform.cli import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loads], check=False).returncode == 0


def test_a_service_announces_its_real_port_and_keeps_its_token_to_itself(fleet: Fleet) -> None:
    running = fleet.service("llama")
    with urllib.request.urlopen(f"{running.url}/healthz") as answer:
        assert answer.status == 200
    token_file = fleet.data_dir("llama") / "token"
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
    assert token_file.read_text().strip() == running.token


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_service_cleanly(number: signal.Signals, model: Path, tmp_path: Path) -> None:
    with (
        service(model, tmp_path / "data") as running,
        DeviceSession(running.url, **places(running, tmp_path)) as me,
    ):
        me.generate("an open session does not keep it from ending", max_new_tokens=1)
        running.process.send_signal(number)
        assert running.process.wait(15) == 0
        assert "Traceback" not in running.log.read_text()


def test_a_signal_while_the_model_loads_stops_it_too(tmp_path: Path) -> None:
    arguments = [*COMMAND, "up", "--port", "0", "--data-dir", str(tmp_path)]
    with subprocess.Popen(arguments, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "reading the config" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(15) == 0
    assert "Traceback" not in said


def test_up_says_where_it_listens_and_where_its_token_is(model: Path, tmp_path: Path) -> None:
    arguments = [*COMMAND, "up", "--port", "0", "--model", str(model), "--data-dir", str(tmp_path / "data")]
    with subprocess.Popen(
        arguments, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as up:
        assert up.stdout is not None
        said = ""
        while "Ctrl-C" not in said:
            said += up.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert url is not None
        with urllib.request.urlopen(f"{url[0]}/healthz") as answer:
            assert answer.status == 200
        up.terminate()
    assert str(tmp_path / "data" / "token") in said
    assert re.search(r"admin key +plk_[\w-]{43}\n.*it is not shown again", said)


def test_a_port_in_use_is_reported_before_the_model_loads(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        started = time.monotonic()
        done = run("up", "--port", str(port), "--model", "no/such/model", "--data-dir", str(tmp_path))
    assert_one_line_error(done, rf"cannot listen on 127\.0\.0\.1:{port} \(Address already in use\).*--port")
    assert time.monotonic() - started < 60


def test_what_cannot_be_served_gives_one_line(tmp_path: Path) -> None:
    data = ("--port", "0", "--data-dir", str(tmp_path))
    assert_one_line_error(run("up", *data, "--model", "no/such/model/here"), "model source .* does not exist")
    assert_one_line_error(run("backbone", *data, "--default-placement", "first=x"), "--default-placement=first=x")
    assert_one_line_error(run("up", *data, PRIVATELORA_MAX_SESSIONS="many"), "PRIVATELORA_MAX_SESSIONS=many")
    assert_one_line_error(run("up", *data, "--database-url", "mysql://x/y"), "database mysql is not supported")
    assert_one_line_error(run("up", *data, "--host", "0.0.0.0"), "--host=0.0.0.0 .*PRIVATELORA_PUBLIC_URL")
    assert_one_line_error(run("api", "--port", "0"), "PRIVATELORA_DATABASE_URL and PRIVATELORA_VALKEY_URL")
    assert_one_line_error(run("admin", "--data-dir", str(tmp_path / "none"), "list-users"), "there is no control plane")


def test_a_service_offers_only_the_placements_that_it_was_told(model: Path, tmp_path: Path) -> None:
    options = ("--placements", "few-trips first=1,last=1", "--default-placement", "few-trips")
    with (
        service(model, tmp_path / "data", *options) as running,
        DeviceSession(running.url, **places(running, tmp_path)) as me,
    ):
        assert me.service.info.placements == ["few-trips", "first=1,last=1"]
        assert me.placement.describe(4) == "few-trips"


def test_a_service_with_a_certificate_is_reached_by_https(model: Path, tmp_path: Path) -> None:
    certfile, keyfile = certificate(tmp_path)
    with service(model, tmp_path / "data", "--certfile", str(certfile), "--keyfile", str(keyfile)) as running:
        assert running.url.startswith("https://127.0.0.1:")
        with DeviceSession(running.url, ca_file=certfile, **places(running, tmp_path)) as me:
            assert isinstance(me.generate("over TLS", max_new_tokens=4), str)


def test_config_prints_every_setting_and_its_origin() -> None:
    done = run("config", "--json", PRIVATELORA_PORT="9000", PRIVATELORA_PROT="9000")
    shown = json.loads(done.stdout)
    assert shown["port"] == {"value": "9000", "source": "environment PRIVATELORA_PORT"}
    assert shown["dtype"] == {"value": "bfloat16", "source": "default"}
    assert "PRIVATELORA_PROT is set, but nothing reads it" in done.stderr
    table = run("config").stdout
    assert all(re.search(rf"^{name} ", table, re.MULTILINE) for name in shown)


def test_a_set_moves_to_another_service_of_the_same_model_and_to_no_other(fleet: Fleet, tmp_path: Path) -> None:
    running = fleet.service("llama")
    with fleet.connect(running, rank=8) as me:
        wanted = me.service.info.default_sets["calibrated"]
    folder = fleet.data_dir("llama")
    listed = run("adapters", "list", "--data-dir", str(folder)).stdout
    assert wanted[:16] in listed
    assert "calibrated" in listed
    exported = run("adapters", "export", wanted[:12], str(tmp_path), "--data-dir", str(folder))
    file = Path(exported.stdout.strip())
    assert file == tmp_path / f"{wanted}.safetensors"

    same = ("--model", str(fleet.source("llama")), "--dtype", "float32", "--data-dir", str(tmp_path / "same"))
    assert run("adapters", "import", str(file), *same).stdout.startswith(wanted)
    assert wanted[:16] in run("adapters", "list", "--data-dir", str(tmp_path / "same")).stdout
    other = ("--model", str(fleet.source("qwen3")), "--dtype", "float32", "--data-dir", str(tmp_path / "other"))
    assert_one_line_error(run("adapters", "import", str(file), *other), "was made for model")
    assert_one_line_error(
        run("adapters", "export", "ffff", str(tmp_path), "--data-dir", str(folder)), "fits 0 published"
    )

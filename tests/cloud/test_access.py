"""Who may come in: a bearer token on every route, a token file for one owner, and TLS that a device checks."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import httpx2
import pytest
from fastapi.routing import APIRoute, APIWebSocketRoute
from tests.support.certificate import certificate
from tests.support.fleet import Fleet
from tests.support.service import ServiceProcess, service
from tests.support.wire import Wire
from websockets.exceptions import InvalidStatus

from privatelora.cloud.admission import TokenAdmission, local_token
from privatelora.cloud.endpoint import create_app
from privatelora.cloud.plane import DataPlane
from privatelora.device import DeviceSession
from privatelora.device.connection import ByteCount, Connection
from privatelora.device.service import Service
from privatelora.protocol.errors import AuthenticationError, ConfigurationError, ConnectionLostError
from privatelora.protocol.messages import BLOB_PATH, DATA_PLANE_PATH, INFO_PATH, ErrorInfo, parse

UNKNOWN = "0" * 64
ROUTES = {"GET": {INFO_PATH, BLOB_PATH + "/{sha256}", "/metrics"}, "WEBSOCKET": {DATA_PLANE_PATH}, "open": {"/healthz"}}
WRONG = [
    None,
    "",
    "Bearer",
    "Bearer wrong",
    "Basic {token}",
    "{token}",
    "Bearer {token}x",
    "Bearer x{token}",
    "Bearer {half}",
    "Bearer \xe9{token}",
]


@pytest.fixture(scope="module")
def running(fleet: Fleet) -> ServiceProcess:
    return fleet.service("llama")


def headers(running: ServiceProcess, form: str | None) -> dict[str, bytes]:
    if form is None:
        return {}
    value = form.format(token=running.token, half=running.token[: len(running.token) // 2])
    return {"Authorization": value.encode("latin-1")}


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_these_tests_know_every_route() -> None:
    app = create_app(cast(DataPlane, SimpleNamespace()))
    http = {route.path for route in app.routes if isinstance(route, APIRoute)}
    sockets = {route.path for route in app.routes if isinstance(route, APIWebSocketRoute)}
    assert http == ROUTES["GET"] | ROUTES["open"]
    assert sockets == ROUTES["WEBSOCKET"]
    assert len(app.routes) == len(http) + len(sockets)  # no page of documentation, no file of a schema


@pytest.mark.parametrize("form", WRONG)
@pytest.mark.parametrize("route", sorted(ROUTES["GET"]))
def test_http_without_the_token_is_401(running: ServiceProcess, route: str, form: str | None) -> None:
    published = Service(running.url, running.token).info.model.parts["embedding"].sha256
    for sha256 in (published, UNKNOWN):  # a stranger cannot even learn what is published
        answer = httpx2.get(running.url + route.format(sha256=sha256), headers=headers(running, form))
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        refused = parse(answer.content, ErrorInfo)
        assert refused.code == AuthenticationError.code
        assert "PRIVATELORA_TOKEN" in refused.message


@pytest.mark.parametrize("form", WRONG[:-1])  # the last is no header of a WebSocket at all: tests/faults
def test_the_websocket_without_the_token_is_401(running: ServiceProcess, form: str | None) -> None:
    given = {name: value.decode("latin-1") for name, value in headers(running, form).items()}
    with pytest.raises(InvalidStatus) as refused, Wire(running.url, None, given):
        pass
    assert refused.value.response.status_code == 401
    assert parse(refused.value.response.body, ErrorInfo).code == AuthenticationError.code


def test_the_token_opens_every_route(running: ServiceProcess) -> None:
    token = headers(running, "Bearer {token}")
    assert httpx2.get(running.url + INFO_PATH, headers=token).status_code == 200
    published = Service(running.url, running.token).info.model.parts["embedding"].sha256
    assert httpx2.get(f"{running.url}{BLOB_PATH}/{published}", headers=token).status_code == 200
    with Wire(running.url, running.token):
        pass


def test_health_needs_no_token_and_tells_nothing(running: ServiceProcess) -> None:
    answer = httpx2.get(running.url + "/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("name", [UNKNOWN, "token", "..%2Ftoken", "..%2F..%2Ftoken", "%2e%2e/token", "x" * 5000])
def test_only_published_files_can_be_downloaded(running: ServiceProcess, name: str) -> None:
    answer = httpx2.get(f"{running.url}{BLOB_PATH}/{name}", headers=headers(running, "Bearer {token}"))
    assert answer.status_code in (400, 404)
    assert running.token not in answer.text
    assert len(answer.content) < 1000


def test_the_device_is_told_by_the_websocket_too(running: ServiceProcess) -> None:
    with pytest.raises(AuthenticationError, match="PRIVATELORA_TOKEN"):
        connect_to(running, token="wrong")


def test_the_token_is_in_no_log(running: ServiceProcess) -> None:
    httpx2.get(running.url + INFO_PATH, headers=headers(running, "Bearer {token}x"))
    with Wire(running.url, running.token):
        pass
    assert running.token
    assert running.token not in running.log.read_text()


async def test_each_token_has_its_own_user() -> None:
    admission = TokenAdmission({"a-token": "alice", "b-token": "bob"})
    assert (await admission.authenticate("a-token", "")).user == "alice"
    assert (await admission.authenticate("b-token", "")).user == "bob"
    for wrong in (None, "", "a-toke", "a-tokenb-token", "A-TOKEN", "ä"):
        with pytest.raises(AuthenticationError):
            await admission.authenticate(wrong, "")


# -- the token file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_token_file_is_its_owners_only(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "service" / "token"
    before = os.umask(umask)
    try:
        token = local_token(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(token) >= 32
    assert local_token(path) == token  # it is made once
    assert local_token(tmp_path / "other") != token


def test_a_running_services_token_file_is_its_owners_only(running: ServiceProcess, fleet: Fleet) -> None:
    path = fleet.data_dir("llama") / "token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().strip() == running.token


def test_a_token_file_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ConfigurationError, match="empty; delete it"):
        local_token(tmp_path / "token")
    with pytest.raises(ConfigurationError, match="another --data-dir"):
        local_token(tmp_path / "token" / "token")


def test_a_device_on_the_same_machine_finds_the_token(
    fleet: Fleet, running: ServiceProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PRIVATELORA_TOKEN", raising=False)
    monkeypatch.setenv("PRIVATELORA_DATA_DIR", str(fleet.data_dir("llama")))
    with fleet.connect(running, token=None, rank=8) as me:
        assert me.generate("hello", max_new_tokens=2)


def test_the_environments_token_is_used_and_an_argument_goes_before_it(
    fleet: Fleet, running: ServiceProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIVATELORA_TOKEN", running.token + "\n")  # as `$(cat file)` or a mounted secret gives it
    with fleet.connect(running, token=None, rank=8) as me:
        assert me.generate("hello", max_new_tokens=2)
    with pytest.raises(AuthenticationError):
        fleet.connect(running, token="wrong", rank=8)


# -- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Certificate and key of 127.0.0.1."""
    return certificate(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def secure(
    fleet: Fleet, authority: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    fleet.service("llama")  # has published the model and its sets
    data_dir = tmp_path_factory.mktemp("secure") / "data"
    shutil.copytree(fleet.data_dir("llama"), data_dir)
    certfile, keyfile = map(str, authority)
    with service(fleet.source("llama"), data_dir, "--certfile", certfile, "--keyfile", keyfile) as started:
        yield started


def test_a_device_that_knows_the_authority_works_over_tls(
    fleet: Fleet, secure: ServiceProcess, running: ServiceProcess, authority: tuple[Path, Path]
) -> None:
    assert secure.url.startswith("https://127.0.0.1:")
    with fleet.connect(running, rank=8) as plain:
        expected = plain.generate("hello", max_new_tokens=8)
    with fleet.connect(secure, rank=8, ca_file=authority[0]) as me:
        assert me.generate("hello", max_new_tokens=8) == expected
        assert me.finetune(["a row"], epochs=1).steps == 1


def test_a_device_that_does_not_know_it_is_told_about_ca_file(fleet: Fleet, secure: ServiceProcess) -> None:
    with pytest.raises(ConnectionLostError, match=r"not trusted .*pass ca_file="):
        fleet.connect(secure, rank=8)


def test_another_authority_is_not_enough(fleet: Fleet, secure: ServiceProcess, tmp_path: Path) -> None:
    other, _ = certificate(tmp_path)
    with pytest.raises(ConnectionLostError, match=r"not trusted .*pass ca_file="):
        fleet.connect(secure, rank=8, ca_file=other)


def test_another_name_than_the_certificates_is_refused(
    fleet: Fleet, secure: ServiceProcess, authority: tuple[Path, Path]
) -> None:
    with pytest.raises(ConnectionLostError, match="not trusted"):
        DeviceSession(f"https://localhost:{secure.port}", token=secure.token, ca_file=authority[0])


def test_the_data_plane_checks_the_certificate_too(secure: ServiceProcess, authority: tuple[Path, Path]) -> None:
    with pytest.raises(ConnectionLostError, match=r"not trusted .*pass ca_file="):
        connect_to(secure)
    connect_to(secure, Service(secure.url, secure.token, ca_file=authority[0])).close()


def test_plain_http_to_a_tls_port_is_refused(secure: ServiceProcess) -> None:
    with pytest.raises(ConnectionLostError, match="cannot be reached"):
        DeviceSession(secure.url.replace("https", "http"), token=secure.token)


def test_tls_to_a_plain_port_is_refused(running: ServiceProcess) -> None:
    with pytest.raises(ConnectionLostError, match="cannot be reached"):
        DeviceSession(running.url.replace("http", "https"), token=running.token)


def test_the_token_never_crosses_a_tls_connection_in_clear(
    secure: ServiceProcess, authority: tuple[Path, Path]
) -> None:
    seen = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        listener.settimeout(10)
        child = os.fork()
        if not child:  # a device that trusts the authority meets something that only listens
            try:
                DeviceSession(url, token=secure.token, ca_file=authority[0], timeout_s=0.5)
            finally:
                os._exit(0)
        accepted, _ = listener.accept()
        with accepted:
            accepted.settimeout(2)
            while data := accepted.recv(65536):
                seen += data
        os.waitpid(child, 0)
    assert seen  # it did try
    assert secure.token.encode() not in seen


def connect_to(running: ServiceProcess, known: Service | None = None, token: str | None = None) -> Connection:
    """A data plane connection by itself, without the HTTP request that goes before it."""
    url = "ws" + running.url.removeprefix("http") + DATA_PLANE_PATH
    return Connection(url, token or running.token, ByteCount(), 10.0, 1 << 20, known.tls if known else None)

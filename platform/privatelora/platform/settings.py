"""Every setting of a service in one typed place: `Settings`, read from options, `PRIVATELORA_*` variables and defaults.

`load_settings` is what the commands call; `origins` says where each value came from, which `privatelora config` prints.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from privatelora.platform.models import BUNDLED
from privatelora.protocol import local
from privatelora.protocol.errors import ConfigurationError
from privatelora.protocol.placement import NAMES, Placement

PREFIX = "PRIVATELORA_"

# Read by the device's SDK and command line, so no misspelt settings of a service.
DEVICE_VARIABLES = ("SERVER", "TOKEN", "STORE_DIR", "CACHE_DIR", "PASSPHRASE")

_DEEPEST_MODEL = 10_000  # layers; a placement's text is read before the model's depth is known


class Settings(BaseSettings):
    """Settings of one service process; each field is also a variable, `PRIVATELORA_PORT` for `port`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    data_dir: Path = Field(
        default_factory=local.data_dir, description="folder of published models, adapter sets and the token file"
    )
    model: str = Field(
        default=BUNDLED, min_length=1, description=f"{BUNDLED} (bundled), a GGUF file, a model directory or a hub name"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="element type that the frozen weights are served in"
    )
    device: str = Field(default="cpu", description="torch device of the frozen layers: cpu, cuda, cuda:1")
    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(default=8765, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    certfile: Path | None = Field(default=None, description="TLS certificate chain (PEM); with keyfile")
    keyfile: Path | None = Field(default=None, description="TLS private key (PEM); with certfile")
    default_placement: str = Field(default="paper", description="placement of sessions that name none")
    placements: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(*NAMES, "custom"), description="placements that sessions may use; custom allows any that fits"
    )
    max_sessions: int = Field(default=64, ge=1, description="sessions at one time")
    max_waiting: int = Field(default=64, ge=0, description="devices that may wait for a session, and passes for memory")
    memory_mb: int | None = Field(
        default=None, ge=1, description="MiB for KV caches and training activations; unset is half of what is free"
    )
    kept_layers: int | None = Field(
        default=None, ge=0, description="layers, from the last, whose training activations are kept; unset is all"
    )
    park_after_s: float = Field(
        default=30.0, gt=0, description="seconds of silence after which a device's memory may go to others"
    )
    idle_timeout_s: float = Field(default=600.0, gt=0, description="seconds of silence after which a session ends")
    drain_s: float = Field(default=10.0, ge=0, description="seconds that running passes get to finish in at a stop")
    torch_threads: int | None = Field(default=None, ge=1, description="threads of one matmul; unset is torch's choice")
    busy_poll_ms: float = Field(
        default=1.0, ge=0, le=20, description="milliseconds to stay awake for a device that answers within them"
    )
    database_url: str | None = Field(
        default=None, description="control plane's database, postgresql:// or sqlite:///; unset: a token file only"
    )
    valkey_url: str | None = Field(
        default=None, description="Valkey or Redis of leases, events and Celery, redis://; needed with database_url"
    )
    broker_url: str | None = Field(default=None, description="Celery's broker; unset is valkey_url")
    public_url: str | None = Field(
        default=None, description="URL at which devices reach this backbone; unset is where it listens"
    )
    backbone_port: int = Field(
        default=0, ge=0, le=65535, description="port of the backbone that `up` starts; 0 takes a free one"
    )
    requests_per_minute: int = Field(default=1200, ge=1, description="REST requests of one key, per API process")
    wrong_keys_per_minute: int = Field(
        default=30, ge=1, description="requests with a wrong key from one address before it must wait, per process"
    )
    lease_bytes: int = Field(
        default=64 << 20, ge=1, description="most bytes of a quota that a backbone holds, or has not written yet"
    )
    lease_tokens: int = Field(default=4000, ge=1, description="most tokens of a quota that a backbone holds")
    slot_s: float = Field(
        default=15.0, gt=1, description="seconds after which the slot of a session whose backbone is gone is free"
    )
    flush_s: float = Field(default=2.0, gt=0, description="seconds between two additions of usage to the database")
    watch_s: float = Field(
        default=0.5, gt=0, le=1, description="seconds between two looks at revoked keys and ended sessions"
    )
    sample_s: float = Field(default=10.0, gt=0, description="seconds between two points of the metrics' time series")
    webhook_secret: SecretStr | None = Field(
        default=None, description="key with which webhooks are signed (HMAC-SHA256)"
    )
    job_lease_s: float = Field(
        default=60.0, gt=0, description="seconds after which a job's silent holder is taken for gone"
    )
    retention_days: int = Field(
        default=90, ge=1, description="days that ended sessions, jobs and metrics are kept; audit and usage stay"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="least level logged")
    log_format: Literal["console", "json"] = Field(default="console", description="how log lines are written")

    @field_validator("data_dir", "certfile", "keyfile")
    @classmethod
    def _expanded(cls, path: Path | None) -> Path | None:
        return path and path.expanduser().absolute()

    @field_validator("device")
    @classmethod
    def _known_device(cls, name: str) -> str:
        if name == "cpu":
            return name
        import torch  # takes seconds, which most commands do not need

        try:
            device = torch.device(name)
        except RuntimeError:
            raise ValueError("is not a torch device; use cpu, cuda or cuda:0") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("needs an Nvidia GPU, and torch finds none here; use cpu")
        return name

    @field_validator("database_url", "valkey_url", "broker_url", "public_url")
    @classmethod
    def _is_url(cls, url: str | None) -> str | None:
        if url is not None and not re.match(r"[a-z0-9+]+://", url):
            raise ValueError("is not a URL; write scheme://host/name")
        return url

    @field_validator("placements", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """Texts such as `paper,one-trip` or `paper first=2,last=4`: what has an = keeps its commas."""
        if not isinstance(value, str):
            return value
        items = [item for item in re.split(r"[;\s]+", value) if item]
        return tuple(part for item in items for part in ([item] if "=" in item else item.split(",")) if part)

    @field_validator("placements")
    @classmethod
    def _readable(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError(f"allows no placement at all; name some of {', '.join(NAMES)} or custom")
        for name in names:
            if name != "custom":
                _check_placement(name)
        return names

    @field_validator("default_placement")
    @classmethod
    def _readable_default(cls, name: str) -> str:
        _check_placement(name)
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if (self.certfile is None) != (self.keyfile is None):
            given, absent = ("certfile", "keyfile") if self.keyfile is None else ("keyfile", "certfile")
            raise ValueError(f"{given} is set without {absent}; TLS needs both")
        for name, path in (("certfile", self.certfile), ("keyfile", self.keyfile)):
            if path is not None and not path.is_file():
                raise ValueError(f"{name} {path} does not exist")
        if self.database_url is not None and self.valkey_url is None:
            raise ValueError("database_url is set without valkey_url; the control plane needs both")
        if "custom" not in self.placements and self.default_placement not in self.placements:
            raise ValueError(
                f"default_placement {self.default_placement} is not among the placements {' '.join(self.placements)}"
            )
        return self


@dataclass(frozen=True)
class Origin:
    """One setting as `privatelora config` shows it."""

    name: str
    value: str
    source: str
    description: str


def load_settings(options: Mapping[str, Any] | None = None) -> Settings:
    """Settings from `options` that are not None, then the environment, then the defaults.

    Raises `ConfigurationError`: one line that names each bad setting, where it was set, its value, and why it is bad.
    """
    given = _given(options)
    try:
        return Settings(**given)
    except ValidationError as error:
        problems = "; ".join(_problem(dict(detail), given) for detail in error.errors(include_url=False))
        raise ConfigurationError(f"{problems}. `privatelora config` lists every setting.") from None


def origins(settings: Settings, options: Mapping[str, Any] | None = None) -> list[Origin]:
    """Every setting with its value and where it came from: an option, a variable, or the default."""
    given = _given(options)
    return [
        Origin(name, without_password(_shown(getattr(settings, name))), _source(name, given), field.description or "")
        for name, field in Settings.model_fields.items()
    ]


def unknown_variables() -> list[str]:
    """`PRIVATELORA_*` variables that nothing reads, most likely misspelt."""
    known = {name.upper() for name in Settings.model_fields} | set(DEVICE_VARIABLES)
    return sorted(
        name for name in os.environ if name.startswith(PREFIX) and name.removeprefix(PREFIX).upper() not in known
    )


def without_password(text: str) -> str:
    """A URL as it may be shown: what stands between its user and its host is hidden."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", text)


def _given(options: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (options or {}).items() if value is not None}


def _problem(detail: dict[str, Any], given: Mapping[str, Any]) -> str:
    reason = str(detail["msg"]).removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    if not detail["loc"]:  # a check over several settings, which names them itself
        return reason
    name = str(detail["loc"][0])
    where = _option(name) if name in given else f"{PREFIX}{name.upper()}"
    return f"{where}={without_password(str(detail['input']))}: {reason}"


def _source(name: str, given: Mapping[str, Any]) -> str:
    variable = f"{PREFIX}{name.upper()}"
    if name in given:
        return f"option {_option(name)}"
    return f"environment {variable}" if os.environ.get(variable) else "default"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return " ".join(value) if isinstance(value, tuple) else str(value)


def _check_placement(text: str) -> None:
    try:
        Placement.parse(text, _DEEPEST_MODEL)
    except ConfigurationError as error:
        raise ValueError(error.message) from None

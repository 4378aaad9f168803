"""What a device's owner agrees to, in a file of theirs: which jobs, on which data, when, and how much.

    [allow."finetune-round"]        without a table of its kind, nothing of that kind runs
    data = "notes.jsonl"

    [when]
    hours = "22:00-06:00"           local time
    on_power = true

    [limits]
    megabytes_per_day = 200         tensor traffic of jobs, both ways
    minutes_per_job = 30

The file is read again before each job and after each step of one, so that a change of mind holds at once.
"""

from __future__ import annotations

import pkgutil
import re
import tomllib
from collections.abc import Mapping
from datetime import datetime, time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import psutil

from privatelora.device import jobs
from privatelora.protocol.errors import ConfigurationError
from privatelora.protocol.jobs import JobKind

EXAMPLE = """\
# What an operator may ask of this device. Everything that is not written here is refused.

# Train this device's adapter on these data, for a round.
[allow."finetune-round"]
data = "notes.jsonl"

# Measure the loss on these. Only numbers are reported, never text.
[allow.evaluate]
data = "held-out.jsonl"

# Local time; take the line away for any time.
[when]
hours = "22:00-06:00"
on_power = true

# Tensor traffic of jobs, both ways, and the length of one job.
[limits]
megabytes_per_day = 200
minutes_per_job = 30
"""


Table = TypeVar("Table", bound=msgspec.Struct)


class Allowed(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One kind of job; `data`: a file as for `finetune`, from the policy's folder on."""

    data: Annotated[str, msgspec.Meta(min_length=1)]


class When(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    hours: str | None = None  # "22:00-06:00"
    on_power: bool = False


class Limits(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    megabytes_per_day: Annotated[float, msgspec.Meta(gt=0, le=1e9)] | None = None
    minutes_per_job: Annotated[float, msgspec.Meta(gt=0, le=1e5)] | None = None


class Policy(msgspec.Struct, frozen=True):
    """The file; `Policy.read` gets it."""

    allow: dict[str, Allowed] = {}
    when: When = When()
    limits: Limits = Limits()

    @classmethod
    def read(cls, path: Path) -> Policy:
        """Read a policy; raises `ConfigurationError` that names the key, its value and the reason."""
        try:
            tables = tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigurationError(
                f"policy {path} cannot be read ({error.strerror or error}); `privatelora-device agent "
                "--example-policy` prints one to begin with"
            ) from None
        except ValueError as error:  # no TOML, or no UTF-8
            raise ConfigurationError(f"policy {path} is not valid TOML: {error}") from None
        try:
            return cls._of(tables)
        except ConfigurationError as error:
            raise ConfigurationError(f"policy {path}: {error.message}") from None

    @classmethod
    def _of(cls, tables: Mapping[str, Any]) -> Policy:
        known = kinds()
        for key in tables:
            if key not in cls.__struct_fields__:
                raise ConfigurationError(f"{key} is no table of a policy; those are {', '.join(cls.__struct_fields__)}")
        allow = {}
        for kind, table in _of_type("allow", tables.get("allow", {}), dict).items():
            if kind not in known:
                raise ConfigurationError(f"allow.{kind} is no kind of job; kinds are {', '.join(known)}")
            allow[kind] = _of_type(f'allow."{kind}"', table, Allowed)
        when = _of_type("when", tables.get("when", {}), When)
        if when.hours is not None:
            _hours(when.hours)
        return cls(allow, when, _of_type("limits", tables.get("limits", {}), Limits))

    def waits(self, now: datetime, on_power: bool, moved_bytes: int) -> str | None:
        """Why nothing may run now, though it may later; None if it may."""
        if self.when.hours is not None and not _within(_hours(self.when.hours), now.time()):
            return f"the policy says {self.when.hours}"
        if self.when.on_power and not on_power:
            return "the device is not on power"
        if self.left_bytes(moved_bytes) == 0:
            return f"the day's {self.limits.megabytes_per_day:g} MB are spent"
        return None

    def left_bytes(self, moved_bytes: int) -> int | None:
        """What jobs may still move today; None: as much as they like."""
        most = self.limits.megabytes_per_day
        return None if most is None else max(0, int(1e6 * most) - moved_bytes)

    def refusal(self, kind: str, data: Path | None) -> str | None:
        """Why a job is refused for good; None if it is not."""
        if kind not in self.allow:
            return f"the policy does not allow {kind}"
        if data is None or not data.is_file():
            return f"the data that the policy names for {kind} are not there"
        return None


def kinds() -> tuple[str, ...]:
    """The kinds of job that a device can run: the files of `privatelora.device.jobs` that have a `KIND`."""
    modules = (import_module(f"{jobs.__name__}.{one.name}") for one in pkgutil.iter_modules(jobs.__path__))
    found = (getattr(module, "KIND", None) for module in modules)
    return tuple(sorted(kind.name for kind in found if isinstance(kind, JobKind)))


def on_power() -> bool:
    """Whether this device is not running on a battery."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return battery is None or battery.power_plugged is not False


def _of_type(key: str, value: Any, kind: type[Table] | type[dict[str, Any]]) -> Any:
    """The value of a key as its type; raises `ConfigurationError` that names the key, the value and the reason."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        reason, _, where = str(error).partition(" - at `$")
        for name in where.rstrip("`").split(".")[1:]:
            key, value = f"{key}.{name}", value[name]
        raise ConfigurationError(f"{key} is {value!r}: {reason}") from None


def _hours(text: str) -> tuple[time, time]:
    found = re.fullmatch(r"(\d\d):(\d\d)-(\d\d):(\d\d)", text)
    try:
        if found is None:
            raise ValueError
        numbers = [int(part) for part in found.groups()]
        begin, end = time(numbers[0], numbers[1]), time(numbers[2], numbers[3])
        if begin == end:
            raise ValueError
    except ValueError:
        raise ConfigurationError(
            f"when.hours is {text!r}: write it as 22:00-06:00, in local time; without the line it is any time"
        ) from None
    return begin, end


def _within(hours: tuple[time, time], now: time) -> bool:
    begin, end = hours
    return begin <= now < end if begin <= end else now >= begin or now < end

"""What a device's owner agrees to, in a file of theirs: which jobs, on which data, when, and how much.

    [allow."finetune-round"]        without a table of its kind, nothing of that kind runs
    data = "notes.jsonl"

    [when]
    hours = "22:00-06:00"           local time
    on_power = true

    [limits]
    megabytes_per_day = 200         tensor traffic of jobs, both ways
    minutes_per_job = 30

The file is read again before each look for jobs, so that a change of mind holds at once.
"""

from __future__ import annotations

import re
from datetime import datetime, time
from pathlib import Path
from typing import Annotated

import msgspec
import psutil

from privatelora.protocol.errors import ConfigurationError

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


class Allowed(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One kind of job; `data`: a file as for `finetune`, from the policy's folder on."""

    data: Annotated[str, msgspec.Meta(min_length=1)]


class When(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    hours: str | None = None  # "22:00-06:00"
    on_power: bool = False


class Limits(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    megabytes_per_day: Annotated[float, msgspec.Meta(gt=0)] | None = None
    minutes_per_job: Annotated[float, msgspec.Meta(gt=0)] | None = None


class Policy(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The file; `Policy.read` gets it."""

    allow: dict[str, Allowed] = {}
    when: When = When()
    limits: Limits = Limits()

    @classmethod
    def read(cls, path: Path) -> Policy:
        """Read a policy; raises `ConfigurationError` that names the key and the reason."""
        try:
            policy = msgspec.toml.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise ConfigurationError(
                f"policy {path} cannot be read ({error.strerror or error}); `privatelora-device agent "
                "--example-policy` prints one to begin with"
            ) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"policy {path} is not valid: {error}") from None
        if policy.when.hours is not None:
            _hours(policy.when.hours)
        known = kinds()
        for kind in policy.allow:
            if kind not in known:
                raise ConfigurationError(f"policy {path} allows {kind!r}; kinds are {', '.join(known)}")
        return policy

    def waits(self, now: datetime, on_power: bool, moved_bytes: int) -> str | None:
        """Why nothing may run now, though it may later; None if it may."""
        if self.when.hours is not None and not _within(_hours(self.when.hours), now.time()):
            return f"it is {now:%H:%M}, and the policy says {self.when.hours}"
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
    """The kinds of job that a device can run."""
    import pkgutil
    from importlib import import_module

    package = import_module("privatelora.device.jobs")
    modules = (import_module(f"{package.__name__}.{one.name}") for one in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(module.KIND.name for module in modules))


def on_power() -> bool:
    """Whether this device is not running on a battery."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return battery is None or battery.power_plugged is not False


def _hours(text: str) -> tuple[time, time]:
    found = re.fullmatch(r"(\d\d):(\d\d)-(\d\d):(\d\d)", text)
    try:
        if found is None:
            raise ValueError
        numbers = [int(part) for part in found.groups()]
        return time(numbers[0], numbers[1]), time(numbers[2], numbers[3])
    except ValueError:
        raise ConfigurationError(f"when.hours is {text!r}; write it as 22:00-06:00, in local time") from None


def _within(hours: tuple[time, time], now: time) -> bool:
    begin, end = hours
    return begin <= now < end if begin <= end else now >= begin or now < end

"""Every kind of job, found by its file: workers' kinds in this package, devices' kinds in `privatelora.device.jobs`."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType

from privatelora.protocol.errors import ConfigurationError
from privatelora.protocol.jobs import JobKind

PACKAGES = (("privatelora.platform.jobs", False), ("privatelora.device.jobs", True))


@dataclass(frozen=True)
class Registered:
    """A kind, and the module that runs it."""

    kind: JobKind
    module: ModuleType
    on_device: bool


@cache
def kinds() -> dict[str, Registered]:
    """Every kind by its name: a module of the packages that has a `KIND`."""
    found = {}
    for package_name, on_device in PACKAGES:
        for one in pkgutil.iter_modules(import_module(package_name).__path__):
            module = import_module(f"{package_name}.{one.name}")
            kind = getattr(module, "KIND", None)
            if isinstance(kind, JobKind):
                found[kind.name] = Registered(kind, module, on_device)
    return found


def kind_of(name: str) -> Registered:
    """The kind of this name; raises `ConfigurationError` with those that there are."""
    found = kinds().get(name)
    if found is None:
        raise ConfigurationError(f"there is no kind of job {name[:60]!r}; use one of {', '.join(sorted(kinds()))}")
    return found

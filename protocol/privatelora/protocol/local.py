"""Where an embedded service and a device on the same machine find each other's files.

PRIVATELORA_DATA_DIR   service: published models and adapter sets, and `token`, its bearer token (0600)
PRIVATELORA_CACHE_DIR  device: downloaded parts, by hash
PRIVATELORA_STORE_DIR  device: adapters and optimizer state (0700)
"""

from __future__ import annotations

import os
from pathlib import Path


def _xdg(variable: str, fallback: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / fallback) / "privatelora"


def data_dir() -> Path:
    """Folder of an embedded service."""
    return Path(os.environ.get("PRIVATELORA_DATA_DIR") or _xdg("XDG_DATA_HOME", ".local/share") / "service")


def token_path(service_data_dir: Path) -> Path:
    """The token file that a service keeps in its folder."""
    return service_data_dir / "token"


def cache_dir() -> Path:
    """Folder of what a device downloaded."""
    return Path(os.environ.get("PRIVATELORA_CACHE_DIR") or _xdg("XDG_CACHE_HOME", ".cache"))


def store_dir() -> Path:
    """Folder of a device's adapters."""
    return Path(os.environ.get("PRIVATELORA_STORE_DIR") or _xdg("XDG_DATA_HOME", ".local/share") / "adapters")

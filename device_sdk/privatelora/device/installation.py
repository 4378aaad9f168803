"""The number of this installation: random, kept in the store's folder, sent with each session and by the agent."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from privatelora.protocol.errors import StoreError


def installation_of(directory: Path) -> str:
    """The random number of a store's folder, 32 hexadecimal digits, made at its first use.

    It is no secret and says nothing of the device or its owner; it lets them tell their devices apart at a service.
    """
    path = directory / ".installation"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (
            suppress(FileExistsError),
            tempfile.NamedTemporaryFile("w", dir=directory, prefix=".installation.") as file,
        ):
            file.write(secrets.token_hex(16))
            file.flush()
            os.link(file.name, path)  # whole or not at all, and whoever was first stays
        found = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} cannot be used ({error}); set PRIVATELORA_STORE_DIR, or delete it") from None
    if not re.fullmatch("[0-9a-f]{32}", found):
        raise StoreError(f"{path} is damaged; delete it, and a new number is made")
    return found

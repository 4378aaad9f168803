"""What the data plane asks of a control plane: may this session start, and may it spend these bytes.

`Admission` and `Quota` are the two seams of DESIGN section 5. The embedded defaults below know one or more bearer
tokens from a file and allow everything; `platform` may inject others.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from privatelora.protocol.errors import AuthenticationError, ConfigurationError


@dataclass(frozen=True)
class Principal:
    """Who a token belongs to."""

    user: str


class Admission(Protocol):
    """Decides who may use the service."""

    def authenticate(self, token: str | None) -> Principal:
        """Return the token's owner; raises `AuthenticationError`."""
        ...


class Quota(Protocol):
    """Counts what a session moves."""

    def spend(self, principal: Principal, bytes_up: int, bytes_down: int) -> None:
        """Take bytes from the owner's allowance; raises `AdmissionError` with a retry time once it is spent."""
        ...


class TokenAdmission:
    """Bearer tokens known by their SHA-256, compared in constant time."""

    def __init__(self, tokens: Mapping[str, str]) -> None:
        """`tokens` maps token to user."""
        self._users = {_digest(token): Principal(user) for token, user in tokens.items()}

    def authenticate(self, token: str | None) -> Principal:
        digest = _digest(token or "")
        found = None
        for known, principal in self._users.items():
            if hmac.compare_digest(known, digest):
                found = principal
        if token is None or found is None:
            raise AuthenticationError(
                "the service needs a valid bearer token: pass token=, set PRIVATELORA_TOKEN, or on the service's own "
                "machine read the token file that `privatelora up` names"
            )
        return found


class Unmetered:
    """The embedded default: nothing is limited."""

    def spend(self, principal: Principal, bytes_up: int, bytes_down: int) -> None:
        return None


def local_token(path: Path) -> str:
    """Read the embedded service's token, or make it at the first start: one line, readable by its owner only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            token = path.read_text().strip()
        else:
            token = secrets.token_urlsafe(32)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(token + "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"token file {path} cannot be used ({error}); choose another --data-dir") from None
    if not token:
        raise ConfigurationError(f"token file {path} is empty; delete it and start again")
    return token


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()

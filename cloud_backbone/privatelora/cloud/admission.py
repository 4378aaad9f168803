"""What the data plane asks of a control plane: who is this, may a session of theirs start, and what may it use.

`Admission` and `Quota` are the two seams of DESIGN section 5. Both are asked once a session and may take their time;
the `Meter` that a session then has is told of every byte and must answer from memory. The embedded defaults below know
one or more bearer tokens from a file and allow everything; `platform` injects others.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from privatelora.protocol.errors import AuthenticationError, ConfigurationError
from privatelora.protocol.messages import OpenRequest

if TYPE_CHECKING:
    from privatelora.cloud.session import Session


@dataclass(frozen=True)
class Principal:
    """Who a token belongs to; `observes`: whether they may read what the whole process does."""

    user: str
    observes: bool = True


class Admission(Protocol):
    """Decides who may use the service."""

    async def authenticate(self, token: str | None, address: str) -> Principal:
        """Return the token's owner; raises `AuthenticationError`, or `AdmissionError` to an address that guesses."""
        ...


class Meter(Protocol):
    """One session's account. Its calls come from the event loop, on a token's path, and return at once."""

    def begin(self, session: Session) -> None:
        """The session exists; it may be told to pause, drain or end from now on."""
        ...

    def admit(self, tokens: int, nbytes: int, go_on: Callable[[], None]) -> None:
        """Call `go_on` when a pass of so many tokens, which must keep `nbytes` in memory, may begin: at once nearly
        always, later where the service must ask what is left; raises `QuotaError` where nothing is."""
        ...

    def spend(self, bytes_up: int, bytes_down: int) -> None:
        """Count payload bytes; never raises, but may hold the device back or end the session."""
        ...

    def close(self, reason: str) -> None:
        """The session is over, for this reason: `closed` by its device, or a code."""
        ...


class Quota(Protocol):
    """Decides whether a session may start, and meters it."""

    async def open(self, owner: Principal, number: int, request: OpenRequest) -> Meter:
        """The meter of session `number`; raises `AdmissionError`, or `QuotaError` with a retry time."""
        ...


class TokenAdmission:
    """Bearer tokens known by their SHA-256, compared in constant time."""

    def __init__(self, tokens: Mapping[str, str]) -> None:
        """`tokens` maps token to user."""
        self._users = {_digest(token): Principal(user) for token, user in tokens.items()}

    async def authenticate(self, token: str | None, address: str) -> Principal:
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
    """The embedded default, quota and meter in one: nothing is limited."""

    async def open(self, owner: Principal, number: int, request: OpenRequest) -> Meter:
        return self

    def begin(self, session: Session) -> None:
        return None

    def admit(self, tokens: int, nbytes: int, go_on: Callable[[], None]) -> None:
        go_on()

    def spend(self, bytes_up: int, bytes_down: int) -> None:
        return None

    def close(self, reason: str) -> None:
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

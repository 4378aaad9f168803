"""Who did what: one entry for each change that someone makes, in the transaction of the change itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from privatelora.platform.tables import AuditEntry


@dataclass(frozen=True)
class Actor:
    """Who acts: by key over REST, or from the shell or by the service itself, where user and key are None."""

    user: str | None = None
    key: str | None = None
    request: str | None = None
    address: str | None = None


SHELL = Actor(address="shell")
SERVICE = Actor(address="service")


def record(session: Session, actor: Actor, action: str, object_id: str | None, **details: Any) -> None:
    """Add an entry; `details` are names and numbers, never a secret."""
    session.add(
        AuditEntry(
            user_id=actor.user,
            key_id=actor.key,
            action=action,
            object_id=object_id,
            details=details,
            request_id=actor.request,
            address=actor.address,
        )
    )

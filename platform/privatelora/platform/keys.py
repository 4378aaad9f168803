"""API keys: made once, shown once, known afterwards by their SHA-256; and who may do what with one.

A key is `plk_` and 43 characters from 256 random bits, so a fast hash is enough to keep it (nobody can guess its
preimage), and looking its digest up by a unique index compares no secret byte by byte.

    new_key(...) -> (ApiKey, text)     the text is shown to its owner and never stored
    find(session, text) -> Caller      whoever holds that text; raises `AuthenticationError`
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, or_, select, update
from sqlalchemy.orm import Session

from privatelora.platform.tables import ApiKey, Role, Scope, User, new_id, utc_now
from privatelora.protocol.errors import AuthenticationError

MARK = "plk_"
SHOWN_CHARS = 12  # of a key, by which people tell keys apart: the mark and eight more
USED_S = 60.0  # `last_used_at` is no older than this


@dataclass(frozen=True)
class Caller:
    """Who holds a key: what is decided about a request or a session is decided by this."""

    user: str  # its id
    key: str  # its id
    scope: Scope
    role: Role
    plan: str
    team: str | None

    @property
    def operates(self) -> bool:
        """Whether it may change what is not its own."""
        return self.role is Role.OPERATOR and self.scope is Scope.OPERATOR

    @property
    def sees_all(self) -> bool:
        """Whether it may look at what is not its own."""
        return self.role is Role.OPERATOR and self.scope is not Scope.DEVICE

    @property
    def computes(self) -> bool:
        """Whether it may open sessions on the data plane and run jobs."""
        return self.scope is not Scope.READ_ONLY


def new_key(
    user: User, name: str, scope: Scope, expires_at: datetime | None = None, text: str | None = None
) -> tuple[ApiKey, str]:
    """A key for `user`, to be added to a session, and its text; `text` is one that exists already."""
    shown = text or MARK + secrets.token_urlsafe(32)
    row = ApiKey(
        id=new_id("key"),
        user_id=user.id,
        name=name,
        scope=scope,
        prefix=shown[:SHOWN_CHARS],
        digest=digest_of(shown),
        expires_at=expires_at,
        created_at=utc_now(),
        version=1,
    )
    return row, shown


def rotate(session: Session, old: ApiKey, grace: timedelta) -> tuple[ApiKey, str]:
    """A key in place of `old`, which goes on for `grace`, or until its own end if that comes first."""
    user = session.get_one(User, old.user_id)
    row, shown = new_key(user, old.name, Scope(old.scope), old.expires_at)
    row.replaces = old.id
    session.add(row)
    end = utc_now() + grace
    old.expires_at = end if old.expires_at is None else min(end, old.expires_at)
    return row, shown


def find(session: Session, text: str | None) -> Caller:
    """The holder of a key; raises `AuthenticationError` for one that is unknown or no longer good."""
    found = _with_user(session, ApiKey.digest == digest_of(text)) if text else None
    if found is None:
        raise AuthenticationError(
            "a valid API key is needed: send it as `Authorization: Bearer plk_…`; an operator makes one with "
            "`privatelora admin create-key`"
        )
    return _caller(*found)


def holder(session: Session, key_id: str) -> Caller:
    """The holder of a key that is known already, as they are now; raises `AuthenticationError` as `find` does."""
    found = _with_user(session, ApiKey.id == key_id)
    if found is None:
        raise AuthenticationError("this key is not there any more")
    return _caller(*found)


def _with_user(session: Session, which: ColumnElement[bool]) -> tuple[ApiKey, User] | None:
    row = session.execute(select(ApiKey, User).join(User, ApiKey.user_id == User.id).where(which)).one_or_none()
    return None if row is None else (row[0], row[1])


def _caller(key: ApiKey, user: User) -> Caller:
    if key.revoked_at is not None:
        raise AuthenticationError(f"key {key.prefix}… was revoked; ask your operator for another one")
    if key.expires_at is not None and key.expires_at <= utc_now():
        raise AuthenticationError(f"key {key.prefix}… has expired; ask your operator for another one")
    if user.disabled_at is not None:
        raise AuthenticationError(f"the user of key {key.prefix}… is disabled; ask your operator")
    return Caller(user.id, key.id, Scope(key.scope), Role(user.role), user.plan, user.team)


def touch(session: Session, key_id: str) -> None:
    """Note that a key was used, once a minute at most."""
    now = utc_now()
    stale = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < now - timedelta(seconds=USED_S))
    session.execute(update(ApiKey).where(ApiKey.id == key_id, stale).values(last_used_at=now))


def digest_of(text: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(text.encode()).hexdigest()

"""What an operator does at a shell, on the database itself: no API has to run, and none is asked.

    Shell -> Database (one transaction an action, with its audit entry) -> events to Valkey, where there is one

Whoever can read the database's URL, or the data directory of `privatelora up`, is an operator. Each method returns
plain rows, which `cli_admin.py` prints. Users are named by name or id, keys by id or by their first characters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date, datetime, timedelta
from typing import Any

from redis import Redis
from sqlalchemy import ColumnElement, Select, inspect, or_, select, update
from sqlalchemy.orm import Session

from privatelora.platform import embedded, keys, quotas, valkey
from privatelora.platform.audit import SHELL, record
from privatelora.platform.database import Database
from privatelora.platform.events import Event, emit
from privatelora.platform.jobs import machine
from privatelora.platform.settings import Settings
from privatelora.platform.tables import (
    FINAL,
    ApiKey,
    AuditEntry,
    BackboneNode,
    Command,
    Device,
    Job,
    Level,
    Quota,
    Resource,
    Role,
    Schedule,
    Scope,
    SessionRow,
    SessionState,
    UsageDay,
    User,
    new_id,
    utc_now,
)
from privatelora.protocol.errors import ConfigurationError

Row = dict[str, Any]
DAILY = (Resource.BYTES_UP_PER_DAY, Resource.BYTES_DOWN_PER_DAY)


class Shell:
    """An operator's hands on one control plane."""

    def __init__(self, database: Database, client: Redis | None) -> None:
        self.database, self._valkey = database, client

    # -- the schema ----------------------------------------------------------------------------------------------------

    def upgrade(self, revision: str) -> str:
        """Bring the schema to `revision`; returns where it is then."""
        before = self.database.revision
        self.database.upgrade(revision)
        return self._moved(before)

    def downgrade(self, revision: str) -> str:
        """Bring the schema back to `revision`; what only the later one has is lost."""
        before = self.database.revision
        self.database.downgrade(revision)
        return self._moved(before)

    def _moved(self, before: str | None) -> str:
        after = self.database.revision
        if after is not None and after != before:
            with self.database.write() as session:
                record(session, SHELL, "schema.changed", None, before=before, after=after)
        return after or "none"

    # -- users and keys ------------------------------------------------------------------------------------------------

    def create_user(self, name: str, role: Role, plan: str, team: str | None) -> Row:
        with self._write() as session:
            if session.scalar(select(User.id).where(User.name == name)) is not None:
                raise ConfigurationError(f"there is a user {name} already; choose another name")
            user = User(id=new_id("usr"), name=name, role=role, plan=plan, team=team, created_at=utc_now(), version=1)
            session.add(user)
            record(session, SHELL, "user.created", user.id, name=name, role=role, plan=plan, team=team)
            session.flush()
            return _row(user)

    def list_users(self, plan: str | None, team: str | None) -> list[Row]:
        wanted = select(User).order_by(User.id)
        return self._rows(_where(wanted, (User.plan, plan), (User.team, team)))

    def set_disabled(self, user_ref: str, disabled: bool) -> Row:
        """Disable a user, whose requests are then refused and whose sessions end; or enable one."""
        with self._write() as session:
            user = _user(session, user_ref)
            changed = disabled == (user.disabled_at is None)
            if changed:
                user.disabled_at = utc_now() if disabled else None
                record(session, SHELL, "user.disabled" if disabled else "user.enabled", user.id)
                session.flush()
            row = _row(user)
        if changed and disabled:
            self._tell(Event("user.disabled", row["id"], {"user": row["id"]}))
        return row

    def create_key(self, user_ref: str, name: str, scope: Scope, days: int | None) -> Row:
        """A key; the row has its text as `key`, which nobody can show again."""
        with self._write() as session:
            user = _user(session, user_ref)
            if scope is Scope.OPERATOR and user.role != Role.OPERATOR:
                raise ConfigurationError(
                    f"user {user.name} is a {user.role}, and only an operator can have a key of scope operator; use "
                    "--scope device or read-only"
                )
            expires_at = utc_now() + timedelta(days=days) if days is not None else None
            row, text = keys.new_key(user, name, scope, expires_at)
            session.add(row)
            record(session, SHELL, "key.created", row.id, user=user.id, scope=scope, prefix=row.prefix)
            session.flush()
            return _row(row) | {"key": text}

    def list_keys(self, user_ref: str | None) -> list[Row]:
        with self.database.read() as session:
            wanted = select(ApiKey, User.name).join(User, ApiKey.user_id == User.id).order_by(ApiKey.id)
            if user_ref is not None:
                wanted = wanted.where(ApiKey.user_id == _user(session, user_ref).id)
            return [_row(key) | {"user": user} for key, user in session.execute(wanted)]

    def rotate_key(self, key_ref: str, grace_s: float) -> Row:
        """A key in place of another, which goes on for `grace_s`; the row has its text as `key`."""
        with self._write() as session:
            old = _key(session, key_ref)
            if old.revoked_at is not None or (old.expires_at is not None and old.expires_at <= utc_now()):
                raise ConfigurationError(f"key {old.prefix}… is not valid any more; make one with `admin create-key`")
            row, text = keys.rotate(session, old, timedelta(seconds=grace_s))
            record(session, SHELL, "key.rotated", old.id, by=row.id, prefix=row.prefix, grace_s=grace_s)
            session.flush()
            return _row(row) | {"key": text}

    def revoke_key(self, key_ref: str) -> Row:
        """Have a key be refused from now on; its sessions end within a second."""
        with self._write() as session:
            key = _key(session, key_ref)
            changed = key.revoked_at is None
            if changed:
                key.revoked_at = utc_now()
                record(session, SHELL, "key.revoked", key.id, user=key.user_id, prefix=key.prefix)
                session.flush()
            row = _row(key)
        if changed:
            self._tell(Event("key.revoked", row["user_id"], {"key": row["id"]}))
        return row

    # -- quotas and usage ----------------------------------------------------------------------------------------------

    def set_quota(
        self, level: Level, subject: str, resource: Resource, limit: int | None, changes: Mapping[str, Any]
    ) -> Row | None:
        """Make or change the quota of a level, subject and resource; a `limit` of None deletes it."""
        with self._write() as session:
            if level is Level.USER:
                subject = _user(session, subject).id
            elif level is Level.KEY:
                subject = _key(session, subject).id
            place = (Quota.level == level, Quota.subject == subject, Quota.resource == resource)
            quota = session.scalar(select(Quota).where(*place))
            if limit is None:
                if quota is None:
                    raise ConfigurationError(f"there is no quota {resource} of {level} {subject}")
                session.delete(quota)
                record(session, SHELL, "quota.deleted", quota.id, level=level, subject=subject, resource=resource)
                return None
            action = "quota.changed" if quota is not None else "quota.created"
            if quota is None:
                quota = Quota(id=new_id("quo"), level=level, subject=subject, resource=resource, created_at=utc_now())
                quota.version = 1
                session.add(quota)
            for name, value in ({"limit": limit} | dict(changes)).items():
                setattr(quota, name, value)
            if quota.soft_limit is not None and quota.soft_limit > limit:
                raise ConfigurationError(f"--soft-limit {quota.soft_limit} is above the limit of {limit}")
            given = {"level": level, "subject": subject, "resource": resource, "limit": limit}
            record(session, SHELL, action, quota.id, **given, **changes)
            session.flush()
            return _row(quota)

    def list_quotas(self) -> list[Row]:
        now = utc_now()
        with self.database.read() as session:
            found = session.scalars(select(Quota).order_by(Quota.level, Quota.subject, Quota.resource))
            return [
                _row(quota) | {"used": quotas.used(session, quota, now) if quota.resource in DAILY else None}
                for quota in found
            ]

    def usage(self, since: date, until: date, user_ref: str | None) -> list[Row]:
        """What users used, by day (UTC), both ends included."""
        with self.database.read() as session:
            wanted = (
                select(UsageDay, User.name)
                .join(User, UsageDay.user_id == User.id)
                .where(UsageDay.day >= since, UsageDay.day <= until)
                .order_by(UsageDay.day, UsageDay.user_id)
            )
            if user_ref is not None:
                wanted = wanted.where(UsageDay.user_id == _user(session, user_ref).id)
            return [_row(day) | {"user": user} for day, user in session.execute(wanted)]

    # -- backbones and sessions ----------------------------------------------------------------------------------------

    def list_backbones(self) -> list[Row]:
        return self._rows(select(BackboneNode).where(BackboneNode.state != "gone").order_by(BackboneNode.id))

    def list_sessions(self, user_ref: str | None, ended: bool, limit: int) -> list[Row]:
        with self.database.read() as session:
            wanted = select(SessionRow, User.name).join(User, SessionRow.user_id == User.id)
            if not ended:
                wanted = wanted.where(SessionRow.state != SessionState.CLOSED)
            if user_ref is not None:
                wanted = wanted.where(SessionRow.user_id == _user(session, user_ref).id)
            found = session.execute(wanted.order_by(SessionRow.id.desc()).limit(limit))
            return [_row(row) | {"user": user} for row, user in found]

    def command_sessions(self, command: Command, session_ids: list[str], backbone_id: str | None) -> list[str]:
        """Ask sessions, or all of a backbone, to leave, after their running passes or at once; returns their ids."""
        live = SessionRow.state != SessionState.CLOSED
        waiting = [] if command is Command.END else [SessionRow.command.is_(None)]  # who is to leave now stays so
        with self._write() as session:
            chosen: ColumnElement[bool] = SessionRow.id.in_(session_ids)
            if backbone_id is not None:
                chosen = or_(chosen, SessionRow.backbone_id == backbone_id)
            found = {row.id: row.user_id for row in session.execute(
                select(SessionRow.id, SessionRow.user_id).where(chosen, live)
            )}  # fmt: skip
            missing = [one for one in session_ids if one not in found]
            if missing:
                raise ConfigurationError(f"there is no live session {', '.join(missing)}; see `admin list-sessions`")
            session.execute(update(SessionRow).where(SessionRow.id.in_(found), live, *waiting).values(command=command))
            for one, user in found.items():
                record(session, SHELL, f"session.{command}", one, user=user)
        return sorted(found)

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def queue_job(
        self, kind: str, params: Mapping[str, Any], device_id: str | None, priority: int, deadline_s: float | None
    ) -> Row:
        """Queue a job; for a kind that devices run, their owner's policy decides."""
        with self._write() as session:
            device = session.get(Device, device_id) if device_id is not None else None
            if device_id is not None and device is None:
                raise ConfigurationError(f"there is no device {device_id}")
            deadline: datetime | None = utc_now() + timedelta(seconds=deadline_s) if deadline_s is not None else None
            job = machine.queue(session, SHELL, kind, params, device=device, priority=priority, deadline=deadline)
            if job is None:
                raise ConfigurationError("such a job is queued already")
            row = _row(job)
        self._tell(Event("job.queued", row["user_id"], {"job": row["id"], "kind": kind}))
        return row

    def list_jobs(self, state: str | None, kind: str | None, limit: int) -> list[Row]:
        wanted = _where(select(Job), (Job.state, state), (Job.kind, kind)).order_by(Job.id.desc()).limit(limit)
        return self._rows(wanted)

    def cancel_job(self, job_id: str) -> Row:
        with self._write() as session:
            before = session.get(Job, job_id)
            ended = before is not None and before.state in FINAL
            row = _row(machine.cancel(session, SHELL, job_id))
        if not ended:
            self._tell(Event("job.cancelled", row["user_id"], {"job": job_id, "kind": row["kind"]}))
        return row

    def list_schedules(self) -> list[Row]:
        return self._rows(select(Schedule).order_by(Schedule.id))

    def audit(self, action: str | None, object_id: str | None, limit: int) -> list[Row]:
        """The newest entries of the audit log, the newest first."""
        wanted = _where(select(AuditEntry), (AuditEntry.action, action), (AuditEntry.object_id, object_id))
        return self._rows(wanted.order_by(AuditEntry.id.desc()).limit(limit))

    @contextmanager
    def _write(self) -> Iterator[Session]:
        with self.database.write() as session:
            yield session

    def _rows(self, wanted: Select[Any]) -> list[Row]:
        with self.database.read() as session:
            return [_row(one) for one in session.scalars(wanted)]

    def _tell(self, event: Event) -> None:
        if self._valkey is not None:
            emit(self._valkey, event)


@contextmanager
def shell(settings: Settings, *, checked: bool = True) -> Iterator[Shell]:
    """The control plane that the settings name, or the embedded one in their data directory.

    Raises `ConfigurationError` where there is none, or, if `checked`, where its schema is another release's.
    """
    url = settings.database_url
    valkey_url = settings.valkey_url if settings.valkey_url != embedded.NO_URL else None
    if url is None:
        if not (settings.data_dir / embedded.DATABASE).is_file():
            raise ConfigurationError(
                f"there is no control plane in {settings.data_dir}; start `privatelora up`, or name its "
                "--database-url or --data-dir"
            )
        url = embedded.database_url(settings.data_dir)
        service = embedded.running(settings.data_dir)
        valkey_url = valkey_url or (service.valkey_url if service is not None else None)
    database = Database(url)
    try:
        if checked:
            database.check()
        yield Shell(database, valkey.connect(valkey_url) if valkey_url is not None else None)
    finally:
        database.close()


def _user(session: Session, ref: str) -> User:
    found = session.scalar(select(User).where(or_(User.name == ref, User.id == ref)))
    if found is None:
        raise ConfigurationError(f"there is no user {ref}; see `privatelora admin list-users`")
    return found


def _key(session: Session, ref: str) -> ApiKey:
    """By id, or by its first characters; never by the whole key, which has no place on a command line."""
    column = ApiKey.id if ref.startswith("key_") else ApiKey.prefix
    found = list(session.scalars(select(ApiKey).where(column == ref.rstrip("…"))))
    if len(found) != 1:
        raise ConfigurationError(
            f"{len(found)} keys fit {ref[: keys.SHOWN_CHARS]}; name one by its id, see `privatelora admin list-keys`"
        )
    return found[0]


def _where(wanted: Select[Any], *conditions: tuple[Any, Any]) -> Select[Any]:
    return wanted.where(*(column == value for column, value in conditions if value is not None))


def _row(one: Any) -> Row:
    """A table's row as it is shown: every column but a key's digest."""
    columns = inspect(type(one)).column_attrs
    return {column.key: getattr(one, column.key) for column in columns if column.key != "digest"}

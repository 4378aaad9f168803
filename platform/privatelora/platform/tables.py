"""The control plane's tables: the truth for who may connect, what they used, what is to run and who did what.

Everything that must survive a crash is a row here; Valkey holds leases and events, which may be lost, and Celery wakes.
No row holds a prompt, a token's text, a tensor or a key: keys are kept as their SHA-256, jobs report numbers.

Ids are a prefix and a ULID, so that they sort by age and a page's cursor is an index's range. Times are UTC. `version`
counts changes of a row that can be changed, and is its ETag.
"""

from __future__ import annotations

from datetime import UTC, date, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Date,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from ulid import ULID

ID_CHARS = 30  # prefix of three letters, _, ULID
NAME_CHARS = 120


class Role(StrEnum):
    """operator: sees and changes everything that the control plane has; member: only their own."""

    OPERATOR = "operator"
    MEMBER = "member"


class Scope(StrEnum):
    """What a key may do: all that its user may; compute and run jobs as a device; or only look."""

    OPERATOR = "operator"
    DEVICE = "device"
    READ_ONLY = "read-only"


class SessionState(StrEnum):
    OPEN = "open"
    DRAINING = "draining"
    CLOSED = "closed"


class Command(StrEnum):
    """What an operator asks of a live session: finish the running passes and leave, or leave now."""

    DRAIN = "drain"
    END = "end"


class Level(StrEnum):
    """Whom a quota is for; all that apply to a session must allow it."""

    PLAN = "plan"
    TEAM = "team"
    USER = "user"
    KEY = "key"


class Resource(StrEnum):
    """What a quota limits."""

    BYTES_UP_PER_DAY = "bytes_up_per_day"
    BYTES_DOWN_PER_DAY = "bytes_down_per_day"
    BYTES_PER_SECOND = "bytes_per_second"
    TOKENS_PER_MINUTE = "tokens_per_minute"
    CONCURRENT_SESSIONS = "concurrent_sessions"
    KV_MEMORY_BYTES = "kv_memory_bytes"


class JobState(StrEnum):
    """queued -> [offered -> accepted ->] running -> done, failed; or refused, expired, cancelled on the way."""

    QUEUED = "queued"
    OFFERED = "offered"
    ACCEPTED = "accepted"
    RUNNING = "running"
    DONE = "done"
    REFUSED = "refused"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


FINAL = (JobState.DONE, JobState.REFUSED, JobState.FAILED, JobState.EXPIRED, JobState.CANCELLED)


def new_id(prefix: str) -> str:
    """A new id of three letters, `_` and a ULID: ids of one kind sort by when they were made."""
    return f"{prefix}_{ULID()}"


def utc_now() -> datetime:
    """The time now, aware, in UTC."""
    return datetime.now(UTC)


class Utc(TypeDecorator[datetime]):
    """An aware time in UTC, also where the database keeps none (SQLite)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: Utc(), dict[str, Any]: JSON(), list[str]: JSON()}  # noqa: RUF012 (SQLAlchemy's)


def _id(prefix: str) -> Mapped[str]:
    return mapped_column(String(ID_CHARS), primary_key=True, default=lambda: new_id(prefix))


def _version() -> Mapped[int]:
    return mapped_column(Integer, default=1)


class User(Base):
    """Someone with keys. `plan` and `team` are names that quotas and schedules refer to."""

    __tablename__ = "users"
    id: Mapped[str] = _id("usr")
    name: Mapped[str] = mapped_column(String(NAME_CHARS), unique=True)
    role: Mapped[str] = mapped_column(String(16), default=Role.MEMBER)
    plan: Mapped[str] = mapped_column(String(NAME_CHARS), default="default")
    team: Mapped[str | None] = mapped_column(String(NAME_CHARS))
    disabled_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    version: Mapped[int] = _version()

    __table_args__ = (Index("ix_users_plan_id", "plan", "id"), Index("ix_users_team_id", "team", "id"))
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012 (SQLAlchemy's)


class ApiKey(Base):
    """A bearer key, known by the SHA-256 of its 256 random bits.

    prefix : its first characters, by which people tell keys apart.
    replaces : the key that this one was made to replace; that one ends when its time of grace is over.
    """

    __tablename__ = "api_keys"
    id: Mapped[str] = _id("key")
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    name: Mapped[str] = mapped_column(String(NAME_CHARS))
    scope: Mapped[str] = mapped_column(String(16))
    prefix: Mapped[str] = mapped_column(String(16))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    replaces: Mapped[str | None] = mapped_column(String(ID_CHARS))
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    version: Mapped[int] = _version()

    __table_args__ = (Index("ix_api_keys_user_id_id", "user_id", "id"),)
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012 (SQLAlchemy's)


class Device(Base):
    """An installation of the SDK that has connected; `allows` are the kinds of jobs that its owner's policy permits."""

    __tablename__ = "devices"
    id: Mapped[str] = _id("dev")
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    installation: Mapped[str] = mapped_column(String(64))  # random, made by the device
    name: Mapped[str] = mapped_column(String(NAME_CHARS), default="")
    allows: Mapped[list[str]] = mapped_column(default=list)
    first_seen_at: Mapped[datetime] = mapped_column(default=utc_now)
    last_seen_at: Mapped[datetime] = mapped_column(default=utc_now)
    agent_seen_at: Mapped[datetime | None]  # when its agent last asked for jobs

    __table_args__ = (UniqueConstraint("user_id", "installation"), Index("ix_devices_user_id_id", "user_id", "id"))


class BackboneNode(Base):
    """A backbone process; one whose heartbeat is old is gone.

    info : what it announces to devices, `ServiceInfo` with absolute URLs.
    """

    __tablename__ = "backbones"
    id: Mapped[str] = _id("bbn")
    url: Mapped[str] = mapped_column(String(300))
    model_hash: Mapped[str] = mapped_column(String(64))
    info: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(16), default="serving")  # serving, draining, gone
    sessions: Mapped[int] = mapped_column(Integer, default=0)
    started_at: Mapped[datetime] = mapped_column(default=utc_now)
    heartbeat_at: Mapped[datetime] = mapped_column(default=utc_now)

    __table_args__ = (Index("ix_backbones_state_heartbeat_at", "state", "heartbeat_at"),)


class SessionRow(Base):
    """A device's session, live or past.

    number : what the wire's frames and the logs call it.
    view : what the layer scheduler has of it: passes with phase, point and what they wait for.
    bytes_up, bytes_down, tokens : payload bytes, and tokens through the layers, as its backbone last wrote them.
    """

    __tablename__ = "sessions"
    id: Mapped[str] = _id("ses")
    number: Mapped[int] = mapped_column(BigInteger)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    device_id: Mapped[str | None] = mapped_column(ForeignKey("devices.id"))
    backbone_id: Mapped[str] = mapped_column(ForeignKey("backbones.id"))
    placement: Mapped[str] = mapped_column(String(NAME_CHARS))
    state: Mapped[str] = mapped_column(String(16), default=SessionState.OPEN)
    command: Mapped[str | None] = mapped_column(String(16))
    view: Mapped[dict[str, Any]] = mapped_column(default=dict)
    bytes_up: Mapped[int] = mapped_column(BigInteger, default=0)
    bytes_down: Mapped[int] = mapped_column(BigInteger, default=0)
    tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    opened_at: Mapped[datetime] = mapped_column(default=utc_now)
    closed_at: Mapped[datetime | None]
    end_reason: Mapped[str | None] = mapped_column(String(40))

    __table_args__ = (
        Index("ix_sessions_user_id_id", "user_id", "id"),
        Index("ix_sessions_state_id", "state", "id"),
        Index("ix_sessions_user_id_state_id", "user_id", "state", "id"),
        Index("ix_sessions_backbone_id_state", "backbone_id", "state"),
        Index("ix_sessions_device_id_id", "device_id", "id"),
        Index("ix_sessions_key_id_id", "key_id", "id"),
        Index("ix_sessions_backbone_id_id", "backbone_id", "id"),
        Index("ix_sessions_opened_at_id", "opened_at", "id"),
        Index("ix_sessions_closed_at", "closed_at"),
    )


class Quota(Base):
    """A limit for a plan, a team, a user or a key.

    soft_limit : warns when it is passed, by event and by `webhook_url`.
    resets_at : time of day in UTC, HH:MM, at which a daily window begins; a minute's begins with the minute.
    """

    __tablename__ = "quotas"
    id: Mapped[str] = _id("quo")
    level: Mapped[str] = mapped_column(String(8))
    subject: Mapped[str] = mapped_column(String(NAME_CHARS))  # name of the plan or team, id of the user or key
    resource: Mapped[str] = mapped_column(String(32))
    limit: Mapped[int] = mapped_column(BigInteger)
    soft_limit: Mapped[int | None] = mapped_column(BigInteger)
    resets_at: Mapped[str] = mapped_column(String(5), default="00:00")
    webhook_url: Mapped[str | None] = mapped_column(String(500))
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    version: Mapped[int] = _version()

    __table_args__ = (
        UniqueConstraint("level", "subject", "resource"),
        CheckConstraint('"limit" >= 0', name="limit_not_negative"),
    )
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012 (SQLAlchemy's)


class Job(Base):
    """Something to be done once, by a worker or by a device whose owner agrees.

    fence : counts the holders of its lease; a result is accepted from the newest one only.
    run_at : not before then (a retry's backoff); deadline : expires if it has not begun or ended by then.
    dedupe : names what may be queued only once, such as one firing of a schedule for one device.
    """

    __tablename__ = "jobs"
    id: Mapped[str] = _id("job")
    kind: Mapped[str] = mapped_column(String(40))
    params: Mapped[dict[str, Any]] = mapped_column(default=dict)
    user_id: Mapped[str | None] = mapped_column(ForeignKey("users.id"))  # whose device; None: the service's own
    device_id: Mapped[str | None] = mapped_column(ForeignKey("devices.id"))
    schedule_id: Mapped[str | None] = mapped_column(String(ID_CHARS))
    dedupe: Mapped[str | None] = mapped_column(String(200), unique=True)
    state: Mapped[str] = mapped_column(String(16), default=JobState.QUEUED)
    priority: Mapped[int] = mapped_column(Integer, default=0)  # the highest first
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    max_attempts: Mapped[int] = mapped_column(Integer, default=3)
    run_at: Mapped[datetime] = mapped_column(default=utc_now)
    deadline: Mapped[datetime | None]
    fence: Mapped[int] = mapped_column(Integer, default=0)
    holder: Mapped[str | None] = mapped_column(String(100))
    lease_until: Mapped[datetime | None]
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    error: Mapped[str | None] = mapped_column(Text)
    created_by: Mapped[str | None] = mapped_column(String(ID_CHARS))
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        Index("ix_jobs_state_run_at", "state", "run_at"),
        Index("ix_jobs_state_id", "state", "id"),
        Index("ix_jobs_user_id_id", "user_id", "id"),
        Index("ix_jobs_device_id_state", "device_id", "state"),
        Index("ix_jobs_kind_id", "kind", "id"),
        Index("ix_jobs_schedule_id_id", "schedule_id", "id"),
        Index("ix_jobs_finished_at", "finished_at"),
    )


class Schedule(Base):
    """A job that is queued by the clock; Celery beat's own row, named `schedule:<id>`, says when.

    target : for a kind that runs on devices, which: {"all": true}, or plan, team, user or device with its name or id.
    """

    __tablename__ = "schedules"
    id: Mapped[str] = _id("sch")
    name: Mapped[str] = mapped_column(String(NAME_CHARS), unique=True)
    kind: Mapped[str] = mapped_column(String(40))
    params: Mapped[dict[str, Any]] = mapped_column(default=dict)
    target: Mapped[dict[str, Any]] = mapped_column(default=dict)
    cron: Mapped[str] = mapped_column(String(100))
    timezone: Mapped[str] = mapped_column(String(64), default="UTC")
    enabled: Mapped[bool] = mapped_column(default=True)
    priority: Mapped[int] = mapped_column(Integer, default=0)
    deadline_s: Mapped[int | None] = mapped_column(Integer)
    last_fired_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    version: Mapped[int] = _version()

    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012 (SQLAlchemy's)


class UsageHour(Base):
    """What a key used in an hour: what daily quotas are counted from if Valkey has lost them."""

    __tablename__ = "usage_hours"
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"), primary_key=True)
    hour: Mapped[datetime] = mapped_column(primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    bytes_up: Mapped[int] = mapped_column(BigInteger, default=0)
    bytes_down: Mapped[int] = mapped_column(BigInteger, default=0)
    tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    sessions: Mapped[int] = mapped_column(Integer, default=0)

    __table_args__ = (
        Index("ix_usage_hours_hour", "hour"),
        Index("ix_usage_hours_user_id_hour", "user_id", "hour"),
    )


class UsageDay(Base):
    """What a user used on a day (UTC)."""

    __tablename__ = "usage_days"
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"), primary_key=True)
    day: Mapped[date] = mapped_column(Date, primary_key=True)
    bytes_up: Mapped[int] = mapped_column(BigInteger, default=0)
    bytes_down: Mapped[int] = mapped_column(BigInteger, default=0)
    tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    sessions: Mapped[int] = mapped_column(Integer, default=0)

    __table_args__ = (Index("ix_usage_days_day_user_id", "day", "user_id"),)


class PublishedModel(Base):
    """A frozen model that a backbone hosts or hosted."""

    __tablename__ = "models"
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(300))
    dtype: Mapped[str] = mapped_column(String(16))
    shape: Mapped[dict[str, Any]]
    context_length: Mapped[int] = mapped_column(Integer)
    published_at: Mapped[datetime] = mapped_column(default=utc_now)


class PublishedSet(Base):
    """A published set of A and B; `default` of its kind for new sessions."""

    __tablename__ = "adapters"
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[str] = mapped_column(String(40))
    model_hash: Mapped[str] = mapped_column(String(64))
    max_rank_down: Mapped[int] = mapped_column(Integer)
    max_rank_up: Mapped[int] = mapped_column(Integer)
    nbytes: Mapped[int] = mapped_column(BigInteger)
    default: Mapped[bool] = mapped_column(default=False)
    published_at: Mapped[datetime] = mapped_column(default=utc_now)

    __table_args__ = (Index("ix_adapters_model_hash_sha256", "model_hash", "sha256"),)


class AuditEntry(Base):
    """Who did what; the database itself refuses to change or delete one (a trigger, made by the migration)."""

    __tablename__ = "audit_log"
    id: Mapped[str] = _id("aud")
    at: Mapped[datetime] = mapped_column(default=utc_now)
    user_id: Mapped[str | None] = mapped_column(String(ID_CHARS))  # None: the service itself, or the shell
    key_id: Mapped[str | None] = mapped_column(String(ID_CHARS))
    action: Mapped[str] = mapped_column(String(60))  # such as user.created
    object_id: Mapped[str | None] = mapped_column(String(64))
    details: Mapped[dict[str, Any]] = mapped_column(default=dict)
    request_id: Mapped[str | None] = mapped_column(String(40))
    address: Mapped[str | None] = mapped_column(String(64))

    __table_args__ = (
        Index("ix_audit_log_user_id_id", "user_id", "id"),
        Index("ix_audit_log_action_id", "action", "id"),
        Index("ix_audit_log_object_id_id", "object_id", "id"),
    )


class MetricPoint(Base):
    """What a backbone's numbers were at a time; rates and quantiles are of the interval that ended then."""

    __tablename__ = "metric_points"
    backbone_id: Mapped[str] = mapped_column(String(ID_CHARS), primary_key=True)
    at: Mapped[datetime] = mapped_column(primary_key=True)
    interval_s: Mapped[float]
    values: Mapped[dict[str, Any]]  # name -> number

    __table_args__ = (Index("ix_metric_points_at", "at"),)


class IdempotentRequest(Base):
    """A POST that was answered, so that the same one sent again gets the same answer."""

    __tablename__ = "idempotent_requests"
    key_id: Mapped[str] = mapped_column(String(ID_CHARS), primary_key=True)
    idempotency_key: Mapped[str] = mapped_column(String(100), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))  # of method, path and body
    status: Mapped[int | None] = mapped_column(Integer)  # None while the first is under way
    body: Mapped[str | None] = mapped_column(Text)  # no secret: a key that was shown is not shown again
    created_at: Mapped[datetime] = mapped_column(default=utc_now)

    __table_args__ = (Index("ix_idempotent_requests_created_at", "created_at"),)

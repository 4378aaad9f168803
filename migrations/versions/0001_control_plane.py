"""The control plane's tables, Celery beat's beside them, and an audit log that can only grow.

Revision 0001, the first.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_NO_CHANGE = "the audit log is append-only"


def upgrade() -> None:
    op.create_table(
        "adapters",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("model_hash", sa.String(length=64), nullable=False),
        sa.Column("max_rank_down", sa.Integer(), nullable=False),
        sa.Column("max_rank_up", sa.Integer(), nullable=False),
        sa.Column("nbytes", sa.BigInteger(), nullable=False),
        sa.Column("default", sa.Boolean(), nullable=False),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_adapters")),
    )
    with op.batch_alter_table("adapters", schema=None) as batch_op:
        batch_op.create_index("ix_adapters_model_hash_sha256", ["model_hash", "sha256"], unique=False)

    op.create_table(
        "audit_log",
        sa.Column("id", sa.String(length=30), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("user_id", sa.String(length=30), nullable=True),
        sa.Column("key_id", sa.String(length=30), nullable=True),
        sa.Column("action", sa.String(length=60), nullable=False),
        sa.Column("object_id", sa.String(length=64), nullable=True),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("request_id", sa.String(length=40), nullable=True),
        sa.Column("address", sa.String(length=64), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_log")),
    )
    with op.batch_alter_table("audit_log", schema=None) as batch_op:
        batch_op.create_index("ix_audit_log_action_id", ["action", "id"], unique=False)
        batch_op.create_index("ix_audit_log_object_id_id", ["object_id", "id"], unique=False)
        batch_op.create_index("ix_audit_log_user_id_id", ["user_id", "id"], unique=False)

    op.create_table(
        "backbones",
        sa.Column("id", sa.String(length=30), nullable=False),
        sa.Column("url", sa.String(length=300), nullable=False),
        sa.Column("model_hash", sa.String(length=64), nullable=False),
        sa.Column("info", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("sessions", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_backbones")),
    )
    with op.batch_alter_table("backbones", schema=None) as batch_op:
        batch_op.create_index("ix_backbones_state_heartbeat_at", ["state", "heartbeat_at"], unique=False)

    op.create_table(
        "idempotent_requests",
        sa.Column("key_id", sa.String(length=30), nullable=False),
        sa.Column("idempotency_key", sa.String(length=100), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("body", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key_id", "idempotency_key", name=op.f("pk_idempotent_requests")),
    )
    with op.batch_alter_table("idempotent_requests", schema=None) as batch_op:
        batch_op.create_index("ix_idempotent_requests_created_at", ["created_at"], unique=False)

    op.create_table(
        "metric_points",
        sa.Column("backbone_id", sa.String(length=30), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("interval_s", sa.Double(), nullable=False),
        sa.Column("values", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("backbone_id", "at", name=op.f("pk_metric_points")),
    )
    with op.batch_alter_table("metric_points", schema=None) as batch_op:
        batch_op.create_index("ix_metric_points_at", ["at"], unique=False)

    op.create_table(
        "models",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=300), nullable=False),
        sa.Column("dtype", sa.String(length=16), nullable=False),
        sa.Column("shape", sa.JSON(), nullable=False),
        sa.Column("context_length", sa.Integer(), nullable=False),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_models")),
    )
    op.create_table(
        "quotas",
        sa.Column("id", sa.String(length=30), nullable=False),
        sa.Column("level", sa.String(length=8), nullable=False),
        sa.Column("subject", sa.String(length=120), nullable=False),
        sa.Column("resource", sa.String(length=32), nullable=False),
        sa.Column("limit", sa.BigInteger(), nullable=False),
        sa.Column("soft_limit", sa.BigInteger(), nullable=True),
        sa.Column("resets_at", sa.String(length=5), nullable=False),
        sa.Column("webhook_url", sa.String(length=500), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.CheckConstraint('"limit" >= 0', name=op.f("ck_quotas_limit_not_negative")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_quotas")),
        sa.UniqueConstraint("level", "subject", "resource", name=op.f("uq_quotas_level")),
    )
    op.create_table(
        "schedules",
        sa.Column("id", sa.String(length=30), nullable=False),
        sa.Column("name", sa.String(length=120), nullable=False),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("params", sa.JSON(), nullable=False),
        sa.Column("target", sa.JSON(), nullable=False),
        sa.Column("cron", sa.String(length=100), nullable=False),
        sa.Column("timezone", sa.String(length=64), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("deadline_s", sa.Integer(), nullable=True),
        sa.Column("last_fired_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_schedules")),
        sa.UniqueConstraint("name", name=op.f("uq_schedules_name")),
    )
    op.create_table(
        "users",
        sa.Column("id", sa.String(length=30), nullable=False),
        sa.Column("name", sa.String(length=120), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("plan", sa.String(length=120), nullable=False),
        sa.Column("team", sa.String(length=120), nullable=True),
        sa.Column("disabled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
        sa.UniqueConstraint("name", name=op.f("uq_users_name")),
    )
    with op.batch_alter_table("users", schema=None) as batch_op:
        batch_op.create_index("ix_users_plan_id", ["plan", "id"], unique=False)
        batch_op.create_index("ix_users_team_id", ["team", "id"], unique=False)

    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(length=30), nullable=False),
        sa.Column("user_id", sa.String(length=30), nullable=False),
        sa.Column("name", sa.String(length=120), nullable=False),
        sa.Column("scope", sa.String(length=16), nullable=False),
        sa.Column("prefix", sa.String(length=16), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("replaces", sa.String(length=30), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_api_keys_user_id_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("digest", name=op.f("uq_api_keys_digest")),
    )
    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        batch_op.create_index("ix_api_keys_user_id_id", ["user_id", "id"], unique=False)

    op.create_table(
        "devices",
        sa.Column("id", sa.String(length=30), nullable=False),
        sa.Column("user_id", sa.String(length=30), nullable=False),
        sa.Column("installation", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=120), nullable=False),
        sa.Column("allows", sa.JSON(), nullable=False),
        sa.Column("first_seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("agent_seen_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_devices_user_id_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_devices")),
        sa.UniqueConstraint("user_id", "installation", name=op.f("uq_devices_user_id")),
    )
    with op.batch_alter_table("devices", schema=None) as batch_op:
        batch_op.create_index("ix_devices_user_id_id", ["user_id", "id"], unique=False)

    op.create_table(
        "usage_days",
        sa.Column("user_id", sa.String(length=30), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("bytes_up", sa.BigInteger(), nullable=False),
        sa.Column("bytes_down", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("sessions", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_usage_days_user_id_users")),
        sa.PrimaryKeyConstraint("user_id", "day", name=op.f("pk_usage_days")),
    )
    with op.batch_alter_table("usage_days", schema=None) as batch_op:
        batch_op.create_index("ix_usage_days_day_user_id", ["day", "user_id"], unique=False)

    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=30), nullable=False),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("params", sa.JSON(), nullable=False),
        sa.Column("user_id", sa.String(length=30), nullable=True),
        sa.Column("device_id", sa.String(length=30), nullable=True),
        sa.Column("schedule_id", sa.String(length=30), nullable=True),
        sa.Column("dedupe", sa.String(length=200), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("run_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deadline", sa.DateTime(timezone=True), nullable=True),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("holder", sa.String(length=100), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("result", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_by", sa.String(length=30), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_jobs_device_id_devices")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_jobs_user_id_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sa.UniqueConstraint("dedupe", name=op.f("uq_jobs_dedupe")),
    )
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.create_index("ix_jobs_device_id_state", ["device_id", "state"], unique=False)
        batch_op.create_index("ix_jobs_finished_at", ["finished_at"], unique=False)
        batch_op.create_index("ix_jobs_kind_id", ["kind", "id"], unique=False)
        batch_op.create_index("ix_jobs_schedule_id_id", ["schedule_id", "id"], unique=False)
        batch_op.create_index("ix_jobs_state_id", ["state", "id"], unique=False)
        batch_op.create_index("ix_jobs_state_run_at", ["state", "run_at"], unique=False)
        batch_op.create_index("ix_jobs_user_id_id", ["user_id", "id"], unique=False)

    op.create_table(
        "sessions",
        sa.Column("id", sa.String(length=30), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("user_id", sa.String(length=30), nullable=False),
        sa.Column("key_id", sa.String(length=30), nullable=False),
        sa.Column("device_id", sa.String(length=30), nullable=True),
        sa.Column("backbone_id", sa.String(length=30), nullable=False),
        sa.Column("placement", sa.String(length=120), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("command", sa.String(length=16), nullable=True),
        sa.Column("view", sa.JSON(), nullable=False),
        sa.Column("bytes_up", sa.BigInteger(), nullable=False),
        sa.Column("bytes_down", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("opened_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("end_reason", sa.String(length=40), nullable=True),
        sa.ForeignKeyConstraint(["backbone_id"], ["backbones.id"], name=op.f("fk_sessions_backbone_id_backbones")),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_sessions_device_id_devices")),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name=op.f("fk_sessions_key_id_api_keys")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_sessions_user_id_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sessions")),
    )
    with op.batch_alter_table("sessions", schema=None) as batch_op:
        batch_op.create_index("ix_sessions_backbone_id_state", ["backbone_id", "state"], unique=False)
        batch_op.create_index("ix_sessions_backbone_id_id", ["backbone_id", "id"], unique=False)
        batch_op.create_index("ix_sessions_closed_at", ["closed_at"], unique=False)
        batch_op.create_index("ix_sessions_device_id_id", ["device_id", "id"], unique=False)
        batch_op.create_index("ix_sessions_key_id_id", ["key_id", "id"], unique=False)
        batch_op.create_index("ix_sessions_opened_at_id", ["opened_at", "id"], unique=False)
        batch_op.create_index("ix_sessions_state_id", ["state", "id"], unique=False)
        batch_op.create_index("ix_sessions_user_id_id", ["user_id", "id"], unique=False)
        batch_op.create_index("ix_sessions_user_id_state_id", ["user_id", "state", "id"], unique=False)

    op.create_table(
        "usage_hours",
        sa.Column("key_id", sa.String(length=30), nullable=False),
        sa.Column("hour", sa.DateTime(timezone=True), nullable=False),
        sa.Column("user_id", sa.String(length=30), nullable=False),
        sa.Column("bytes_up", sa.BigInteger(), nullable=False),
        sa.Column("bytes_down", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("sessions", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name=op.f("fk_usage_hours_key_id_api_keys")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_usage_hours_user_id_users")),
        sa.PrimaryKeyConstraint("key_id", "hour", name=op.f("pk_usage_hours")),
    )
    with op.batch_alter_table("usage_hours", schema=None) as batch_op:
        batch_op.create_index("ix_usage_hours_hour", ["hour"], unique=False)
        batch_op.create_index("ix_usage_hours_user_id_hour", ["user_id", "hour"], unique=False)

    op.create_table(
        "celery_clockedschedule",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("clocked_time", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "celery_crontabschedule",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column(
            "minute",
            sa.String(length=240),
            nullable=False,
            comment='Cron Minutes to Run. Use "*" for "all". (Example: "0,30")',
        ),
        sa.Column(
            "hour",
            sa.String(length=96),
            nullable=False,
            comment='Cron Hours to Run. Use "*" for "all". (Example: "8,20")',
        ),
        sa.Column(
            "day_of_week",
            sa.String(length=64),
            nullable=False,
            comment='Cron Days Of The Week to Run. Use "*" for "all", Sunday is 0 or 7, Monday is 1. (Example: "0,5")',
        ),
        sa.Column(
            "day_of_month",
            sa.String(length=124),
            nullable=False,
            comment='Cron Days Of The Month to Run. Use "*" for "all". (Example: "1,15")',
        ),
        sa.Column(
            "month_of_year",
            sa.String(length=64),
            nullable=False,
            comment='Cron Months (1-12) Of The Year to Run. Use "*" for "all". (Example: "1,12")',
        ),
        sa.Column(
            "timezone",
            sa.String(length=64),
            nullable=False,
            comment="Timezone to Run the Cron Schedule on. Default is UTC.",
        ),
        sa.PrimaryKeyConstraint("id"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "celery_intervalschedule",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column(
            "every",
            sa.Integer(),
            nullable=False,
            comment="Number of interval periods to wait before running the task again",
        ),
        sa.Column(
            "period",
            sa.Enum("days", "hours", "minutes", "seconds", "microseconds", name="period"),
            nullable=False,
            comment="The type of period between task runs (Example: days)",
        ),
        sa.CheckConstraint("every >= 1"),
        sa.PrimaryKeyConstraint("id"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "celery_periodictask",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False, comment="Short Description For This Task"),
        sa.Column(
            "task",
            sa.String(length=255),
            nullable=False,
            comment='The Name of the Celery Task that Should be Run.  (Example: "proj.tasks.import_contacts")',
        ),
        sa.Column(
            "args", sa.Text(), nullable=False, comment='JSON encoded positional arguments (Example: ["arg1", "arg2"])'
        ),
        sa.Column(
            "kwargs",
            sa.Text(),
            nullable=False,
            comment='JSON encoded keyword arguments (Example: {"argument": "value"})',
        ),
        sa.Column(
            "queue",
            sa.String(length=255),
            nullable=True,
            comment="Queue defined in CELERY_TASK_QUEUES. Leave None for default queuing.",
        ),
        sa.Column(
            "exchange", sa.String(length=255), nullable=True, comment="Override Exchange for low-level AMQP routing"
        ),
        sa.Column(
            "routing_key",
            sa.String(length=255),
            nullable=True,
            comment="Override Routing Key for low-level AMQP routing",
        ),
        sa.Column("headers", sa.Text(), nullable=True, comment="JSON encoded message headers for the AMQP message."),
        sa.Column(
            "priority",
            sa.Integer(),
            nullable=True,
            comment="Priority Number between 0 and 255. Supported by: RabbitMQ, Redis (priority reversed, 0 is highest).",
        ),
        sa.Column(
            "expires",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Datetime after which the schedule will no longer trigger the task to run",
        ),
        sa.Column(
            "expire_seconds",
            sa.Integer(),
            nullable=True,
            comment="Timedelta with seconds which the schedule will no longer trigger the task to run",
        ),
        sa.Column(
            "one_off",
            sa.Boolean(),
            nullable=False,
            comment="If True, the schedule will only run the task a single time",
        ),
        sa.Column(
            "start_time",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Datetime when the schedule should begin triggering the task to run",
        ),
        sa.Column("enabled", sa.Boolean(), nullable=False, comment="Set to False to disable the schedule"),
        sa.Column(
            "last_run_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Datetime that the schedule last triggered the task to run. ",
        ),
        sa.Column(
            "total_run_count",
            sa.Integer(),
            nullable=False,
            comment="Running count of how many times the schedule has triggered the task",
        ),
        sa.Column(
            "date_changed",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Datetime that this PeriodicTask was last modified",
        ),
        sa.Column(
            "description",
            sa.Text(),
            nullable=True,
            comment="Detailed description about the details of this Periodic Task",
        ),
        sa.Column(
            "discriminator", sa.String(length=20), nullable=False, comment="Lower case name of the schedule class. "
        ),
        sa.Column("schedule_id", sa.Integer(), nullable=False, comment="ID of the schedule model object. "),
        sa.CheckConstraint("priority BETWEEN 0 AND 255"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "celery_periodictaskchanged",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("last_update", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sqlite_autoincrement=False,
    )
    op.create_table(
        "celery_solarschedule",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column(
            "event",
            sa.Enum(
                "dawn_astronomical",
                "dawn_nautical",
                "dawn_civil",
                "sunrise",
                "solar_noon",
                "sunset",
                "dusk_civil",
                "dusk_nautical",
                "dusk_astronomical",
                name="solarevent",
            ),
            nullable=False,
            comment="The type of solar event when the job should run",
        ),
        sa.Column(
            "latitude",
            sa.Numeric(precision=9, scale=6, decimal_return_scale=6, asdecimal=False),
            nullable=False,
            comment="Run the task when the event happens at this latitude",
        ),
        sa.Column(
            "longitude",
            sa.Numeric(precision=9, scale=6, decimal_return_scale=6, asdecimal=False),
            nullable=False,
            comment="Run the task when the event happens at this longitude",
        ),
        sa.CheckConstraint("latitude BETWEEN -90 AND 90"),
        sa.CheckConstraint("longitude BETWEEN -180 AND 180"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("event", "latitude", "longitude"),
        sqlite_autoincrement=True,
    )
    _forbid_changes()


def _forbid_changes() -> None:
    """Let the database itself refuse to change or delete an entry of the audit log."""
    if op.get_bind().dialect.name == "sqlite":
        for action in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER audit_log_no_{action.lower()} BEFORE {action} ON audit_log "
                f"BEGIN SELECT RAISE(ABORT, '{_NO_CHANGE}'); END"
            )
        return
    op.execute(
        "CREATE FUNCTION audit_log_no_change() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{_NO_CHANGE}'; END $$"
    )
    op.execute(
        "CREATE TRIGGER audit_log_no_change BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_log_no_change()"
    )


def downgrade() -> None:
    op.drop_table("celery_solarschedule")
    op.drop_table("celery_periodictaskchanged")
    op.drop_table("celery_periodictask")
    op.drop_table("celery_intervalschedule")
    op.drop_table("celery_crontabschedule")
    op.drop_table("celery_clockedschedule")
    with op.batch_alter_table("usage_hours", schema=None) as batch_op:
        batch_op.drop_index("ix_usage_hours_user_id_hour")
        batch_op.drop_index("ix_usage_hours_hour")

    op.drop_table("usage_hours")
    with op.batch_alter_table("sessions", schema=None) as batch_op:
        batch_op.drop_index("ix_sessions_user_id_state_id")
        batch_op.drop_index("ix_sessions_user_id_id")
        batch_op.drop_index("ix_sessions_state_id")
        batch_op.drop_index("ix_sessions_opened_at_id")
        batch_op.drop_index("ix_sessions_key_id_id")
        batch_op.drop_index("ix_sessions_device_id_id")
        batch_op.drop_index("ix_sessions_closed_at")
        batch_op.drop_index("ix_sessions_backbone_id_state")
        batch_op.drop_index("ix_sessions_backbone_id_id")

    op.drop_table("sessions")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_index("ix_jobs_user_id_id")
        batch_op.drop_index("ix_jobs_state_run_at")
        batch_op.drop_index("ix_jobs_state_id")
        batch_op.drop_index("ix_jobs_schedule_id_id")
        batch_op.drop_index("ix_jobs_kind_id")
        batch_op.drop_index("ix_jobs_finished_at")
        batch_op.drop_index("ix_jobs_device_id_state")

    op.drop_table("jobs")
    with op.batch_alter_table("usage_days", schema=None) as batch_op:
        batch_op.drop_index("ix_usage_days_day_user_id")

    op.drop_table("usage_days")
    with op.batch_alter_table("devices", schema=None) as batch_op:
        batch_op.drop_index("ix_devices_user_id_id")

    op.drop_table("devices")
    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        batch_op.drop_index("ix_api_keys_user_id_id")

    op.drop_table("api_keys")
    with op.batch_alter_table("users", schema=None) as batch_op:
        batch_op.drop_index("ix_users_team_id")
        batch_op.drop_index("ix_users_plan_id")

    op.drop_table("users")
    op.drop_table("schedules")
    op.drop_table("quotas")
    op.drop_table("models")
    with op.batch_alter_table("metric_points", schema=None) as batch_op:
        batch_op.drop_index("ix_metric_points_at")

    op.drop_table("metric_points")
    with op.batch_alter_table("idempotent_requests", schema=None) as batch_op:
        batch_op.drop_index("ix_idempotent_requests_created_at")

    op.drop_table("idempotent_requests")
    with op.batch_alter_table("backbones", schema=None) as batch_op:
        batch_op.drop_index("ix_backbones_state_heartbeat_at")

    op.drop_table("backbones")
    with op.batch_alter_table("audit_log", schema=None) as batch_op:
        batch_op.drop_index("ix_audit_log_user_id_id")
        batch_op.drop_index("ix_audit_log_object_id_id")
        batch_op.drop_index("ix_audit_log_action_id")

    op.drop_table("audit_log")
    with op.batch_alter_table("adapters", schema=None) as batch_op:
        batch_op.drop_index("ix_adapters_model_hash_sha256")

    op.drop_table("adapters")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION audit_log_no_change()")
        for name in ("period", "solarevent"):  # types of the beat's columns, which outlive their tables
            op.execute(f"DROP TYPE {name}")

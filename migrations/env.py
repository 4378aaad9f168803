"""Alembic's environment: our tables, and those in which Celery beat keeps its schedules.

Runs on the connection that `privatelora.platform.database.Database` hands over, or for a developer's
`alembic revision --autogenerate` on the one that PRIVATELORA_DATABASE_URL names.
"""

from __future__ import annotations

import os

from alembic import context
from sqlalchemy import MetaData
from sqlalchemy_celery_beat.session import ModelBase

from privatelora.platform.database import Database
from privatelora.platform.tables import Base


def beat_tables() -> MetaData:
    """The beat's tables without the schema that its package names."""
    metadata = MetaData()
    for table in ModelBase.metadata.sorted_tables:
        table.to_metadata(metadata, schema=None)
    return metadata


def run() -> None:
    connection = context.config.attributes.get("connection")
    if connection is None:
        with Database(os.environ["PRIVATELORA_DATABASE_URL"]).engine.begin() as connection:
            migrate(connection)
    else:
        migrate(connection)


def migrate(connection: object) -> None:
    context.configure(
        connection=connection, target_metadata=[Base.metadata, beat_tables()], render_as_batch=True, compare_type=True
    )
    with context.begin_transaction():
        context.run_migrations()


run()

"""Log lines of a service process, all on stderr: structlog's own and those of libraries, as text or as JSON.

`configure_logging` is called once, by the command that serves. Log records name sessions, codes and sizes, never a
prompt, a token or a tensor; for that reason tracebacks come without their frames' local variables.
"""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import Processor

# Libraries whose ordinary progress the service tells in its own lines.
QUIET = dict.fromkeys(
    ("uvicorn", "httpx", "httpx2", "filelock", "alembic", "celery", "kombu", "sqlalchemy_celery_beat"), logging.WARNING
)


def configure_logging(level: str, form: str) -> None:
    """Send everything of at least `level` (debug, info, warning, error) to stderr; `form` is `console` or `json`."""
    least = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(least),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(form)],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(least)
    for name, level_number in QUIET.items():
        logging.getLogger(name).setLevel(max(least, level_number))


def _renderers(form: str) -> list[Processor]:
    if form == "json":
        without_locals = ExceptionDictTransformer(show_locals=False)
        return [structlog.processors.ExceptionRenderer(without_locals), structlog.processors.JSONRenderer()]
    return [
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback, pad_event_to=20
        )
    ]

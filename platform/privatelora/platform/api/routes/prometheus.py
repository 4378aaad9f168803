"""/metrics: this process's requests and the control plane's state, in Prometheus' text format, for those that overlook.

Names are shaped like vLLM's. Each backbone has its own `/metrics` with what it computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from starlette.responses import Response

from privatelora.platform.api.auth import OverseerCall
from privatelora.platform.database import Database
from privatelora.platform.registry import ALIVE_S
from privatelora.platform.tables import FINAL, BackboneNode, Job, JobState, SessionRow, SessionState, utc_now

router = APIRouter(tags=["metrics"])

LIVE = (SessionState.OPEN, SessionState.DRAINING)
TEXT = "text/plain; version=0.0.4; charset=utf-8"


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    summary="Numbers for Prometheus",
)
def get_metrics(call: OverseerCall) -> Response:
    """Version 0.0.4 of the text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_State(call.services.database))
    text = generate_latest(call.services.counts.registry) + generate_latest(registry)
    return Response(text, media_type=TEXT)


class _State(Collector):
    """What the database says now."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def collect(self) -> Iterator[Metric]:
        alive = (BackboneNode.state == "serving", BackboneNode.heartbeat_at > utc_now() - timedelta(seconds=ALIVE_S))
        open_jobs = [state for state in JobState if state not in FINAL]
        with self._database.read() as session:
            sessions = (
                select(SessionRow.state, func.count()).where(SessionRow.state.in_(LIVE)).group_by(SessionRow.state)
            )
            running = {str(state): count for state, count in session.execute(sessions)}
            jobs = select(Job.state, func.count()).where(Job.state.in_(open_jobs)).group_by(Job.state)
            waiting = {str(state): count for state, count in session.execute(jobs)}
            backbones = session.scalar(select(func.count()).select_from(BackboneNode).where(*alive)) or 0
        yield _by_state("num_sessions_running", "Sessions that are open.", running, LIVE)
        yield _by_state("num_jobs", "Jobs that have not ended.", waiting, open_jobs)
        yield GaugeMetricFamily("privatelora:num_backbones", "Backbones that serve.", value=backbones)


def _by_state(name: str, text: str, found: dict[str, int], states: object) -> Metric:
    family = GaugeMetricFamily(f"privatelora:{name}", text, labels=["state"])
    for state in states:  # type: ignore[attr-defined]  # a sequence of states
        family.add_metric([str(state)], found.get(str(state), 0))
    return family

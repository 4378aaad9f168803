"""/api/v1/metrics: backbones' numbers over time, for those that overlook. Prometheus reads `/metrics`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import select
from starlette.responses import Response

from privatelora.platform.api.answers import answer
from privatelora.platform.api.auth import OverseerCall
from privatelora.platform.api.fields import BackboneId, When
from privatelora.platform.api.problems import Invalid
from privatelora.platform.tables import MetricPoint, utc_now

router = APIRouter(prefix="/api/v1/metrics", tags=["metrics"])

MOST_ROWS = 20_000  # of the database, read for one answer
MOST_NAMES = 30
LAST = timedelta(hours=1)  # where no time is given

SeriesName = Annotated[str, StringConstraints(pattern="^[a-z0-9_.]{1,80}$")]


class Series(BaseModel):
    """One number of one backbone: its times (seconds since 1970) and values."""

    backbone_id: BackboneId
    name: str = Field(examples=["time_per_output_token_seconds.p95"])
    times: list[float] = Field(examples=[[1795694400.0, 1795694410.0]])
    values: list[float] = Field(examples=[[0.061, 0.064]])


class SeriesList(BaseModel):
    """Time series; `complete` is false where more points were asked for than one answer has."""

    series: list[Series]
    complete: bool


class SeriesQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: list[SeriesName] = Field(
        default_factory=list,
        max_length=MOST_NAMES,
        description="Names, such as num_sessions_running, tokens_per_s.decode, time_per_output_token_seconds.p99; "
        "all unless given.",
        examples=[["num_sessions_running"]],
    )
    backbone_id: BackboneId | None = Field(default=None, description="Of this backbone.")
    since: When | None = Field(default=None, description="From then on; an hour ago unless given.")
    until: When | None = Field(default=None, description="Before then; now unless given.")
    step_s: Annotated[float, Field(ge=1, le=86_400)] | None = Field(
        default=None,
        description="One point for so many seconds: the mean, and of quantiles (p50, p95, p99) the largest.",
        examples=[60],
    )


@router.get("", response_model=SeriesList, summary="Time series")
def get_series(call: OverseerCall, query: Annotated[SeriesQuery, Query()]) -> Response:
    """Gauges as they were, rates and quantiles of the interval that ended then."""
    until = query.until or utc_now()
    since = query.since or until - LAST
    if until < since:
        raise Invalid("query.until", "is before since")
    found = select(MetricPoint).where(MetricPoint.at >= since, MetricPoint.at < until)
    if query.backbone_id is not None:
        found = found.where(MetricPoint.backbone_id == query.backbone_id)
    with call.services.database.read() as session:
        rows = session.scalars(found.order_by(MetricPoint.at).limit(MOST_ROWS + 1)).all()
    series: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows[:MOST_ROWS]:
        for name, value in row.values.items():
            if not query.name or name in query.name:
                series.setdefault((row.backbone_id, name), []).append((_seconds(row.at), float(value)))
    items = [
        Series(backbone_id=backbone, name=name, times=[at for at, _ in points], values=[value for _, value in points])
        for (backbone, name), raw in sorted(series.items())
        for points in (_thinned(name, raw, query.step_s),)
    ]
    return answer(SeriesList(series=items, complete=len(rows) <= MOST_ROWS))


def _thinned(name: str, points: list[tuple[float, float]], step_s: float | None) -> list[tuple[float, float]]:
    if step_s is None:
        return points
    buckets: dict[float, list[float]] = {}
    for at, value in points:
        buckets.setdefault(at // step_s * step_s, []).append(value)
    quantile = name.rpartition(".")[2] in ("p50", "p95", "p99")
    return [(at, max(values) if quantile else sum(values) / len(values)) for at, values in buckets.items()]


def _seconds(at: datetime) -> float:
    return at.astimezone(UTC).timestamp()

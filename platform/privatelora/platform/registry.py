"""What backbones write to the database and read from it: themselves, their sessions, and what holds for those.

Plain functions of a `Database`, each one transaction; `gate.py` calls them in threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec
from sqlalchemy import bindparam, or_, select, update
from sqlalchemy.orm import Session

from privatelora.platform import keys, quotas, usage
from privatelora.platform.audit import SERVICE
from privatelora.platform.database import Database
from privatelora.platform.keys import Caller
from privatelora.platform.tables import (
    ApiKey,
    BackboneNode,
    Device,
    Level,
    MetricPoint,
    PublishedModel,
    PublishedSet,
    Quota,
    SessionRow,
    SessionState,
    User,
    utc_now,
)
from privatelora.platform.usage import Reading
from privatelora.protocol.messages import BLOB_PATH, ServiceInfo

if TYPE_CHECKING:
    from privatelora.platform.samples import Point  # which needs torch, as no other process than a backbone does

ALIVE_S = 5.0  # a backbone whose heartbeat is older gets no new devices


def enter(database: Database, backbone_id: str, url: str, info: ServiceInfo) -> None:
    """A backbone has begun to serve: its row, its model and its sets."""
    with database.write() as session:
        session.add(
            BackboneNode(
                id=backbone_id, url=url, model_hash=info.model.sha256, info=announcement(info, url), sessions=0
            )
        )
        model = session.get(PublishedModel, info.model.sha256) or PublishedModel(sha256=info.model.sha256)
        model.name, model.dtype = info.model.name, info.model.dtype
        model.shape, model.context_length = msgspec.to_builtins(info.model.shape), info.model.context_length
        session.add(model)
        _publish(session, info)


def announcement(info: ServiceInfo, url: str) -> dict[str, Any]:
    """What devices are told at the control plane: the backbone's own announcement, with its address in it."""
    plain: dict[str, Any] = msgspec.to_builtins(info)
    return plain | {"data_plane": url + info.data_plane, "blobs": url + BLOB_PATH}


def open_session(
    database: Database,
    backbone_id: str,
    session_id: str,
    number: int,
    caller: Caller,
    placement: str,
    installation: str | None,
) -> None:
    """A session begins."""
    now = utc_now()
    with database.write() as session:
        keys.touch(session, caller.key)
        device = None if installation is None else seen(session, caller.user, installation, now)
        session.add(
            SessionRow(
                id=session_id,
                number=number,
                user_id=caller.user,
                key_id=caller.key,
                device_id=device.id if device is not None else None,
                backbone_id=backbone_id,
                placement=placement[: SessionRow.placement.type.length],
                opened_at=now,
                view={},
            )
        )
        session.flush()
        usage.add(session, now, [(caller.key, caller.user, 0, 0, 0, 1)])


def seen(session: Session, user: str, installation: str, now: datetime) -> Device:
    """The row of a user's device, made when it is first seen."""
    device = session.scalar(select(Device).where(Device.user_id == user, Device.installation == installation))
    if device is None:
        device = Device(user_id=user, installation=installation, first_seen_at=now, allows=[])
        session.add(device)
    device.last_seen_at = now
    session.flush()
    return device


def write(
    database: Database,
    backbone_id: str,
    url: str,
    info: ServiceInfo,
    draining: bool,
    readings: Sequence[Reading],
    now: datetime,
) -> None:
    """What sessions have used, and that their backbone lives."""
    live = sum(one.closed_at is None for one in readings)
    with database.write() as session:
        node = session.get(BackboneNode, backbone_id)
        if node is None:  # a database that was put back from a backup
            node = BackboneNode(id=backbone_id, url=url, model_hash=info.model.sha256, info={})
            session.add(node)
        node.heartbeat_at, node.sessions, node.state = now, live, "draining" if draining else "serving"
        announced = announcement(info, url)
        if node.info != announced:  # a set was imported or calibrated
            node.info = announced
            _publish(session, info)
        usage.flush(session, readings, now)


def left(database: Database, backbone_id: str) -> None:
    """A backbone has stopped."""
    with database.write() as session:
        session.execute(update(BackboneNode).where(BackboneNode.id == backbone_id).values(state="gone", sessions=0))


def watch(database: Database, backbone_id: str, used: Sequence[str]) -> tuple[set[str], dict[str, str]]:
    """Of the keys `used`, those that are revoked or expired, or of a disabled user; and what operators ask of this
    backbone's sessions, by id."""
    with database.read() as session:
        bad = set(session.scalars(_BAD_KEYS, {"used": used, "now": utc_now()}))
        return bad, {row.id: str(row.command) for row in session.execute(_COMMANDS, {"backbone_id": backbone_id})}


# Made once, since a backbone asks twice a second, and making them takes longer than the database does.
_BAD_KEYS = (
    select(ApiKey.id)
    .join(User, User.id == ApiKey.user_id)
    .where(
        ApiKey.id.in_(bindparam("used", expanding=True)),
        or_(ApiKey.revoked_at.is_not(None), ApiKey.expires_at <= bindparam("now"), User.disabled_at.is_not(None)),
    )
)
_COMMANDS = select(SessionRow.id, SessionRow.command).where(
    SessionRow.backbone_id == bindparam("backbone_id"),
    SessionRow.state.in_((SessionState.OPEN, SessionState.DRAINING)),
    SessionRow.command.is_not(None),
)


def quotas_of(database: Database, callers: Sequence[Caller]) -> Mapping[str, list[Quota]]:
    """The quotas that hold for each of these, by key."""
    of = {caller.key: quotas.subjects(caller.user, caller.key, caller.plan, caller.team) for caller in callers}
    with database.read() as session:
        found = quotas.of_subjects(session, sorted({pair for pairs in of.values() for pair in pairs}))
    return {key: [quota for quota in found if (quota.level, quota.subject) in pairs] for key, pairs in of.items()}


def used(database: Database, quota: Quota) -> int:
    """What the database knows to be used of a quota in its running window."""
    with database.read() as session:
        return quotas.used(session, quota, utc_now())


def user_of(database: Database, quota: Quota) -> str | None:
    """Whose quota it is, if it is one user's."""
    if quota.level == Level.USER:
        return quota.subject
    if quota.level == Level.KEY:
        with database.read() as session:
            return session.scalar(select(ApiKey.user_id).where(ApiKey.id == quota.subject))
    return None


def warn(database: Database, quota: Quota, once: str, kind: str, data: Mapping[str, Any]) -> None:
    """Queue the quota's webhook, if it has one; `once` names what may be told only once."""
    from privatelora.platform.jobs import machine  # whose kinds import this module

    if quota.webhook_url is not None:
        with database.write() as session:
            machine.queue(
                session,
                SERVICE,
                "webhook",
                {"url": quota.webhook_url, "payload": {"event": kind, **data}},
                dedupe=once[:200],
            )


def add_point(database: Database, backbone_id: str, point: Point) -> None:
    """A point of the metrics' time series."""
    with database.write() as session:
        session.add(
            MetricPoint(backbone_id=backbone_id, at=utc_now(), interval_s=point.interval_s, values=point.values)
        )


def reap(session: Session, now: datetime, gone_after_s: float) -> int:
    """Close the sessions of backbones that have not been heard of for so long; returns how many."""
    gone = select(BackboneNode.id).where(
        or_(BackboneNode.state == "gone", BackboneNode.heartbeat_at < now - timedelta(seconds=gone_after_s))
    )
    session.execute(
        update(BackboneNode)
        .where(BackboneNode.state != "gone", BackboneNode.heartbeat_at < now - timedelta(seconds=gone_after_s))
        .values(state="gone", sessions=0)
        .execution_options(synchronize_session=False)
    )
    closed = session.execute(
        update(SessionRow)
        .where(SessionRow.state.in_((SessionState.OPEN, SessionState.DRAINING)), SessionRow.backbone_id.in_(gone))
        .values(state=SessionState.CLOSED, closed_at=now, end_reason="backbone_lost", view={})
        .execution_options(synchronize_session=False)
    )
    return int(closed.rowcount)  # type: ignore[attr-defined]  # an UPDATE's result has it


def _publish(session: Session, info: ServiceInfo) -> None:
    defaults = set(info.default_sets.values())
    for one in info.sets:
        row = session.get(PublishedSet, one.sha256)
        if row is None:
            row = PublishedSet(sha256=one.sha256, kind=one.kind, model_hash=one.model_hash, nbytes=one.nbytes)
            row.max_rank_down, row.max_rank_up = one.max_rank_down, one.max_rank_up
            session.add(row)
        row.default = one.sha256 in defaults

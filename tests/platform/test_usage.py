"""Usage and quotas in the database: flushes that may be repeated, days that are mended, windows that reset."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privatelora.platform import keys, quotas, usage
from privatelora.platform.database import Database
from privatelora.platform.leases import Grant
from privatelora.platform.quotas import window
from privatelora.platform.shared import Allowance
from privatelora.platform.tables import (
    BackboneNode,
    Quota,
    Resource,
    Scope,
    SessionRow,
    UsageDay,
    UsageHour,
    User,
    new_id,
)
from privatelora.platform.usage import Reading

NOON = datetime(2026, 11, 26, 12, 20, tzinfo=UTC)


class Used:
    """One user with a key and a session."""

    def __init__(self, database: Database) -> None:
        self.database = database
        with database.write() as session:
            user = User(id=new_id("usr"), name="alice", plan="free", team="red")
            session.add(user)
            session.flush()
            key, _ = keys.new_key(user, "laptop", Scope.DEVICE)
            node = BackboneNode(id=new_id("bbn"), url="http://x", model_hash="0" * 64, info={})
            session.add_all([key, node])
            session.flush()
            row = SessionRow(
                id=new_id("ses"), number=1, user_id=user.id, key_id=key.id, backbone_id=node.id, placement="paper"
            )
            session.add(row)
        self.user, self.key, self.row = user, key, row

    def flush(self, up: int, down: int, tokens: int, at: datetime) -> None:
        reading = Reading(self.row.id, self.user.id, self.key.id, up, down, tokens, {})
        with self.database.write() as session:
            usage.flush(session, [reading], at)

    def days(self) -> dict[date, tuple[int, int, int]]:
        with self.database.read() as session:
            return {row.day: (row.bytes_up, row.bytes_down, row.tokens) for row in session.query(UsageDay)}


@pytest.fixture
def used(database: Database) -> Iterator[Used]:
    yield Used(database)


def test_a_flush_that_is_repeated_adds_nothing(used: Used) -> None:
    for _ in range(3):
        used.flush(100, 200, 3, NOON)
    used.flush(150, 200, 4, NOON + timedelta(minutes=1))
    assert used.days() == {NOON.date(): (150, 200, 4)}


def test_a_session_over_midnight_is_used_on_both_days(used: Used) -> None:
    used.flush(100, 10, 1, NOON)
    used.flush(130, 15, 2, NOON + timedelta(days=1))
    assert used.days() == {NOON.date(): (100, 10, 1), NOON.date() + timedelta(days=1): (30, 5, 1)}


def test_a_day_that_differs_from_its_hours_is_mended_once(used: Used) -> None:
    used.flush(100, 10, 1, NOON)
    used.flush(160, 10, 1, NOON + timedelta(hours=1))
    with used.database.write() as session:
        # the day of the oldest hour may lack hours, and is left alone, unless that is its first
        session.add(UsageHour(key_id=used.key.id, user_id=used.user.id, hour=datetime(2026, 11, 25, tzinfo=UTC)))
        session.query(UsageDay).update({"bytes_up": 7})
    with used.database.write() as session:
        assert usage.mend(session, NOON.date()) == 1
    assert used.days()[NOON.date()] == (160, 10, 1)
    with used.database.write() as session:
        assert usage.mend(session, NOON.date()) == 0


def quota(resource: Resource, level: str = "user", subject: str = "", resets_at: str = "00:00") -> Quota:
    return Quota(id="quo_x", level=level, subject=subject, resource=resource, limit=1000, resets_at=resets_at)


@pytest.mark.parametrize("level", ["plan", "team", "user", "key"])
def test_what_is_used_of_a_daily_quota_counts_from_its_reset(used: Used, level: str) -> None:
    used.flush(100, 10, 1, NOON - timedelta(hours=8))
    used.flush(160, 30, 1, NOON)
    subject = {"plan": "free", "team": "red", "user": used.user.id, "key": used.key.id}[level]
    with used.database.read() as session:
        for resets_at, expected in (("00:00", 160), ("06:00", 60), ("13:00", 160)):
            one = quota(Resource.BYTES_UP_PER_DAY, level, subject, resets_at)
            assert quotas.used(session, one, NOON) == expected
        assert quotas.used(session, quota(Resource.BYTES_DOWN_PER_DAY, level, subject), NOON) == 30
        assert quotas.used(session, quota(Resource.BYTES_UP_PER_DAY, level, "another"), NOON) == 0


class Asked:
    """A bank that answers when the test says."""

    def __init__(self) -> None:
        self.wants: list[int] = []

    def ask(self, allowance: Allowance, want: int) -> None:
        self.wants.append(want)

    def write(self) -> None: ...

    def pace(self, rate: object, nbytes: int) -> None: ...


@pytest.mark.parametrize(("limit", "spent_out"), [(2000, False), (1000, True), (500, True)])
def test_a_block_that_comes_after_its_quota_was_changed_ends_nobody_who_may_have_more(
    limit: int, spent_out: bool
) -> None:
    asked_for, changed = quota(Resource.BYTES_UP_PER_DAY), quota(Resource.BYTES_UP_PER_DAY)
    changed.limit = limit
    bank = Asked()
    allowance = Allowance(asked_for, bank, largest=1000)
    allowance.ask(0)
    allowance.change(changed)
    allowance.granted(asked_for, allowance.span, bank.wants[0], Grant(0, 1000, b"epoch"))
    assert allowance.spent_out is spent_out
    allowance.ask(0)
    assert len(bank.wants) == (1 if spent_out else 2)


@given(
    st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),
    st.times().map("{:%H:%M}".format),
    st.sampled_from(list(quotas.WINDOWS)),
)
def test_a_window_holds_its_moment_and_is_as_long_as_its_resource_says(
    now: datetime, resets_at: str, resource: Resource
) -> None:
    span = window(quota(resource, resets_at=resets_at), now)
    assert span is not None
    assert span.starts_at <= now < span.resets_at
    assert span.resets_at - span.starts_at == quotas.WINDOWS[resource]
    if resource is not Resource.TOKENS_PER_MINUTE:
        assert f"{span.starts_at:%H:%M}" == resets_at

"""A backbone with a control plane: keys, quotas, slots, rates and usage, on real servers and over real sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
from redis import Redis
from sqlalchemy import update
from tests.support.managed import Managed, Member, managed
from tests.support.player import Player
from tests.support.servers import PostgresServer, ValkeyServer, valkey_server
from tests.support.service import ServiceProcess
from tests.support.tiny import tiny_model
from tests.support.wire import announced
from websockets.exceptions import InvalidStatus

from privatelora.platform.events import STREAM, read_event
from privatelora.platform.tables import ApiKey, Command, Device, Job, SessionRow, utc_now
from privatelora.protocol.errors import (
    AdmissionError,
    AuthenticationError,
    ConfigurationError,
    PrivateLoraError,
    QuotaError,
    SessionEndedError,
)
from privatelora.protocol.frames import Phase

LEASE_BYTES = 20_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gate")


@pytest.fixture(scope="module")
def control(folder: Path, server: PostgresServer, valkey: ValkeyServer) -> Iterator[Managed]:
    model = folder / "model"
    tiny_model("llama", model)
    settings = {"flush_s": "0.2", "slot_s": "2", "lease_bytes": str(LEASE_BYTES), "lease_tokens": "50"}
    with managed(model, folder, server.database(), valkey.url, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def one(control: Managed) -> ServiceProcess:
    return control.backbone()


@pytest.fixture(scope="module")
def two(control: Managed, one: ServiceProcess) -> ServiceProcess:
    return control.backbone()


@pytest.fixture
def alice(control: Managed, request: pytest.FixtureRequest) -> Member:
    return control.user(f"alice of {plan_of(request)}", plan=plan_of(request), team=plan_of(request))


def wait_for(met: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def plan_of(request: pytest.FixtureRequest) -> str:
    """Name of a plan, and of a team, that only this test uses."""
    return request.node.name[-100:]


def closed(control: Managed, user: Member, count: int = 1) -> list[SessionRow]:
    """The rows of a user's sessions, once `count` are closed and nobody is open."""

    def over() -> bool:
        rows = control.sessions(user.id)
        return len(rows) >= count and all(row.state == "closed" for row in rows)

    wait_for(over)
    return control.sessions(user.id)


# -- who may connect --------------------------------------------------------------------------------------------------


def test_a_session_and_its_device_are_rows_and_its_usage_is_what_the_device_counted(
    control: Managed, one: ServiceProcess, alice: Member
) -> None:
    with Player(one.url, alice.key) as device:
        device.enter(device="0" * 32)
        device.run(Phase.TRAIN, (0, 0, 7))
        device.decode(1, 0, 3)
        live = control.sessions(alice.id)
        assert [row.state for row in live] == ["open"]
        device.close()
        moved = device.moved
    (row,) = closed(control, alice)
    assert [row.bytes_up, row.bytes_down, row.tokens] == [*moved, 10]
    assert row.end_reason == "closed"
    assert control.used(alice.id) == (*moved, 10)
    with control.database.read() as session:
        assert session.get_one(Device, row.device_id).user_id == alice.id


def test_the_layer_schedulers_view_of_a_live_session_is_kept(
    control: Managed, one: ServiceProcess, alice: Member
) -> None:
    with Player(one.url, alice.key) as device:
        device.enter()
        device.run(Phase.TRAIN, (0, 0, 7), stop=lambda frame: True)
        wait_for(lambda: bool(control.sessions(alice.id)[0].view.get("passes")))
        (seen,) = control.sessions(alice.id)[0].view["passes"]
        assert (seen["phase"], seen["tokens"], seen["waits_for"]) == ("train", 7, "device")


def test_a_revoked_key_is_refused_at_once_and_its_live_session_ends(
    control: Managed, one: ServiceProcess, alice: Member
) -> None:
    with Player(one.url, alice.key) as device:
        device.enter()
        device.decode(0, 0, 1)
        with control.database.write() as session:
            session.execute(update(ApiKey).where(ApiKey.id == alice.key_id).values(revoked_at=utc_now()))
        with pytest.raises(InvalidStatus, match="401"), Player(one.url, alice.key, device.info):
            pass
        assert isinstance(device.ended(), AuthenticationError)
    assert closed(control, alice)[0].end_reason == "authentication"


@pytest.mark.parametrize("change", [{"expires_at": utc_now() - timedelta(seconds=1)}, {"scope": "read-only"}])
def test_a_key_that_is_no_devices_opens_no_session(
    control: Managed, one: ServiceProcess, alice: Member, change: dict[str, object]
) -> None:
    other = control.user(f"other {change}")
    with control.database.write() as session:
        session.execute(update(ApiKey).where(ApiKey.id == alice.key_id).values(**change))
    info = announced(one.url, other.key)
    with pytest.raises((InvalidStatus, AuthenticationError)), Player(one.url, alice.key, info) as device:
        device.enter()


@pytest.mark.parametrize(("command", "error"), [(Command.END, SessionEndedError), (Command.DRAIN, AdmissionError)])
def test_an_operator_ends_or_drains_a_session(
    control: Managed, one: ServiceProcess, alice: Member, command: Command, error: type[PrivateLoraError]
) -> None:
    with Player(one.url, alice.key) as device:
        device.enter()
        device.run(Phase.TRAIN, (0, 0, 7), stop=lambda frame: True)
        with control.database.write() as session:
            session.execute(update(SessionRow).where(SessionRow.user_id == alice.id).values(command=command))
        if command is Command.DRAIN:
            wait_for(lambda: control.sessions(alice.id)[0].state == "draining")
            assert device.kept is not None
            device.send(device.kept)  # a pass that has begun may be finished
            device.go_on()
        ended = device.ended()
        assert type(ended) is error
    assert closed(control, alice)[0].end_reason == error.code


# -- quotas -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["plan", "team", "user", "key"])
def test_a_spent_quota_of_any_level_ends_the_session_with_the_time_at_which_it_resets(
    control: Managed, one: ServiceProcess, alice: Member, level: str, request: pytest.FixtureRequest
) -> None:
    plan = plan_of(request)
    subject = {"plan": plan, "team": plan, "user": alice.id, "key": alice.key_id}[level]
    control.quota(level, subject, "bytes_up_per_day", 30_000)
    with Player(one.url, alice.key) as device:
        device.enter()
        with pytest.raises(QuotaError):  # whose message may be behind a frame that could not be sent any more
            for step in range(1000):
                device.decode(0, step, 1)
    with (
        Player(one.url, alice.key, device.info) as device,
        pytest.raises(QuotaError, match=f"{level}'s quota of 30000 bytes_up_per_day") as refused,
    ):
        device.enter()
    assert refused.value.retry_after_s is not None
    assert 0 < refused.value.retry_after_s <= 86_400
    closed(control, alice)
    used = control.used(alice.id)[0]
    assert 30_000 - 2_000 <= used <= 30_000 + LEASE_BYTES


def test_tokens_a_minute_are_never_overspent(control: Managed, one: ServiceProcess, alice: Member) -> None:
    control.quota("user", alice.id, "tokens_per_minute", 100)
    if 60 - utc_now().second < 10:
        time.sleep(11)  # not in the last seconds of a minute
    with Player(one.url, alice.key) as device:
        device.enter()
        device.run(Phase.SCORE, (0, 0, 60))
        with pytest.raises(QuotaError, match="tokens_per_minute") as refused:
            device.run(Phase.SCORE, (0, 0, 60))
        assert refused.value.retry_after_s is not None
        assert refused.value.retry_after_s <= 60
    assert closed(control, alice)[0].tokens == 60
    with Player(one.url, alice.key, device.info) as device:
        device.enter()
        device.run(Phase.SCORE, (0, 0, 40))
        with pytest.raises(ConfigurationError, match="smaller batches"):
            device.run(Phase.SCORE, (0, 0, 101))


def test_slots_are_leases_of_all_backbones_and_come_free_when_one_is_killed(
    control: Managed, one: ServiceProcess, alice: Member
) -> None:
    control.quota("user", alice.id, "concurrent_sessions", 2)
    doomed = control.backbone()
    with ExitStack() as sockets:
        devices = [sockets.enter_context(Player(url, alice.key)) for url in (one.url, doomed.url, one.url)]
        devices[0].enter()
        devices[1].enter()
        with pytest.raises(AdmissionError, match="2 concurrent_sessions"):
            devices[2].enter()
        doomed.kill()

        def entered() -> bool:
            with Player(one.url, alice.key, devices[0].info) as device:
                try:
                    device.enter()
                except AdmissionError:
                    return False
                return True

        wait_for(entered)
        devices[0].decode(0, 0, 1)  # which was not in its way


def test_memory_of_all_sessions_of_a_quota_is_bounded(control: Managed, one: ServiceProcess, alice: Member) -> None:
    def hold(device: Player) -> None:
        device.enter()
        device.run(Phase.TRAIN, (0, 0, 25), stop=lambda frame: True)  # its activations are kept for the way back

    with Player(one.url, alice.key) as device:
        hold(device)
        wait_for(lambda: bool(control.sessions(alice.id)[0].view.get("held_bytes")))
        held = control.sessions(alice.id)[0].view["held_bytes"]
    control.quota("user", alice.id, "kv_memory_bytes", held + held // 2)
    with Player(one.url, alice.key) as first, Player(one.url, alice.key, first.info) as second:
        hold(first)
        with pytest.raises(QuotaError, match="kv_memory_bytes"):
            hold(second)
        first.send(first.kept or b"")
        first.go_on()
    with Player(one.url, alice.key, first.info) as second:
        hold(second)


def test_a_rate_holds_devices_back_and_cuts_none(control: Managed, one: ServiceProcess, alice: Member) -> None:
    rate = 60_000
    control.quota("user", alice.id, "bytes_per_second", rate)

    def work(index: int) -> int:
        with Player(one.url, alice.key, info) as device:
            device.enter()
            for _ in range(3):
                device.run(Phase.SCORE, (0, 0, 40))
            device.close()
            return sum(device.moved)

    with Player(one.url, alice.key) as device:
        info = device.info
    began = time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        moved = sum(threads.map(work, range(2)))
    seconds = time.monotonic() - began
    assert moved > 3 * rate
    assert moved / seconds < 1.5 * rate  # a block in hand, and the frames under way
    assert [row.end_reason for row in closed(control, alice, 2)] == ["closed", "closed"]


def test_a_quota_that_is_made_or_raised_holds_for_sessions_that_are_open(
    control: Managed, one: ServiceProcess, alice: Member
) -> None:
    with Player(one.url, alice.key) as device:
        device.enter()
        device.decode(0, 0, 1)
        control.quota("user", alice.id, "bytes_up_per_day", 1)

        def refused() -> bool:
            try:
                device.decode(0, device.step, 1)
            except QuotaError:
                return True
            return False

        wait_for(refused)


def test_a_soft_limit_warns_once_by_event_and_by_webhook_and_ends_nobody(
    control: Managed, one: ServiceProcess, two: ServiceProcess, alice: Member, valkey: ValkeyServer
) -> None:
    hook = {"soft_limit": 30_000, "webhook_url": "http://127.0.0.1:9/hook"}
    quota = control.quota("user", alice.id, "bytes_up_per_day", 10_000_000, **hook)
    for running in (one, two):
        with Player(running.url, alice.key) as device:
            device.enter()
            for step in range(60):
                device.decode(0, step, 1)
            device.close()

    def told() -> list[str]:
        entries = Redis.from_url(valkey.url).xrange(STREAM)
        events = [read_event(fields) for _, fields in entries]
        return [event.kind for event in events if event.data.get("quota") == quota]

    wait_for(lambda: bool(told()))
    assert [row.end_reason for row in closed(control, alice, 2)] == ["closed", "closed"]
    assert told() == ["quota.soft_limit"]
    with control.database.read() as session:
        (job,) = [job for job in session.query(Job).filter(Job.kind == "webhook") if quota in str(job.params)]
    assert job.params["payload"]["event"] == "quota.soft_limit"
    assert job.params["payload"]["used"] >= 30_000


def test_sessions_that_begin_and_end_leave_nothing_of_a_shared_quota_taken(
    control: Managed, one: ServiceProcess, alice: Member
) -> None:
    control.quota("user", alice.id, "bytes_up_per_day", 60_000)
    with Player(one.url, alice.key) as device:
        info = device.info
    for _ in range(30):  # each would take a block of 1,500 bytes
        with Player(one.url, alice.key, info) as device:
            device.enter()
    closed(control, alice, 30)
    with Player(one.url, alice.key, info) as device:
        device.enter()
        for step in range(15):
            device.decode(0, step, 1)


def test_a_pass_that_never_fits_is_no_matter_of_waiting(control: Managed, one: ServiceProcess, alice: Member) -> None:
    control.quota("user", alice.id, "kv_memory_bytes", 100)
    with Player(one.url, alice.key) as device:
        device.enter()
        with pytest.raises(ConfigurationError, match="over the user's quota of 100 kv_memory_bytes"):
            device.run(Phase.TRAIN, (0, 0, 25))


def test_a_device_that_comes_while_valkey_is_away_is_told_to_come_again(control: Managed, alice: Member) -> None:
    control.quota("user", alice.id, "bytes_up_per_day", 10**9)
    with valkey_server() as mortal:
        running = control.backbone(valkey_url=mortal.url)
        info = announced(running.url, alice.key)
        mortal.kill()
        with Player(running.url, alice.key, info) as device, pytest.raises(AdmissionError, match="try again"):
            device.enter()
        mortal.start()
        with Player(running.url, alice.key, info) as device:
            device.enter()


def test_64_sessions_on_two_backbones_overspend_by_no_more_than_a_lease_each(
    control: Managed, one: ServiceProcess, two: ServiceProcess, alice: Member
) -> None:
    limit = 3_000_000
    control.quota("user", alice.id, "bytes_up_per_day", limit)
    with Player(one.url, alice.key) as device:
        info = device.info
    ready = threading.Barrier(64)

    def work(index: int) -> int:
        with Player((one.url, two.url)[index % 2], alice.key, info) as device:
            device.enter()
            ready.wait()
            try:
                for step in range(10_000):
                    device.decode(0, step % 100, 1) if step % 100 else device.run(Phase.GENERATE, (step, 0, 1))
            except QuotaError:
                return device.moved[0]
        raise AssertionError("no quota ended it")

    with ThreadPoolExecutor(64) as threads:
        sent = sum(threads.map(work, range(64)))
    assert {row.end_reason for row in closed(control, alice, 64)} == {"quota"}
    used = control.used(alice.id)[0]
    assert limit - 2 * LEASE_BYTES <= used <= limit + 2 * LEASE_BYTES
    assert abs(sent - used) <= 2 * LEASE_BYTES


def test_a_valkey_that_lost_everything_costs_no_more_than_a_lease(control: Managed, alice: Member) -> None:
    limit = 400_000
    control.quota("user", alice.id, "bytes_up_per_day", limit)
    with valkey_server() as mortal:
        backbones = [control.backbone(valkey_url=mortal.url) for _ in range(2)]
        with ExitStack() as sockets:
            devices = [sockets.enter_context(Player(running.url, alice.key)) for running in backbones]
            for device in devices:
                device.enter()
                for step in range(40):
                    device.decode(0, step, 1)
            mortal.kill()
            for device in devices:  # from what is in hand, then held back
                device.begin(Phase.GENERATE, (0, 40, 1))
            mortal.start()
            ended = 0
            for device in devices:
                device.go_on()
                try:
                    for step in range(41, 1000):
                        device.decode(step, 0, 1)
                        device.release(step)
                except QuotaError:
                    ended += 1
            assert ended == 2
        closed(control, alice, 2)
    assert limit - 2 * LEASE_BYTES <= control.used(alice.id)[0] <= limit + 2 * LEASE_BYTES

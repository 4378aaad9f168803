"""A control plane sends a device on to a backbone, by absolute URLs; one that moves is followed, with nothing lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.fleet import Fleet
from tests.support.jobs_plane import JobsPlane, announcement_of
from tests.support.proxy import Proxy, nth

from privatelora.device import DeviceSession
from privatelora.platform.database import Database
from privatelora.protocol.errors import AdmissionError, ConfigurationError
from privatelora.protocol.frames import Kind

ROWS = [f"The door code of house {i} is {4071 + i}." for i in range(4)]
SETTINGS: dict[str, Any] = {"epochs": 1, "batch_size": 1, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    found = Database(f"sqlite:///{tmp_path_factory.mktemp('moved')}/control.db")
    found.upgrade()
    yield found
    found.close()


@pytest.fixture
def first(fleet: Fleet) -> Iterator[Proxy]:
    """The backbone's address at first."""
    with Proxy(fleet.service("llama").port) as running:
        yield running


@pytest.fixture
def plane(fleet: Fleet, database: Database, first: Proxy) -> Iterator[JobsPlane]:
    token = fleet.service("llama").token
    with JobsPlane(database, announcement_of(first.url, token), token) as started:
        yield started


def device(fleet: Fleet, plane: JobsPlane, **settings: Any) -> DeviceSession:
    return fleet.connect(
        fleet.service("llama"), server=plane.url, placement="first=1,last=1,inline=2+3", rank=8, **settings
    )


def test_a_device_computes_and_downloads_where_it_is_sent(
    fleet: Fleet, plane: JobsPlane, first: Proxy, tmp_path: Path
) -> None:
    with device(fleet, plane, cache_dir=tmp_path) as me:
        assert me.generate("The door", max_new_tokens=3)
        assert me.service.data_plane_url == first.url.replace("http", "ws") + "/v1/sessions"
    assert len(first.arrivals) == 1
    assert plane.calls == ["GET info"]  # everything else went to the backbone
    assert list((tmp_path / "blobs").iterdir())


def test_an_announced_websocket_url_is_the_same(fleet: Fleet, plane: JobsPlane, first: Proxy) -> None:
    assert plane.info is not None
    plane.info = {**plane.info, "data_plane": plane.info["data_plane"].replace("http", "ws")}
    with device(fleet, plane) as me:
        assert me.generate("The door", max_new_tokens=2)
    assert len(first.arrivals) == 1


def test_a_backbone_that_moves_is_followed_also_through_a_time_without_one(
    fleet: Fleet, plane: JobsPlane, first: Proxy
) -> None:
    running = fleet.service("llama")
    with device(fleet, plane) as me:
        calm = [step.loss for step in me.finetune(ROWS, **SETTINGS).history]
    before = len(first.arrivals)
    with Proxy(running.port) as second, device(fleet, plane) as me:
        elsewhere = announcement_of(second.url, running.token)
        plane.calls.clear()

        def answer_then_know(*request: Any) -> tuple[int, Any]:
            found = JobsPlane.answer(plane, *request)
            plane.info = elsewhere
            return found

        plane.answer = answer_then_know  # type: ignore[method-assign]  # to see what was asked
        first.cut(nth(3, Kind.GRAD_DELTA), then=lambda: setattr(plane, "info", None))
        report = me.finetune(ROWS, **SETTINGS)
        assert [step.loss for step in report.history] == pytest.approx(calm, rel=1e-5)
        assert (len(first.arrivals) - before, len(second.arrivals)) == (1, 1)
        assert plane.calls == ["GET info", "GET info"]  # refused, then sent on


def test_a_backbone_that_stays_is_asked_for_only_when_it_was_lost(fleet: Fleet, plane: JobsPlane, first: Proxy) -> None:
    with device(fleet, plane) as me:
        first.cut(nth(2, Kind.GRAD_DELTA))
        assert me.finetune(ROWS, **SETTINGS).steps == 4
        assert me.generate("The door", max_new_tokens=2)
    assert plane.calls == ["GET info", "GET info"]
    assert len(first.arrivals) == 2


def test_without_a_backbone_the_device_is_told_to_come_again(fleet: Fleet, plane: JobsPlane) -> None:
    plane.info = None
    with pytest.raises(AdmissionError, match="no backbone serves now"):
        device(fleet, plane)


@pytest.mark.parametrize("field", ["data_plane", "blobs"])
def test_an_announced_plain_connection_to_another_host_is_refused(
    fleet: Fleet, plane: JobsPlane, tmp_path: Path, field: str
) -> None:
    assert plane.info is not None
    plane.info = {**plane.info, field: f"http://192.0.2.1:8765/v1/{field}"}
    with pytest.raises(ConfigurationError, match=r"sends this device on: http://192.0.2.1:8765/v1/.* plain connection"):
        device(fleet, plane, cache_dir=tmp_path / "cache").generate("The door")
    if field == "blobs":
        assert list((tmp_path / "cache" / "blobs").iterdir()) == []


def test_what_is_announced_must_be_an_address(fleet: Fleet, plane: JobsPlane) -> None:
    assert plane.info is not None
    plane.info = {**plane.info, "data_plane": "file:///etc/passwd"}
    with pytest.raises(ConfigurationError, match="sends this device on"), device(fleet, plane) as me:
        me.generate("The door")

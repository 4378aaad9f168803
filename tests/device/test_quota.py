"""A device whose allowance is spent in mid-training: it stops or waits as its owner says, and loses nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.fleet import Fleet
from tests.support.proxy import Proxy, nth

from privatelora.device import DeviceSession, FinetuneReport
from privatelora.device.installation import installation_of
from privatelora.protocol.errors import ConfigurationError, QuotaError, StoreError
from privatelora.protocol.frames import Frame, Kind, Phase
from privatelora.protocol.messages import ErrorInfo, control_frame

ROWS = [f"The door code of house {i} is {4071 + i}." for i in range(4)]
WAIT_S = 0.3
PLACEMENT = "first=1,last=1,inline=2+3"
SETTINGS: dict[str, Any] = {"epochs": 2, "batch_size": 1, "learning_rate": 1e-2}


@pytest.fixture
def proxy(fleet: Fleet) -> Iterator[Proxy]:
    with Proxy(fleet.service("llama").port) as running:
        yield running


def spent(retry_after_s: float = WAIT_S) -> Frame:
    error = QuotaError("the user's quota of 9 bytes_up_per_day is spent.", retry_after_s=retry_after_s)
    return control_frame(Kind.ERROR, ErrorInfo.of(error))


def through(proxy: Proxy, fleet: Fleet, **settings: Any) -> DeviceSession:
    running = fleet.service("llama")
    return fleet.connect(running, server=proxy.url, placement=PLACEMENT, rank=8, **settings)


def losses(report: FinetuneReport) -> list[float]:
    return [record.loss for record in report.history]


@pytest.fixture
def calm(fleet: Fleet) -> list[float]:
    """The losses of the same fine-tune where nothing is spent."""
    with fleet.session("llama", placement=PLACEMENT, rank=8) as me:
        return losses(me.finetune(ROWS, **SETTINGS))


def test_it_stops_by_itself_says_when_to_go_on_and_resumes_as_if_nothing_had_been(
    fleet: Fleet, proxy: Proxy, calm: list[float]
) -> None:
    proxy.before(nth(3, Kind.GRAD_DELTA, layer=2), [spent(7200.0)])  # in the way back of the third step
    with through(proxy, fleet) as me:
        first = me.finetune(ROWS, **SETTINGS)
        assert (first.stopped, first.retry_after_s, first.steps) == ("quota", 7200.0, 2)
        rest = me.finetune(ROWS, **SETTINGS, resume=True)
        assert (rest.stopped, rest.retry_after_s) == ("finished", None)
        assert losses(first) + losses(rest) == pytest.approx(calm, rel=1e-5)


def test_it_waits_where_its_owner_says_so_and_the_step_is_done_again(
    fleet: Fleet, proxy: Proxy, calm: list[float]
) -> None:
    proxy.before(nth(2, Kind.ENCODED, Phase.TRAIN, layer=3), [spent()])
    told: list[float | None] = []
    with through(proxy, fleet, on_quota=lambda error: told.append(error.retry_after_s), retry_s=0.01) as me:
        started = time.monotonic()
        report = me.finetune(ROWS, **SETTINGS, on_quota="wait")
        assert time.monotonic() - started > WAIT_S
        assert report.stopped == "finished"
        assert losses(report) == pytest.approx(calm, rel=1e-5)
    assert told == [WAIT_S]


def test_who_generates_or_evaluates_is_told_at_once(fleet: Fleet, proxy: Proxy) -> None:
    proxy.before(nth(1, Kind.OPENED), [spent(60.0)])
    proxy.before(nth(1, Kind.OPENED), [spent(60.0)])
    with through(proxy, fleet) as me:
        with pytest.raises(QuotaError, match="bytes_up_per_day") as refused:
            me.generate("The door", max_new_tokens=2)
        assert refused.value.retry_after_s == 60.0
        with pytest.raises(QuotaError):
            me.evaluate(ROWS)
        assert me.generate("The door", max_new_tokens=2)


def test_a_choice_that_there_is_not_is_refused(fleet: Fleet) -> None:
    with fleet.session("llama", placement=PLACEMENT, rank=8) as me, pytest.raises(ConfigurationError, match="stop or"):
        me.finetune(ROWS, on_quota="panic")


def test_an_installation_has_one_number_however_often_it_is_asked(tmp_path: Path) -> None:
    store = tmp_path / "store"
    number = installation_of(store)
    assert installation_of(store) == number != installation_of(tmp_path / "another")
    assert (store / ".installation").stat().st_mode & 0o777 == 0o600
    (store / ".installation").write_text("xyz")
    with pytest.raises(StoreError, match="damaged; delete it"):
        installation_of(store)

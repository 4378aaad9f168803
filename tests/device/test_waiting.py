"""A device that is told to wait: for a place, and for memory in mid-session; it waits as long as it is told so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.support.fleet import Fleet
from tests.support.proxy import Proxy, nth

from privatelora.device import DeviceSession
from privatelora.device.cli_options import say_place
from privatelora.protocol.errors import ConnectionLostError, ProtocolError
from privatelora.protocol.frames import Frame, Kind, Phase
from privatelora.protocol.messages import Queued, control_frame

ROWS = ["The door code of house 1 is 4071."]
MIXED = "first=1,last=1,inline=2+3"


@pytest.fixture
def proxy(fleet: Fleet) -> Iterator[Proxy]:
    with Proxy(fleet.service("llama").port) as running:
        yield running


def queued(place: int, waiting: int) -> Frame:
    return control_frame(Kind.QUEUED, Queued(place=place, waiting=waiting))


def through(proxy: Proxy, fleet: Fleet, **settings: Any) -> DeviceSession:
    running = fleet.service("llama")
    return fleet.connect(running, server=proxy.url, placement=MIXED, rank=8, **settings)


def gradients(me: DeviceSession) -> list[torch.Tensor]:
    me.forward_backward(me.examples(ROWS).examples)
    return [p.grad for p in me.adapter.parameters() if p.grad is not None]


def test_a_device_waits_for_a_place_and_for_memory_and_hears_how_long(fleet: Fleet, proxy: Proxy) -> None:
    told: list[tuple[int, int]] = []
    proxy.before(nth(1, Kind.OPENED), [queued(3, 5), queued(1, 4)])
    proxy.before(nth(1, Kind.ENCODED, Phase.TRAIN, layer=2), [queued(2, 2), queued(1, 1)])
    with fleet.session("llama", placement=MIXED, rank=8) as calm, through(proxy, fleet) as me:
        me.remote.on_wait = lambda place, waiting: told.append((place, waiting))
        assert all(map(torch.equal, gradients(me), gradients(calm)))
        assert told == [(3, 5), (1, 4), (2, 2), (1, 1)]
        assert len(proxy.arrivals) == 1
        count, others = me.remote.count, calm.remote.count
        assert (count.payload_up, count.payload_down) == (others.payload_up, others.payload_down)
        numbers = len(str(me.remote.session)) - len(str(calm.remote.session))  # OPENED has it in decimal digits
        assert count.overhead_down == others.overhead_down + numbers + sum(len(queued(1, 1).pack()) for _ in told)


def test_nobody_needs_to_listen(fleet: Fleet, proxy: Proxy) -> None:
    proxy.before(nth(1, Kind.OPENED), [queued(1, 1)])
    with through(proxy, fleet) as me:
        assert me.generate("The door code", max_new_tokens=2) is not None
        assert len(proxy.arrivals) == 1


def test_waiting_is_no_silence(fleet: Fleet, proxy: Proxy) -> None:
    proxy.before(nth(1, Kind.OPENED), [queued(1, 1)] * 4, pause_s=0.6)
    with through(proxy, fleet, timeout_s=1.0, retry_s=0.0) as me:
        gradients(me)
        proxy.cut(nth(1, Kind.ENCODED), silent=True)
        with pytest.raises(ConnectionLostError, match=r"within 0 s .*sent nothing for 1 s"):
            gradients(me)


def test_what_the_listener_raises_ends_the_wait(fleet: Fleet, proxy: Proxy) -> None:
    class EnoughError(Exception):
        pass

    def give_up(place: int, waiting: int) -> None:
        raise EnoughError

    proxy.before(nth(1, Kind.OPENED), [queued(9, 9)])
    with through(proxy, fleet, on_wait=give_up) as me:
        with pytest.raises(EnoughError):
            gradients(me)
        assert len(gradients(me)) > 0  # and another time there is room


def test_a_place_that_is_none_is_refused(fleet: Fleet, proxy: Proxy) -> None:
    payload = b'{"place": 0, "waiting": 1}'
    proxy.before(nth(1, Kind.OPENED), [Frame(Kind.QUEUED, shape=(len(payload),), payload=payload)])
    with through(proxy, fleet) as me, pytest.raises(ProtocolError, match="place"):
        gradients(me)


@pytest.mark.parametrize(
    ("place", "ordinal"), [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (21, "21st"), (112, "112th")]
)
def test_the_command_line_says_the_place(capsys: pytest.CaptureFixture[str], place: int, ordinal: str) -> None:
    say_place(place, 120)
    assert capsys.readouterr().err == f"waiting for a place: {ordinal} of 120\n"

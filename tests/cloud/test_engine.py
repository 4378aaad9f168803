"""Which thread computes a unit, with how many of torch's, and what becomes of one that cannot be computed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from tests.support.fleet import DEPTH, Fleet

from privatelora.cloud import engine
from privatelora.cloud.backbone import Backbone
from privatelora.cloud.cost import CostModel
from privatelora.cloud.engine import STOPPED, Engine
from privatelora.cloud.layers import Done, LayerRunner
from privatelora.cloud.metrics import Counted
from privatelora.cloud.passes import Account, Batch, Due, Pass, Point, Way
from privatelora.decoder.kv import KVCache, KVPool
from privatelora.protocol.adapter import AdapterSpec
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.errors import AdmissionError
from privatelora.protocol.placement import Placement

HIDDEN, RANK, TOKENS = 64, 4, 5
PAPER, ENDS = Placement.named("paper", DEPTH), Placement(first=2, last=2)
LOOP, ANSWER_S = "MainThread", 0.005


class Unit(NamedTuple):
    """Where and with how much a unit was computed."""

    thread: str
    torch_threads: int
    point: Point
    passes: int


class Runner(LayerRunner):
    """The service's own, which notes its units; it takes `slow_s` longer for each, and is held up where a test says."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone.config, backbone.layers, backbone.tables, backbone.device, backbone.dtype)
        self.units: list[Unit] = []
        self.slow_s = 0.0
        self.begun = threading.Semaphore(0)
        self.may_run, self.may_look_ahead = threading.Event(), threading.Event()
        self.may_run.set()
        self.may_look_ahead.set()

    def run(self, point: Point, passes: Any) -> Done:
        self.units.append(Unit(threading.current_thread().name, torch.get_num_threads(), point, len(passes)))
        self.begun.release()
        self.may_run.wait(10)
        time.sleep(self.slow_s)
        return super().run(point, passes)

    def ahead(self, batch: Batch) -> None:
        self.may_look_ahead.wait(10)
        super().ahead(batch)


class Owner:
    """A session whose device answers zeros, `ANSWER_S` after it was told something."""

    closed = parked = False
    heard_at = 0.0
    socket: Any = None

    def __init__(self, engine: Engine) -> None:
        self.engine, self.account = engine, Account()
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.answered = asyncio.Event()
        self.settled = 0

    def reply(self, one: Pass, header: bytes, data: memoryview | bytes, due: Due | None, due_header: bytes) -> None:
        if due is None:
            self.over.set_result(None)
        else:
            asyncio.get_running_loop().call_later(ANSWER_S, self._answer, one, due)

    def _answer(self, one: Pass, due: Due) -> None:
        self.send(one, due.shape, due.point)
        self.answered.set()

    def send(self, one: Pass, shape: tuple[int, ...], point: Point) -> None:
        one.answer, one.answer_shape = bytes(4 * torch.Size(shape).numel()), shape
        self.engine.submit(one, point)

    def fail(self, error: BaseException) -> None:
        self.over.set_exception(error)

    def settle(self) -> None:
        self.settled += 1


class Service:
    """An engine of two torch threads over a tiny model, on the loop that runs now."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.runner = backbone, Runner(backbone)
        self.engine = Engine(self.runner, Counted(), torch_threads=2)
        self.pool = KVPool(backbone.config, range(DEPTH), 8, backbone.dtype, backbone.device)

    def begin(self, way: Way, placement: Placement = PAPER) -> Owner:
        """One who sends TOKENS rows, or one token if it decodes."""
        spec = AdapterSpec("calibrated", RANK, RANK)
        weights = self.backbone.inline_weights(self.backbone.default_sets["calibrated"], spec)
        inline = {l: weights[l] for l in placement.inline}
        owner, rows, caches = Owner(self.engine), TOKENS, None
        if way is Way.DECODE:
            rows, caches = 1, (KVCache(self.pool),)
            caches[0].reserve(1)
        end = DEPTH - placement.last
        wire = WireDtype.FLOAT32
        one = Pass(owner, placement, inline, way, (rows,), (0,), caches, None, end, wire)  # type: ignore[arg-type]  # an owner without a socket
        owner.send(one, (rows, HIDDEN), one.first_point)
        return owner


@pytest.fixture(scope="module")
def backbone(fleet: Fleet) -> Iterator[Backbone]:
    fleet.service("llama")  # has published the model and its sets
    count = torch.get_num_threads()
    yield Backbone.load(str(fleet.source("llama")), fleet.data_dir("llama"), torch.float32)
    torch.set_num_threads(count)


def serve(backbone: Backbone, work: Callable[[Service], Awaitable[None]]) -> list[Unit]:
    """What an engine computed while `work` was done."""

    async def main() -> list[Unit]:
        service = Service(backbone)
        try:
            await asyncio.wait_for(work(service), 30)
        finally:
            service.runner.may_run.set()
            service.runner.may_look_ahead.set()
            service.engine.close()
        return service.runner.units

    return asyncio.run(main())


def test_a_lone_session_stays_on_one_thread_with_all_of_torchs(backbone: Backbone) -> None:
    async def work(service: Service) -> None:
        await service.begin(Way.SCORE).over

    units = serve(backbone, work)
    assert [unit.point.layer for unit in units] == [0, *range(DEPTH)]
    assert len({unit.thread for unit in units}) == 1  # with two teams of threads, the idle ones of both would sleep
    assert {unit.torch_threads for unit in units} == {2}


def test_two_units_at_once_have_a_thread_each_and_half_of_torchs(backbone: Backbone) -> None:
    async def work(service: Service) -> None:
        service.runner.may_run.clear()
        owners = [service.begin(Way.SCORE), service.begin(Way.SCORE, ENDS)]
        for _ in range(2):
            await asyncio.to_thread(service.runner.begun.acquire, timeout=10)
        service.runner.may_run.set()
        for owner in owners:
            await owner.over

    first, second = serve(backbone, work)[:2]
    assert first.thread != second.thread
    assert (first.torch_threads, second.torch_threads) == (1, 1)


def test_a_layer_that_took_long_is_a_threads_until_one_is_fast_again(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "LOOP_S", 0.3)  # more than the machine itself may hold a unit up

    async def work(service: Service) -> None:
        await service.begin(Way.DECODE).over
        service.runner.slow_s = 0.35
        await service.begin(Way.DECODE).over
        service.runner.slow_s = 0.0
        await service.begin(Way.DECODE).over

    names = [unit.thread for unit in serve(backbone, work)]
    units = DEPTH + 1
    fast, slow, again = names[:units], names[units : 2 * units], names[2 * units :]
    assert set(fast) == {LOOP}
    assert slow[0] == LOOP  # nobody knew yet
    assert LOOP not in slow[1:]
    assert again[0] != LOOP
    assert again[-1] == LOOP  # the first after it may find the thread with what it computes ahead


@pytest.mark.parametrize("training", [False, True])
def test_batches_of_decoded_tokens_are_the_loops_though_they_are_apart_unless_something_long_is_computed(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    monkeypatch.setattr(engine, "SHORT_ROWS", 0)  # each counts as many
    monkeypatch.setattr(engine, "LOOP_S", 10.0)  # however long this machine takes for a layer

    async def work(service: Service) -> None:
        owners = [service.begin(Way.TRAIN)] if training else []
        owners.append(first := service.begin(Way.DECODE))
        await first.answered.wait()
        owners.append(service.begin(Way.DECODE))
        for owner in owners:
            await owner.over

    decoded = [unit for unit in serve(backbone, work) if unit.point.way is Way.DECODE]
    assert decoded[1].passes == 1  # the first has gone on without the second
    assert (decoded[0].thread == LOOP, decoded[1].thread == LOOP) == (not training, not training)
    assert training or {unit.thread for unit in decoded} == {LOOP}


def test_a_unit_that_was_not_begun_when_the_service_closed_is_told(backbone: Backbone) -> None:
    async def work(service: Service) -> None:
        service.runner.may_look_ahead.clear()
        owner = service.begin(Way.SCORE)
        await owner.answered.wait()  # the second unit waits for what is computed ahead of the first
        threading.Timer(0.05, service.runner.may_look_ahead.set).start()
        service.engine.close()
        with pytest.raises(type(STOPPED), match="has stopped"):
            await owner.over
        assert owner.settled == 2

    assert len(serve(backbone, work)) == 1


def test_where_no_thread_can_be_started_the_session_is_told_and_the_next_is_served(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, refused = threading.Thread.start, list[threading.Thread]()

    def refuse(thread: threading.Thread) -> None:
        if len(refused) == 2:
            return start(thread)
        refused.append(thread)
        raise RuntimeError("can't start new thread")

    async def work(service: Service) -> None:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        first, second, third = (service.begin(Way.SCORE, at) for at in (PAPER, ENDS, Placement(first=1, last=2)))
        for owner in (first, second):
            with pytest.raises(AdmissionError, match="can't start new thread now"):
                await owner.over
            assert owner.settled == 1
        await third.over

    assert {unit.point.layer for unit in serve(backbone, work)} == set(range(1, DEPTH - 2))


def test_what_is_never_computed_on_the_loop_is_measured_with_all_threads(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[list[int]] = []

    def measure(runner: LayerRunner, threads: Callable[[int], int]) -> CostModel:
        measured.append([threads(rows) for rows in (1, 64)])
        return CostModel(((1, 0.01), (64, 0.02)))

    monkeypatch.setattr(engine, "measure_decoding", measure)
    for loop_s in (0.02, 0.005):
        monkeypatch.setattr(engine, "LOOP_S", loop_s)
        Engine(Runner(backbone), Counted(), torch_threads=2).close()
    assert measured == [[1, 2], [1, 2], [2, 2]]

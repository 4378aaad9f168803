"""Where units of work run: asks the scheduler what is next, has it computed, and tells the sessions what came of it.

    session -> Engine.submit -> Scheduler -> LayerRunner -> session.reply

Each of the scheduler's lanes has threads, so that sockets are served while matrices are multiplied (torch releases the
interpreter lock inside its kernels), and a chat never waits behind somebody's training step. Decoded tokens are
computed on the loop itself where they are few, or where nothing longer is computed. All bookkeeping is done on the
loop.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from operator import itemgetter

import torch

from privatelora.cloud.cost import CostModel, measure_decoding, measure_long
from privatelora.cloud.layers import Done, LayerRunner
from privatelora.cloud.metrics import Counted
from privatelora.cloud.passes import Batch, Pass, Point, Reply, Way
from privatelora.cloud.payloads import CODEC, BadAnswers, exchanges
from privatelora.cloud.scheduler import Hold, Lane, Run, Scheduler, lane_of
from privatelora.cloud.sockets import Sockets
from privatelora.cloud.threads import LaneThread, Waker, end_team, use_threads
from privatelora.cloud.volleys import Volleys
from privatelora.protocol.errors import AdmissionError, PrivateLoraError

SHORT_ROWS = 8
"""Rows up to which decoded tokens are computed on the event loop: a layer of them takes less time than two thread
switches are worth."""

LOOP_ROWS = 64
"""And up to so many where nothing longer is computed: what the loop does for others waits a layer meanwhile, but what
was handed to a thread and back took longer, as both want the interpreter. Of 32 sessions a step took 82 ms instead of
108, together with `threads.py`; of 64, 157 instead of 207, and of 128 about the same. A thread is no better for a
moment, when one of 32 devices is late and computed by itself: with both teams there a layer took 0.95 ms, not 0.83."""

LOOP_S = 0.02  # of a layer, by the cost model or as the newest took: above it a thread computes, since nobody is served

UNIT_S = 3e-4  # that a batch of decoded tokens takes besides its layer: its replies, its answers, and the next choice

LONG_THREADS = 2
"""Batches of whole sequences that are computed side by side, with a part of torch's threads each: nothing of two rows'
products is shared among them, and no thread waits at the end of each operator for another that has lost its core."""

STOPPED = AdmissionError("the service has stopped; come back when it runs", retry_after_s=1.0)

AHEAD = 16  # batches on the loop for which something may still be computed ahead; those that are older go without


class Engine:
    """The compute of one process. Every method is called on the event loop.

    Parameters
    ----------
    torch_threads : of a unit, or of two long ones side by side together; None is torch's choice. Up to `SHORT_ROWS`
        decoded tokens get one on the loop, as does what is computed for decoded tokens while answers are on their way:
        the second needs the core of sockets and devices then. On two cores a token took 28 ms from a service of one
        thread and 33 from one of two.
    busy_poll_s : for how long the loop stays awake for a device that answers within that time.
    sockets : tells devices of a batch what they are told at once; None: every session sends its own.
    """

    def __init__(
        self,
        runner: LayerRunner,
        counted: Counted,
        torch_threads: int | None = None,
        busy_poll_s: float = 0.0,
        sockets: Sockets | None = None,
    ) -> None:
        self.sockets = sockets
        self.runner, self.counted = runner, counted
        self.waker = Waker(busy_poll_s, lambda: any(self._tasks.values()))
        self.torch_threads = torch_threads or torch.get_num_threads()
        several = runner.device.type == "cpu" and self.torch_threads > 1
        counts = {Lane.DECODE: 1, Lane.LONG: LONG_THREADS if several else 1}
        self._threads = {lane: [LaneThread(f"{lane}-{at}") for at in range(count)] for lane, count in counts.items()}
        use_threads(1)
        end_team()  # it read and packed the model
        self._team = False  # whether the loop has a team
        self._streams = _streams(runner.device)
        self.scheduler = Scheduler(self._measured())
        self._volleys = Volleys(self.scheduler, counted, self._call)
        self._free = {lane: list(threads) for lane, threads in self._threads.items()}  # without a unit, longest first
        self._tasks = dict.fromkeys(Lane, 0)  # of the lane's threads: units, and what is computed ahead after each
        self._called: set[Lane] = set()  # lanes in which something is ready, or runs, besides the newest unit
        self._layer_s = 0.0  # of the newest unit of decoded tokens
        self._closed = False
        self._turning: set[Lane] = set()
        self._timers: dict[Lane, asyncio.TimerHandle] = {}
        self._ahead: deque[Batch] = deque(maxlen=AHEAD)

    def _measured(self) -> dict[Lane, CostModel]:
        """What a layer costs in each lane, measured on a thread like theirs."""
        thread = LaneThread("measuring")
        long = thread.submit(self.torch_threads, measure_long, self.runner).result()
        decoding = thread.submit(1, measure_decoding, self.runner, self._threads_of).result()
        if decoding.seconds(1) > LOOP_S:  # no batch is the loop's
            decoding = thread.submit(1, measure_decoding, self.runner, lambda rows: self.torch_threads).result()
        thread.close()
        return {Lane.DECODE: decoding.plus(UNIT_S), Lane.LONG: long}

    def _threads_of(self, rows: int) -> int:
        """How many torch threads a batch of decoded tokens has that is alone, if it may be computed on the loop."""
        return 1 if rows <= SHORT_ROWS else self.torch_threads

    def submit(self, one: Pass, point: Point) -> None:
        """What `one` waited for has come: it can be computed at `point`."""
        self.scheduler.ready([one], point, time.perf_counter())
        self._call(lane_of(point.way))

    def close(self) -> None:
        """Begin no more units, and wait for those that run; passes that were handed to a thread already are settled."""
        self._closed = True
        for timer in self._timers.values():
            timer.cancel()
        for thread in itertools.chain.from_iterable(self._threads.values()):
            thread.close()

    # -- turns ---------------------------------------------------------------------------------------------------------

    def _call(self, lane: Lane) -> None:
        """Something has become ready."""
        self._called.add(lane)
        self._wake(lane)

    def _wake(self, lane: Lane) -> None:
        """Give the lane a turn once the loop has read the sockets that are readable now."""
        if lane not in self._turning and self._free[lane]:
            self._turning.add(lane)
            asyncio.get_running_loop().call_soon(self._turn, lane)

    def _turn(self, lane: Lane) -> None:
        self._turning.discard(lane)
        if self._closed or not self._free[lane]:
            return
        timer = self._timers.pop(lane, None)
        if timer is not None:
            timer.cancel()
        now, free = time.perf_counter(), self._free[lane]
        runs, picked = list[Run](), self.scheduler.pick(lane, now)
        while isinstance(picked, Run):
            runs.append(picked)
            picked = self.scheduler.pick(lane, now) if len(runs) < len(free) else None
        if runs:
            self._begin(lane, runs)
        elif lane is Lane.DECODE and self._ahead and not self._tasks[lane]:
            started = time.perf_counter()
            self._run_ahead(lane, self._ahead.popleft())
            self._count(lane, time.perf_counter() - started, 0.0)
            self._wake(lane)
            return
        if isinstance(picked, Hold):
            self._timers[lane] = asyncio.get_running_loop().call_later(picked.until - now, self._turn, lane)

    def _begin(self, lane: Lane, runs: Sequence[Run]) -> None:
        """Compute what was picked for the lane's free threads."""
        units = len(self._threads[lane]) - len(self._free[lane]) + len(runs)  # that run from now on
        if units > 1 or self.scheduler.waiting(lane):  # none goes on by itself, so that layers share the threads
            self._called.add(lane)
        else:
            self._called.discard(lane)
        for run in runs:
            passes: list[Pass] = run.passes  # type: ignore[assignment]  # the works that we gave it
            rows = sum(one.n for one in passes)
            if lane is Lane.LONG or not self._on_loop(run, rows):
                self._start(lane, run.point, passes, max(1, self.torch_threads // units))
            elif rows > SHORT_ROWS:
                self._many(run.point, passes)
            else:
                self._few(run.point, passes)

    def _on_loop(self, picked: Run, rows: int) -> bool:
        """Whether a batch of decoded tokens is computed on the loop now."""
        layer_s = max(self.scheduler.costs[Lane.DECODE].seconds(rows), self._layer_s)
        if self._tasks[Lane.DECODE] or layer_s > LOOP_S:
            return False
        nothing_longer = picked.one_layer and not self._tasks[Lane.LONG] and self.scheduler.idle(Lane.LONG)
        return rows <= (LOOP_ROWS if nothing_longer else SHORT_ROWS)

    def _few(self, point: Point, passes: list[Pass]) -> None:
        """A unit on the loop; what needs no answer comes when nothing else is to be done."""
        codec_s = CODEC.seconds
        done, seconds = self._compute(point, passes)
        self._finish(point, passes, done, seconds)
        if isinstance(done, Done) and done.ahead is not None:
            self._ahead.append(done.ahead)
        self._over(passes, sum(seconds), CODEC.seconds - codec_s)

    def _many(self, point: Point, passes: list[Pass]) -> None:
        """A unit on the loop with all of torch's threads, and then what needs no answer: many take longer to come."""
        began, codec_s = time.process_time(), CODEC.seconds
        if not self._team:
            for thread in itertools.chain.from_iterable(self._threads.values()):
                thread.close(wait=False)  # none has work, but its team may be there
            self._team = True
        use_threads(self.torch_threads)
        done, seconds = self._compute(point, passes)
        use_threads(1)
        used_s = time.process_time() - began  # of torch's other threads too: no lane has work
        self._finish(point, passes, done, seconds)
        if isinstance(done, Done) and done.ahead is not None:
            started = time.perf_counter()
            self._run_ahead(Lane.DECODE, done.ahead)
            used_s += time.perf_counter() - started
        self._over(passes, used_s, CODEC.seconds - codec_s)

    def _over(self, passes: Sequence[Pass], used_s: float, codec_s: float) -> None:
        """A unit on the loop is over."""
        self._count(Lane.DECODE, used_s, codec_s)
        if any((one.account.turnaround_s or 1.0) < self.waker.window_s for one in passes):
            self.waker.expect()
        self._wake(Lane.DECODE)

    def _start(self, lane: Lane, point: Point, passes: list[Pass], count: int) -> None:
        """Have one of the lane's threads compute a unit with so many of torch's."""
        if count > 1 and self._team:
            end_team()
            self._team = False
        thread = self._free[lane].pop()  # the one whose team is there
        self._tasks[lane] += 1
        for one in passes:
            one.running = True
        try:
            thread.submit(count, self._long, asyncio.get_running_loop(), thread, count, lane, point, passes)
        except RuntimeError as error:  # the system starts no thread now
            self._tasks[lane] -= 1
            self._done(thread, lane, point, passes, AdmissionError(f"{error} now; come back", retry_after_s=1.0), [])
            self._wake(lane)

    def _long(
        self,
        loop: asyncio.AbstractEventLoop,
        thread: LaneThread,
        count: int,
        lane: Lane,
        point: Point,
        passes: list[Pass],
    ) -> None:
        """On one of the lane's threads: a unit, and then what needs no answer, while the replies are sent."""
        began, codec_s = time.thread_time(), CODEC.seconds
        done, seconds = (STOPPED, []) if self._closed else self._compute(point, passes, goes_on=True)
        loop.call_soon_threadsafe(self._done, thread, lane, point, passes, done, seconds)
        used_s = (time.thread_time() - began) * count  # torch's other threads have as much to do
        if isinstance(done, Done) and done.ahead is not None:
            began, count = time.thread_time(), 1 if lane is Lane.DECODE else count
            use_threads(count)
            self._run_ahead(lane, done.ahead)
            used_s += (time.thread_time() - began) * count
        loop.call_soon_threadsafe(self._rest, thread, lane, used_s, CODEC.seconds - codec_s)

    def _done(
        self,
        thread: LaneThread,
        lane: Lane,
        point: Point,
        passes: list[Pass],
        done: Done | Exception,
        seconds: list[float],
    ) -> None:
        """A thread has computed a unit: it gets the next one before the replies of this one are sent."""
        self._free[lane].append(thread)
        self._finish(point, passes, done, seconds, lambda: self._turn(lane))

    def _rest(self, thread: LaneThread, lane: Lane, used_s: float, codec_s: float) -> None:
        self._count(lane, used_s, codec_s)
        self._tasks[lane] -= 1
        thread.done()
        self._wake(lane)

    # -- units ---------------------------------------------------------------------------------------------------------

    def _compute(
        self, point: Point, passes: Sequence[Pass], goes_on: bool = False
    ) -> tuple[Done | Exception, list[float]]:
        """A unit and each layer's seconds; if it goes on, the next layers too where nobody is inline or waits."""
        lane, seconds = lane_of(point.way), []
        try:
            with self._streams[lane]():
                while True:
                    started = time.perf_counter()
                    done = self.runner.run(point, passes)
                    seconds.append(time.perf_counter() - started)
                    stays = done.replies or lane in self._called or any(one.owner.closed for one in passes)
                    if stays or not goes_on:
                        return done, seconds
                    point = done.onward[0][1]
        except Exception as error:  # noqa: BLE001 (the sessions of this unit are told; the process serves the others)
            return error, seconds

    def _run_ahead(self, lane: Lane, batch: Batch) -> None:
        """What fails here fails again in the unit that takes the answers, which tells the sessions."""
        with suppress(Exception), self._streams[lane]():
            self.runner.ahead(batch)

    def _count(self, lane: Lane, seconds: float, codec_s: float) -> None:
        """What a unit took of the core that it ran on."""
        used = self.counted.cpu_seconds[lane]
        used.layers += seconds - codec_s
        used.codec += codec_s

    def _finish(
        self,
        point: Point,
        passes: Sequence[Pass],
        done: Done | Exception,
        seconds: list[float],
        before_sending: Callable[[], None] = lambda: None,
    ) -> None:
        """Back on the loop: sessions are told, and what goes on by itself is ready again."""
        for one in passes:
            one.running = False
        if isinstance(done, BadAnswers):
            bad = {one for one, _ in done.errors}
            for one in passes:
                if one not in bad and not one.owner.closed:
                    self.submit(one, point)
            for one, error in done.errors:
                one.owner.fail(error)
        elif isinstance(done, Exception):
            for one in passes:
                one.owner.fail(done)
        else:
            self.scheduler.used(passes, point, sum(seconds))
            if point.way is Way.DECODE:
                self._layer_s = seconds[-1]
            for one_layer in seconds:
                self.counted.layer_seconds[point.way].observe(one_layer)
            self.counted.batch_rows[point.way].observe(sum(one.n for one in passes), len(seconds))
            self.counted.batch_passes[point.way].observe(len(passes), len(seconds))
            self._deliver(point, done, before_sending)
        for one in passes:
            one.owner.settle()

    def _deliver(self, point: Point, done: Done, before_sending: Callable[[], None]) -> None:
        if self.sockets is not None:
            self.sockets.flush()  # what was written before
        now = time.perf_counter()
        for onward, going in itertools.groupby(done.onward, key=itemgetter(1)):
            self.scheduler.ready([one for one, _ in going if not one.owner.closed], onward, now)
        if done.onward:
            self._wake(lane_of(point.way))
        volleys = [(reply, self._volleys.of(reply, now) if self.sockets else None) for reply in done.replies]
        before_sending()
        started = time.perf_counter()
        for _, volley in volleys:
            if volley is not None and self.sockets is not None:
                self.sockets.post(volley)
        for reply, volley in volleys:
            if volley is None:
                self._tell(reply, point, now)
        if self.sockets is not None:
            self.sockets.flush()
        if done.replies:
            self.counted.wire_seconds[point.way].observe(time.perf_counter() - started)

    def _tell(self, reply: Reply, point: Point, now: float) -> None:
        """Have each session send its part of a reply."""
        for one, header, data, due, due_header in exchanges(reply):
            if one.owner.closed:
                continue
            if due is not None:
                self.scheduler.expect([one], due.point, now)
            elif point.way is Way.DECODE:
                self.scheduler.expect_next([one], one.first_point, now)
            else:
                self.scheduler.leave(one)
            try:
                one.owner.reply(one, header, data, due, due_header)
            except PrivateLoraError as error:  # its quota is spent: the others of the batch get theirs
                one.owner.fail(error)


def _streams(device: torch.device) -> dict[Lane, Callable[[], AbstractContextManager[object]]]:
    """What each lane computes within: on a GPU a stream of its own, decoded tokens first.

    A unit ends with its replies in host memory, so whatever follows it in the other lane sees what it wrote.
    """
    if device.type != "cuda":
        return dict.fromkeys(Lane, nullcontext)
    priorities = {Lane.DECODE: -1, Lane.LONG: 0}
    return {
        lane: partial(torch.cuda.stream, torch.cuda.Stream(device, priority=priority))  # type: ignore[no-untyped-call]  # torch leaves it bare
        for lane, priority in priorities.items()
    }

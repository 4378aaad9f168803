"""Where units of work run: asks the scheduler what is next, has it computed, and tells the sessions what came of it.

    session -> Engine.submit -> Scheduler -> LayerRunner -> session.reply

Each of the scheduler's lanes has threads, so that sockets are served while matrices are multiplied (torch releases the
interpreter lock inside its kernels), and a chat never waits behind somebody's training step. Decoded tokens are
computed on the loop itself where they are few, or where nobody else is there to be served. All bookkeeping is done on
the loop.
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

from privatelora.cloud.cost import measure_decoding, measure_long
from privatelora.cloud.layers import Done, LayerRunner
from privatelora.cloud.metrics import Counted
from privatelora.cloud.passes import Batch, Due, Pass, Point, Reply, Way
from privatelora.cloud.payloads import CODEC, BadAnswers, exchanges, headers_of
from privatelora.cloud.scheduler import Hold, Lane, Run, Scheduler, lane_of
from privatelora.cloud.sockets import Sockets, Volley
from privatelora.cloud.threads import LaneThread, Waker, use_threads
from privatelora.protocol.errors import PrivateLoraError

SHORT_ROWS = 8
"""Rows up to which decoded tokens are computed on the event loop: a layer of them takes less time than two thread
switches are worth."""

ALONE_ROWS = 64
"""And up to so many where nobody else is there: the loop has nothing to do before their devices answer, and what was
handed to a thread and back took longer, as both want the interpreter. Of 32 sessions a step took 82 ms instead of 108,
together with `threads.py`; of 64, 157 instead of 207, and of 128 about the same."""

LOOP_S = 0.02  # of a layer, above which it is computed on a thread in any case: nobody is served meanwhile

UNIT_S = 3e-4  # that a batch of decoded tokens takes besides its layer: its replies, its answers, and the next choice

LONG_THREADS = 2
"""Batches of whole sequences that are computed side by side, with a part of torch's threads each: nothing of two rows'
products is shared among them, and no thread waits at the end of each operator for another that has lost its core."""

VOLLEY_PASSES = 4  # from which on messages go out together

AHEAD = 16  # batches on the loop for which something may still be computed ahead; those that are older go without


class Engine:
    """The compute of one process. Every method is called on the event loop.

    Parameters
    ----------
    torch_threads : of a unit, or of two long ones side by side together; None is torch's choice. Up to `SHORT_ROWS`
        decoded tokens get one, as does what is computed for decoded tokens while answers are on their way: the second
        needs the core of sockets and devices then. On two cores a token took 28 ms from a service of one thread and 33
        from one of two.
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
        self._streams = _streams(runner.device)
        measuring = LaneThread(Lane.LONG)
        long = measuring.submit(self.torch_threads, measure_long, runner).result()
        measuring.close()
        self.scheduler = Scheduler({Lane.DECODE: measure_decoding(runner).plus(UNIT_S), Lane.LONG: long})
        self._free = {lane: deque(threads) for lane, threads in self._threads.items()}  # without a unit, longest first
        self._tasks = dict.fromkeys(Lane, 0)  # of the lane's threads: units, and what is computed ahead after each
        self._called: set[Lane] = set()  # lanes in which something is ready, or runs, besides the newest unit
        self._closed = False
        self._turning: set[Lane] = set()
        self._timers: dict[Lane, asyncio.TimerHandle] = {}
        self._ahead: deque[Batch] = deque(maxlen=AHEAD)

    def submit(self, one: Pass, point: Point) -> None:
        """What `one` waited for has come: it can be computed at `point`."""
        self.scheduler.ready([one], point, time.perf_counter())
        self._call(lane_of(point.way))

    def close(self) -> None:
        """Begin no more units, and wait for those that are running."""
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
        now = time.perf_counter()
        picked = self.scheduler.pick(lane, now)
        if isinstance(picked, Run):
            self._start(lane, picked)
        elif lane is Lane.DECODE and self._ahead and not self._tasks[lane]:
            started = time.perf_counter()
            self._run_ahead(lane, self._ahead.popleft())
            self._count(lane, time.perf_counter() - started, 0.0)
            self._wake(lane)
        elif isinstance(picked, Hold):
            self._timers[lane] = asyncio.get_running_loop().call_later(picked.until - now, self._turn, lane)

    def _start(self, lane: Lane, picked: Run) -> None:
        point = picked.point
        passes: list[Pass] = picked.passes  # type: ignore[assignment]  # the works that we gave it
        rows = sum(one.n for one in passes)
        if lane is Lane.DECODE and self._on_loop(picked, rows):
            self._short(lane, point, passes, rows > SHORT_ROWS)
            return
        thread, waits = self._free[lane].popleft(), self.scheduler.waiting(lane) > 0
        shared = waits or len(self._free[lane]) < len(self._threads[lane]) - 1
        if shared:  # no unit goes on by itself then, so that each layer gets as many threads as are its part
            self._called.add(lane)
            self._wake(lane)
        else:
            self._called.discard(lane)
        count = max(1, self.torch_threads // (len(self._threads[lane]) if shared else 1))
        self._tasks[lane] += 1
        for one in passes:
            one.running = True
        thread.submit(count, self._long, asyncio.get_running_loop(), thread, count, lane, point, passes)

    def _on_loop(self, picked: Run, rows: int) -> bool:
        """Whether a batch of decoded tokens is computed on the loop now."""
        if self._tasks[Lane.DECODE] or self.scheduler.costs[Lane.DECODE].seconds(rows) > LOOP_S:
            return False
        alone = picked.alone and not self._tasks[Lane.LONG] and self.scheduler.idle(Lane.LONG)
        return rows <= (ALONE_ROWS if alone else SHORT_ROWS)

    def _short(self, lane: Lane, point: Point, passes: list[Pass], many: bool) -> None:
        """On the loop: a unit; of many passes also what needs no answer, since their answers take longer than that."""
        began, codec_s = time.process_time(), CODEC.seconds
        if many:
            use_threads(self.torch_threads)
        done, seconds = self._compute(point, passes)
        if many:
            use_threads(1)
        used_s = time.process_time() - began if many else sum(seconds)  # of torch's other threads too: no lane has work
        self._finish(point, passes, done, seconds)
        if isinstance(done, Done) and done.ahead is not None:
            if many:
                started = time.perf_counter()
                self._run_ahead(lane, done.ahead)
                used_s += time.perf_counter() - started
            else:
                self._ahead.append(done.ahead)
        self._count(lane, used_s, CODEC.seconds - codec_s)
        if any((one.account.turnaround_s or 1.0) < self.waker.window_s for one in passes):
            self.waker.expect()
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
        done, seconds = self._compute(point, passes, goes_on=True)
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
        volleys = [(reply, self._volley(reply, now)) for reply in done.replies]
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

    # -- exchanges of a batch ------------------------------------------------------------------------------------------

    def _volley(self, reply: Reply, now: float) -> Volley | None:
        """A reply as messages that are sent to all at once, whose answers are read the same way; None if it cannot be.

        Sessions are not asked: 32 of them have a thousand exchanges a token, which at 10 us of Python each took as long
        as half of the layers.
        """
        passes, wire, _, _, rows, width, data, then = reply
        if self.sockets is None or then is None or len(passes) < VOLLEY_PASSES:
            return None
        if not all(one.direct and not one.owner.closed for one in passes):
            return None
        files = [one.owner.socket.file for one in passes]
        if min(files) < 0 or rows.count(rows[0]) < len(rows):
            return None
        kind, due_width, point = then
        due = Due(kind, (rows[0], *due_width), wire.nbytes((rows[0], *due_width)), point)
        headers, due_headers = headers_of(reply)
        moved = wire.nbytes((rows[0], *width))
        for one in passes:
            one.due, one.told_at = due, now
            one.moved_down += moved
        self.scheduler.expect(passes, point, now)

        def take(volley: Volley, came: list[int]) -> None:
            self._answered([passes[row] for row in came], came, due, volley)

        sockets = [one.owner.socket for one in passes]
        return Volley(sockets, files, b"".join(headers), data, b"".join(due_headers), due.nbytes, take)

    def _answered(self, passes: list[Pass], rows: list[int], due: Due, volley: Volley) -> None:
        now, size, answers = time.perf_counter(), due.nbytes, memoryview(volley.answers)
        shape, observed = due.shape, self.counted.device_seconds[due.point.way]
        observed.observe(now - passes[0].told_at, len(passes))
        came = []
        for one, row in zip(passes, rows, strict=True):
            owner = one.owner
            if one.due is due and not owner.closed:
                owner.heard_at, owner.parked = now, False
                one.moved_up += size
                one.due, one.answer, one.answer_shape = None, answers[row * size : (row + 1) * size], shape
                came.append(one)
        batch = passes[0].batch
        self.scheduler.ready(came, due.point, now, batch is not None and batch.alike)
        self._call(lane_of(due.point.way))


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

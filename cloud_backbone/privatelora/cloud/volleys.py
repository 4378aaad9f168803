"""Exchanges of a whole batch of decoded tokens: one call tells all of its devices, another takes all their answers.

Sessions are not asked: 32 of them have a thousand exchanges a token, which at 10 us of Python each took as long as half
of the layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from privatelora.cloud.metrics import Counted
from privatelora.cloud.passes import Due, Pass, Reply
from privatelora.cloud.payloads import headers_of
from privatelora.cloud.scheduler import Lane, Scheduler, lane_of
from privatelora.cloud.sockets import Volley

VOLLEY_PASSES = 4  # from which on messages go out together


class Volleys:
    """Makes a volley of a reply, and tells the scheduler what comes of it.

    call : is told the lane in which something has become ready.
    """

    def __init__(self, scheduler: Scheduler, counted: Counted, call: Callable[[Lane], None]) -> None:
        self.scheduler, self.counted, self._call = scheduler, counted, call

    def of(self, reply: Reply, now: float) -> Volley | None:
        """A reply as messages to all at once, whose answers are read the same way; None if it cannot be one."""
        passes, wire, _, _, rows, width, data, then = reply
        if then is None or len(passes) < VOLLEY_PASSES:
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

"""Passes one at a time, each done again after a lost connection: what makes a fault cost a pass and nothing else.

`session.py` runs every pass through here. A pass changes nothing of the device's until it is whole, so it can be done
again from what the device still has: the batch, or the token history.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from privatelora.device.exchange import RemoteLayers
from privatelora.protocol.errors import AdmissionError, ConnectionLostError, QuotaError

Result = TypeVar("Result")

OnQuota = Callable[[QuotaError], None]
"""called before a wait for a quota's reset, with the error that says which and when"""

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 5.0  # between attempts to reconnect, doubling
NAP_S = 30.0


class Replay:
    """The passes of one session; threads may share it, and take turns.

    Parameters
    ----------
    retry_s : how long to go on reconnecting before an error is raised.

    A quota that is spent is an error at once, unless `waits_for_quota` is set, as `finetune` does where its owner says.
    """

    def __init__(self, remote: RemoteLayers, retry_s: float) -> None:
        self.remote, self.retry_s = remote, retry_s
        self.waits_for_quota = False  # however long it takes to reset
        self.on_quota: OnQuota = lambda spent: None
        # exchanges of two passes must not mix on the one connection; reentrant, since a stream that nobody holds any
        # more is released by the garbage collector, which may run within a pass
        self._turn = threading.RLock()

    def run(self, attempt: Callable[[], Result], restart: Callable[[], None] = lambda: None) -> Result:
        """Run one pass; after a lost connection reconnect, with backoff, and run it again from its beginning."""
        wait_s, deadline = FIRST_WAIT_S, None
        while True:
            lost: ConnectionLostError | AdmissionError
            with self._turn:
                try:
                    return attempt()
                except QuotaError as spent:
                    lost = spent
                    self.remote.disconnect()
                    restart()
                    if not self.waits_for_quota:
                        raise
                except (ConnectionLostError, AdmissionError) as error:
                    lost = error
                    self.remote.lose()
                    restart()
                except BaseException:
                    self.remote.disconnect()  # the pass is half done: the service must forget it
                    raise
            if isinstance(lost, QuotaError):
                self.on_quota(lost)
                _sleep_until(time.time() + (lost.retry_after_s or LONGEST_WAIT_S))
                wait_s, deadline = FIRST_WAIT_S, None
                continue
            now = time.monotonic()
            deadline = deadline or now + self.retry_s
            if now >= deadline:
                raise self._given_up(lost)
            time.sleep(min(lost.retry_after_s or wait_s, deadline - now))
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def release(self, sequences: Sequence[int]) -> None:
        """Let the service drop KV caches, between two passes."""
        with self._turn:
            self.remote.release(sequences)

    def _given_up(self, lost: ConnectionLostError | AdmissionError) -> ConnectionLostError | AdmissionError:
        if isinstance(lost, AdmissionError):
            return lost
        return ConnectionLostError(
            f"{self.remote.service.base_url} did not come back within {self.retry_s:g} s ({lost}); see that it is "
            "running, then call again: nothing is lost, and finetune goes on with resume=True"
        )


def _sleep_until(until: float) -> None:
    """Sleep until a time of day. In naps: a device that was suspended meanwhile has not slept them by its own clock."""
    while (left := until - time.time()) > 0:
        time.sleep(min(left, NAP_S))

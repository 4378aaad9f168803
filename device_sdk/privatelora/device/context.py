"""What a kind of job is given to run with: its parameters, the owner's data and limits, and the device's session.

From: `agent.py`, for each job. To: `run` of the kind's file in `jobs/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privatelora.protocol.errors import PrivateLoraError

if TYPE_CHECKING:
    from privatelora.device.session import DeviceSession


class JobError(PrivateLoraError):
    """The job could not be done here; `retry`: it may be another time. Its words go to the operator."""

    code = "job"

    def __init__(self, message: str, *, retry: bool, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.retry = retry


@dataclass
class JobContext:
    """One job's run.

    Parameters
    ----------
    params : as the kind's struct has checked them.
    data : file that the policy names for this kind.
    max_seconds, max_bytes : of the policy; None: no limit.
    resumable : whether this job was begun here before.
    open_session : opens the device's session; `session` calls it.
    on_begin, on_moved : are told when the work begins, and of bytes that were moved.
    reason_to_end : why the job must end after its step, if it must.
    retry_after_s : set by a kind that met a spent quota: seconds in which no other job is of use.
    """

    params: dict[str, Any]
    data: Path
    max_seconds: float | None
    max_bytes: int | None
    resumable: bool
    open_session: Callable[[], DeviceSession]
    on_begin: Callable[[], None]
    on_moved: Callable[[int], None]
    reason_to_end: Callable[[], PrivateLoraError | None]
    retry_after_s: float | None = None
    begun: bool = False
    moved_bytes: int = 0
    _session: DeviceSession | None = None

    @contextmanager
    def session(self) -> Iterator[DeviceSession]:
        """The device's session. Once it is open the job is begun; what it moves is counted for the policy's limit."""
        with self.open_session() as me:
            self.on_begin()
            self.begun, self._session = True, me
            try:
                yield me
            finally:
                self._count()

    def stops(self) -> bool:
        """Whether to stop now; to be asked after each step, which also counts what it moved."""
        self._count()
        return self.reason_to_end() is not None

    def check(self) -> None:
        """Raise what must end the job, if anything must."""
        reason = self.reason_to_end()
        if reason is not None:
            raise reason

    @staticmethod
    def least(*limits: Any) -> Any:
        """The smallest of the limits that there are; None if there is none."""
        return min((limit for limit in limits if limit is not None), default=None)

    def _count(self) -> None:
        assert self._session is not None
        count = self._session.remote.count
        moved = count.payload_up + count.payload_down
        more, self.moved_bytes = moved - self.moved_bytes, moved
        self.on_moved(more)

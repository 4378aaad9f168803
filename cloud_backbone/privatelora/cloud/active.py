"""A pass of a session between its first frame and its last, and how it is shown to operators: `ActivePass`."""

from __future__ import annotations

from dataclasses import dataclass

from privatelora.cloud.passes import Pass
from privatelora.cloud.waiting import Waiter
from privatelora.protocol.frames import Phase

Key = tuple[int, int]
"""(step, stream)"""


@dataclass(eq=False)
class ActivePass:
    """A pass between its first frame and its last.

    held_bytes : what it has taken of the memory; waiter : its place in the line for that.
    """

    key: Key
    phase: Phase
    sequences: tuple[int, ...]
    work: Pass
    began_at: float
    held_bytes: int = 0
    waiter: Waiter | None = None

    def view(self) -> dict[str, str | int]:
        """What `Session.view` says of it; layer -1 is where it has no layer."""
        work, waits = self.work, "compute"
        if self.waiter is not None:
            waits = "memory"
        elif work.due is not None:
            waits = "device"
        point = work.due.point if work.due is not None else work.first_point
        return {
            "phase": work.way,
            "step": self.key[0],
            "stream": self.key[1],
            "tokens": work.n,
            "layer": point.layer,
            "waits_for": waits,
        }

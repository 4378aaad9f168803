"""One budget over KV blocks and training activations, in bytes that were measured.

A pass takes its bytes when it begins and gives them back when it is over; a KV cache as it grows, until it is released.
What does not fit waits in a `Line`. A decoded token's block is the exception: its session holds memory already, so it
does not wait behind those who hold none; where there is none it is told to come back later.
"""

from __future__ import annotations

from pathlib import Path

import torch

from privatelora.cloud.waiting import Line

SHARE = 0.5  # of the memory that is free once the model is loaded, where the operator names no budget


class Memory:
    """What is taken of `total_bytes`; `line` are the passes that wait."""

    def __init__(self, total_bytes: int, waiting: int) -> None:
        self.total_bytes, self.used_bytes = total_bytes, 0
        self.line = Line("what this pass must keep", waiting)

    def fits(self, nbytes: int) -> bool:
        return self.used_bytes + nbytes <= self.total_bytes

    def take(self, nbytes: int) -> None:
        """The caller has asked `fits`."""
        self.used_bytes += nbytes

    def give(self, nbytes: int) -> None:
        """Give bytes back; who waited for them goes on."""
        self.used_bytes -= nbytes
        if nbytes:
            self.line.advance()


def available_bytes(device: torch.device) -> int:
    """Memory that is free on the device; on a CPU the machine's, or less where its control group (v2) allows less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        found.append(max(0, int(text) - int(used.read_text())))
    return min(found) if found else 4 << 30  # not Linux: a guess that a small machine can bear

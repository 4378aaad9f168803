"""What the soak found: soak-out/report.json, a summary, and the promises that were broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tests.soak.crowd import Outcome

RSS_GROWTH = 0.05  # that is no leak


@dataclass(frozen=True)
class State:
    """The service when nobody is there.

    rss_bytes, own_bytes : resident memory, and without mapped files.
    left : gauges of /metrics that are not 0, as they are where nobody is there, by name.
    evicted, waits : sessions given up for their memory, and waits for each resource, since the service began.
    files : open file descriptors.
    """

    rss_bytes: int
    own_bytes: int
    left: dict[str, float]
    evicted: int
    waits: dict[str, int]
    files: int


@dataclass(frozen=True)
class Report:
    """One run, in the order of report.json.

    Parameters
    ----------
    sessions, misbehaved : devices that came after the warm-up, and how many of them misbehaved.
    rss_ratio : resident memory at the end over that after the warm-up.
    blocks_in_use : of the KV cache, at the end.
    lost_steps : that an honest device began and did not finish, or whose result was wrong.
    uncoded_refusals : sessions that ended without a code that says why, or with the code of a failure of the service.
    seconds : the whole run.
    steps, replayed : that honest devices finished, and how often they had to connect again.
    refusals : how often each code was told.
    sessions_left, memory_bytes_in_use, files_left : at the end; files are those that were not open after the warm-up.
    service_failures : errors in the service's log.
    evicted, waits : silent sessions given up for their memory, and waits for a session and for memory.
    rss_mib, own_mib : after the warm-up and at the end, with and without mapped files.
    problems : what was lost, wrong or uncoded, in words.
    """

    sessions: int
    misbehaved: int
    rss_ratio: float
    blocks_in_use: int
    lost_steps: int
    uncoded_refusals: int
    seconds: float
    steps: int
    replayed: int
    refusals: dict[str, int]
    sessions_left: int
    memory_bytes_in_use: int
    files_left: int
    service_failures: int
    evicted: int
    waits: dict[str, int]
    rss_mib: tuple[float, float]
    own_mib: tuple[float, float]
    warmup_sessions: int
    seed: int
    problems: list[str]

    @classmethod
    def of(
        cls,
        warmup: Sequence[Outcome],
        outcomes: Sequence[Outcome],
        states: tuple[State, State],
        failures: Sequence[str],
        seconds: float,
        seed: int,
    ) -> Report:
        before, after = states
        everyone = [*warmup, *outcomes]
        honest = [one for one in everyone if not one.visit.manner]
        failed = [one for one in everyone if one.failed]
        return cls(
            sessions=len(outcomes),
            misbehaved=sum(bool(one.visit.manner) for one in outcomes),
            rss_ratio=round(after.rss_bytes / before.rss_bytes, 4),
            blocks_in_use=int(after.left.get("kv_blocks_used", 0)),
            lost_steps=sum(one.found.begun - one.found.done + bool(one.failed) for one in honest),
            uncoded_refusals=sum(len(one.found.uncoded) for one in everyone),
            seconds=round(seconds, 1),
            steps=sum(one.found.done for one in honest),
            replayed=sum(one.found.replayed for one in honest),
            refusals=dict(Counter(code for one in everyone for code in one.found.refusals)),
            sessions_left=int(sum(after.left.get(f"num_sessions_{state}", 0) for state in ("running", "waiting"))),
            memory_bytes_in_use=int(after.left.get("memory_used_bytes", 0)),
            files_left=max(0, after.files - before.files),
            service_failures=len(failures),
            evicted=after.evicted,
            waits=after.waits,
            rss_mib=(_mib(before.rss_bytes), _mib(after.rss_bytes)),
            own_mib=(_mib(before.own_bytes), _mib(after.own_bytes)),
            warmup_sessions=len(warmup),
            seed=seed,
            problems=[
                *(f"device {one.visit.number} ({one.visit.manner or 'honest'}): {one.failed}" for one in failed),
                *(text for one in everyone for text in (*one.found.wrong, *one.found.uncoded)),
                *(f"the service has {value:g} of {name} left" for name, value in after.left.items()),
                *(f"the service's log: {line}" for line in failures),
            ],
        )

    @property
    def broken(self) -> list[str]:
        """Promises that were not kept, in words."""
        promises = {
            f"resident memory grew by {self.rss_ratio - 1:.1%}": self.rss_ratio <= 1 + RSS_GROWTH,
            f"{self.blocks_in_use} KV blocks are in use": not self.blocks_in_use,
            f"{self.memory_bytes_in_use} bytes of the memory are taken": not self.memory_bytes_in_use,
            f"{self.sessions_left} sessions are left": not self.sessions_left,
            f"{self.files_left} files or sockets are left": not self.files_left,
            f"{self.lost_steps} steps of honest devices are lost": not self.lost_steps,
            f"{self.uncoded_refusals} refusals had no code": not self.uncoded_refusals,
            f"the service failed {self.service_failures} times at its own work": not self.service_failures,
        }
        broken = [text for text, kept in promises.items() if not kept]
        return broken or self.problems[:1]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def summary(self) -> str:
        """For a terminal."""
        codes = ", ".join(f"{count} {code}" for code, count in sorted(self.refusals.items())) or "none"
        lines = [
            f"{self.sessions} devices in {self.seconds:.0f} s, {self.misbehaved} of them misbehaving, after "
            f"{self.warmup_sessions} to warm up (seed {self.seed})",
            f"steps of honest devices    {self.steps} finished, {self.lost_steps} lost, {self.replayed} reconnections",
            f"refusals                   {codes}; {self.uncoded_refusals} without a code",
            f"waits                      {self.waits['session']} for a session, {self.waits['memory']} for memory; "
            f"{self.evicted} silent sessions given up",
            f"resident memory            {self.rss_mib[0]:.0f} MiB after the warm-up, {self.rss_mib[1]:.0f} at the "
            f"end: {self.rss_ratio:.3f}",
            f"left at the end            {self.sessions_left} sessions, {self.blocks_in_use} KV blocks, "
            f"{self.memory_bytes_in_use} bytes, {self.files_left} files",
            *(f"  {problem}" for problem in self.problems[:20]),
            *(f"BROKEN: {text}" for text in self.broken),
        ]
        return "\n".join(lines)


def _mib(nbytes: int) -> float:
    return round(nbytes / 2**20, 1)

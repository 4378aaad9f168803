"""What more sessions cost: tokens/s, a token's time, and where a step's CPU time goes, from 1 to 128 sessions.

    python -m benchmarks.curve [--sessions 1,8,32]     writes bench-out/curve.json and bench-out/curve.png

`make bench` does the same as its row `cost_curve`. The sessions are `loadgen.py`'s, every layer inline, one run of each
count. Where a step's time goes is read before and after the tokens are decoded: from the service's /metrics what its
compute took, in the layers and in the codec, and from the kernel what its process took in all, in user code (whose rest
is Python: frames, sessions, scheduler) and in the kernel (sockets). The devices' own is told by `loadgen.py`. All of it
is CPU time, XX"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import httpx2 as httpx
import matplotlib
import typer
from prometheus_client.parser import text_string_to_metric_families

matplotlib.use("Agg")  # a file, on whatever machine
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.fleet import WARMUP_TOKENS, Decoded, running
from benchmarks.rows import OUTPUT, Row, Target, show, unmeasured
from benchmarks.workbench import Address, Workbench

DTYPE = "bfloat16"
SESSIONS = (1, 2, 4, 8, 16, 32, 64, 128)
TOKENS = 45  # of each session after the warm-up; fewer where they are many
TOKENS_IN_ALL = 2000
CORES = os.cpu_count() or 1
ROW = "cost_curve"
TARGETS = {ROW: Target("tokens/s")}
JSON, PNG = OUTPUT / "curve.json", OUTPUT / "curve.png"
PARTS = {
    "compute_s": ("service: layers", "#2b6cb0"),
    "codec_s": ("service: codec", "#63b3ed"),
    "socket_s": ("service: sockets (kernel)", "#dd6b20"),
    "python_s": ("service: Python", "#ecc94b"),
    "devices_s": ("devices (load generator)", "#718096"),
    "others_s": ("other programs", "#cbd5e0"),
    "idle_s": ("idle", "#f7fafc"),
}
"""Of a step, by the name in `Point`: what the plot calls it, and its colour."""


@dataclass(frozen=True)
class Point:
    """One count of sessions; seconds of a step, in which every session has one token, are those of all cores."""

    sessions: int
    tokens_per_s: float
    step_s: float
    p50_s: float
    p99_s: float
    batch_rows: float  # mean
    compute_s: float
    codec_s: float
    socket_s: float
    python_s: float
    devices_s: float
    others_s: float
    idle_s: float


@dataclass(frozen=True)
class Used:
    """What a service has counted and used until now, in seconds."""

    at: float
    tokens: float
    layers: float
    codec: float
    batches: float
    rows: float
    user: float
    system: float
    machine: float

    @classmethod
    def of(cls, address: Address) -> Used:
        """Read the service's /metrics, and what the kernel says of its process."""
        headers = {"Authorization": f"Bearer {address.token}"}
        text = httpx.get(f"{address.url}/metrics", headers=headers).raise_for_status().text
        found = {
            (sample.name.removeprefix("privatelora:"), *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        process = Path(f"/proc/{address.pid}/stat").read_text().rpartition(")")[2].split()
        machine = [int(ticks) for ticks in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        busy = sum(machine) - machine[3] - machine[4]  # all but idle and waiting for a disk
        user, system, busy_s = (int(ticks) / os.sysconf("SC_CLK_TCK") for ticks in (process[11], process[12], busy))
        return cls(
            time.monotonic(),
            found["tokens_total", "decode"],
            found["cpu_seconds_total", "decode", "layers"],
            found["cpu_seconds_total", "decode", "codec"],
            found["batch_rows_count", "decode"],
            found["batch_rows_sum", "decode"],
            user,
            system,
            busy_s,
        )


def measure(
    names: Sequence[str], bench: Workbench, sessions: Sequence[int] = SESSIONS, rounds: int = 1
) -> Iterator[Row]:
    """Measure the curve, write it and draw it."""
    if ROW not in names:
        return
    try:
        points = []
        for count in sessions:
            bench.say(f"{ROW}: {count} sessions")
            points.append(_point(count, bench))
            JSON.parent.mkdir(parents=True, exist_ok=True)
            JSON.write_text(json.dumps([asdict(point) for point in points], indent=2) + "\n", encoding="utf-8")
        draw(points, PNG)
        yield _row(points)
    except Exception as error:  # noqa: BLE001 (whatever it was: this row is named, and the others measured)
        yield unmeasured(ROW, TARGETS[ROW], error)


def _point(sessions: int, bench: Workbench) -> Point:
    address = bench.address(DTYPE)
    tokens = min(TOKENS, max(10, TOKENS_IN_ALL // sessions))
    with running(address, sessions, "paper", tokens, cache_dir=bench.cache_dir) as fleet:
        before = Used.of(address)
        decoded = fleet.decode()
        after = Used.of(address)
    return _of(decoded, sessions, before, after)


def _of(decoded: Decoded, sessions: int, before: Used, after: Used) -> Point:
    """CPU times are of all tokens, warm-up included; a step has one of each session."""
    steps = (after.tokens - before.tokens) / sessions
    compute, codec = (after.layers - before.layers) / steps, (after.codec - before.codec) / steps
    user, socket = (after.user - before.user) / steps, (after.system - before.system) / steps
    devices, step = decoded.cpu_s / steps, decoded.step_s
    python = max(0.0, user - compute - codec)
    others = max(0.0, (after.machine - before.machine) / steps - user - socket - devices)
    idle = max(0.0, CORES * step - user - socket - devices - others)
    rows = (after.rows - before.rows) / (after.batches - before.batches)
    return Point(
        sessions, decoded.tokens_per_s, step, decoded.percentile_s(50), decoded.percentile_s(99), rows, compute, codec,
        socket, python, devices, others, idle,
    )  # fmt: skip


def _row(points: Sequence[Point]) -> Row:
    best = max(points, key=lambda point: point.tokens_per_s)
    others = max(point.others_s / (CORES * point.step_s) for point in points)
    told = ", ".join(f"{point.sessions}: {point.tokens_per_s:.0f}" for point in points)
    return Row(
        ROW,
        TARGETS[ROW],
        best.tokens_per_s,
        conditions=f"at {best.sessions} sessions, the most of the curve (sessions: tokens/s {told}); every layer "
        f"inline, {DTYPE}, load generator, up to {TOKENS} tokens each after {WARMUP_TOKENS} of warm-up, one run, "
        f"while other programs took up to {others:.0%} of the cores; plotted in {PNG.relative_to(OUTPUT.parent)}",
        extra={f"tokens_per_s_{point.sessions}": point.tokens_per_s for point in points},
    )


def draw(points: Sequence[Point], path: Path) -> None:
    """The curve above, and beneath what of the cores' time a step takes, as a share."""
    at, names = range(len(points)), [str(point.sessions) for point in points]
    figure, (rates, times, shares) = plt.subplots(
        3, 1, sharex=True, figsize=(8, 10), height_ratios=(3, 3, 4), layout="constrained"
    )
    rates.plot(at, [point.tokens_per_s for point in points], "o-", color="#2b6cb0")
    for x, point in zip(at, points, strict=True):
        rates.annotate(f"{point.tokens_per_s:.0f}", (x, point.tokens_per_s), (0, 7), **LABEL)
    rates.set(ylabel="tokens/s, all sessions", ylim=(0, 1.18 * max(point.tokens_per_s for point in points)))
    rates.set_title("One backbone, many sessions: SmolLM2-135M, bfloat16, all 30 layers inline")
    for name, style, values in (("p50", "o-", [p.p50_s for p in points]), ("p99", "s--", [p.p99_s for p in points])):
        times.plot(at, [1e3 * value for value in values], style, color="#c05621", label=name)
    times.set(ylabel="time of a token, ms", yscale="log")
    times.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    times.yaxis.set_major_formatter("{x:.0f}")
    times.yaxis.set_minor_locator(NullLocator())
    times.legend(frameon=False, loc="upper left")
    base = [0.0] * len(points)
    for part, (label, colour) in PARTS.items():
        # the counters' ticks of 10 ms may make the parts a little more than the whole
        whole = [sum(getattr(point, other) for other in PARTS) for point in points]
        values = [100 * getattr(point, part) / all_ for point, all_ in zip(points, whole, strict=True)]
        shares.bar(at, values, 0.7, base, label=label, color=colour, edgecolor="#cbd5e0", linewidth=0.4)
        base = [low + value for low, value in zip(base, values, strict=True)]
    for x, point in zip(at, points, strict=True):
        shares.annotate(f"{1e3 * point.step_s:.0f} ms", (x, 100), (0, 3), **LABEL)
    shares.set(
        ylabel=f"share of {CORES} cores' time over a step, %", ylim=(0, 108), xlabel="sessions (above each bar: a step)"
    )
    shares.set_xticks(at, names)
    handles, labels = shares.get_legend_handles_labels()
    shares.legend(handles, labels, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=4, fontsize=9)
    for axes in (rates, times, shares):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    for axes in (rates, times):
        axes.grid(axis="y", color="#e2e8f0")
    figure.savefig(path, dpi=130)
    plt.close(figure)


LABEL = {"textcoords": "offset points", "ha": "center", "fontsize": 8}


def main(
    sessions: Annotated[str, typer.Option(help="Counts, with commas between.")] = ",".join(map(str, SESSIONS)),
) -> None:
    """Measure and draw the cost curve."""
    with Workbench() as bench:
        rows = list(measure([ROW], bench, [int(count) for count in sessions.split(",")]))
    show(rows)
    print(f"written to {JSON} and {PNG}")
    raise typer.Exit(rows[0].value is None)


if __name__ == "__main__":
    typer.run(main)

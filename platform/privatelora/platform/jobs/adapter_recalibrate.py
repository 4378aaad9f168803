"""`adapter-recalibrate`: makes a new calibrated set of A and B, from other passages of the same public text.

It is published beside the earlier ones, which existing adapters go on using, and is what new adapters get. Backbones
that share the data directory announce it with their next heartbeat. It runs in a process of its own, since it needs
torch and the whole model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Annotated

import msgspec

from privatelora.platform.jobs.runner import JobFailedError, WorkerContext
from privatelora.protocol.jobs import JobKind

LOOK_S = 0.5  # between two looks at whether the job is still ours


class Params(msgspec.Struct, forbid_unknown_fields=True):
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] = 1  # of the passages
    max_rank: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None


class Report(msgspec.Struct, forbid_unknown_fields=True):
    nbytes: Annotated[int, msgspec.Meta(ge=0)]
    max_rank_down: Annotated[int, msgspec.Meta(ge=1)]
    max_rank_up: Annotated[int, msgspec.Meta(ge=1)]
    seconds: Annotated[float, msgspec.Meta(ge=0)]


KIND = JobKind("adapter-recalibrate", Params, Report)


def run(context: WorkerContext) -> dict[str, int | float]:
    settings, started = context.settings, time.perf_counter()
    asked = {
        "model": settings.model,
        "data_dir": str(settings.data_dir),
        "dtype": settings.dtype,
        "device": settings.device,
        "torch_threads": settings.torch_threads,
        **context.params,
    }
    command = [sys.executable, "-m", "privatelora.platform.recalibrate", json.dumps(asked)]
    life, held = os.pipe()  # the process ends with this one, however that ends: it reads to the end of its stdin
    try:
        process = subprocess.Popen(command, stdin=life, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    finally:
        os.close(life)
    with process, open(held, "wb"):
        try:
            while True:
                try:
                    said, errors = process.communicate(timeout=LOOK_S)
                    break
                except subprocess.TimeoutExpired:
                    context.check()
        except BaseException:
            process.kill()
            raise
    if process.returncode < 0:  # the kernel had no memory left, most likely
        raise JobFailedError(f"the set was not made: its process was ended by signal {-process.returncode}", retry=True)
    if process.returncode:
        last = errors.decode(errors="replace").strip().splitlines()[-1:] or ["no reason was given"]
        raise JobFailedError(f"the set could not be made: {last[0]}", retry=False)
    made: dict[str, int | float] = json.loads(said)
    return made | {"seconds": time.perf_counter() - started}

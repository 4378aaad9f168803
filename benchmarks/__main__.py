"""`python -m benchmarks [--only name,name]`: measure rows, write bench-out/bench.json anew, print the same as a table.

`make bench ONLY=name,name` calls this. The exit status is 1 if a row could not be measured, whatever the figures are.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Annotated

import typer
from transformers.utils import logging as transformers_logging

from benchmarks import control, curve, decoding, quality, speed, training
from benchmarks.rows import OUTPUT, Row, show, write
from benchmarks.workbench import Workbench

MODULES = (speed, decoding, training, control, curve, quality)
NAMES = [name for module in MODULES for name in module.TARGETS]
ALIASES = {"generate_vs_transformers": "decode_1"}  # what rows were called before
PATH = OUTPUT / "bench.json"


def main(
    only: Annotated[str, typer.Option(help="Names of rows, with commas between; all of them unless set.")] = "",
) -> None:
    """Measure this project's figures on this machine."""
    names = [ALIASES.get(name.strip(), name.strip()) for name in only.split(",") if name.strip()] or NAMES
    if unknown := [name for name in names if name not in NAMES]:
        raise typer.BadParameter(f"no row is called {', '.join(unknown)}; the rows are {', '.join(NAMES)}")
    signal.signal(signal.SIGTERM, _terminated)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    rows: list[Row] = []
    PATH.unlink(missing_ok=True)
    with Workbench() as bench:
        for module in MODULES:
            for row in module.measure([name for name in names if name in module.TARGETS], bench):
                rows.append(row)
                write(rows, PATH)
    show(rows)
    print(f"written to {PATH}")
    sys.exit(any(row.value is None for row in rows))


def _terminated(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # by way of every `with`, so that no service stays behind


typer.run(main)

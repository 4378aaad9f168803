"""The one form of every figure: a `Row`, its target, and the file and the table that rows end up in.

`speed.py`, `quality.py` and `leakage.py` measure rows; `__main__.py` collects them. A row that could not be measured
keeps its place, without a value and with the reason in `conditions`.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from privatelora.protocol.errors import PrivateLoraError

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "bench-out"
PIPED_WIDTH = 160  # columns where there is no terminal to fit


class Unmeasured(Exception):
    """A row could not be measured; the message is the reason."""


@dataclass(frozen=True)
class Target:
    """What a row's floor and aim speak of (`judged`: value or ratio), and in which direction; None: printed only."""

    unit: str
    judged: str = "ratio"
    better: str = "higher"
    floor: float | None = None
    aim: float | None = None


@dataclass(frozen=True)
class Row:
    """One figure; `extra` are keys of its own, beside those that every row has."""

    name: str
    target: Target
    value: float | None
    baseline: float | None = None
    ratio: float | None = None
    conditions: str = ""
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def judged(self) -> float | None:
        return self.ratio if self.target.judged == "ratio" else self.value

    def reaches(self, bound: float) -> bool:
        """Whether what is judged is at `bound` or better."""
        if self.judged is None:
            return False
        return self.judged >= bound if self.target.better == "higher" else self.judged <= bound

    def as_dict(self) -> dict[str, object]:
        target = self.target
        return {
            "name": self.name,
            "value": self.value,
            "unit": target.unit,
            "baseline": self.baseline,
            "ratio": self.ratio,
            "judged": target.judged,
            "better": target.better,
            "floor": target.floor,
            "aim": target.aim,
            "conditions": self.conditions,
            **self.extra,
        }


def unmeasured(name: str, target: Target, error: Exception) -> Row:
    """The row that says why there is no figure; the traceback of what was not foreseen goes to stderr."""
    if not isinstance(error, Unmeasured | PrivateLoraError):
        traceback.print_exception(error)
    return Row(name, target, None, conditions=f"could not be measured: {error or type(error).__name__}")


def write(rows: Sequence[Row], path: Path) -> None:
    """Write `path` anew as a JSON list of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([row.as_dict() for row in rows], indent=2) + "\n", encoding="utf-8")


def show(rows: Sequence[Row]) -> None:
    """Print the same as a table, green where an aim is reached and red where a floor is missed, and the conditions."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("row", no_wrap=True)
    for column in ("value", "unit", "baseline", "ratio", "floor", "aim"):
        table.add_column(column, justify="left" if column == "unit" else "right", no_wrap=True)
    for row in rows:
        target = row.target
        value, ratio = _number(row.value), _number(row.ratio)
        floor, aim = _bound(target, target.floor), _bound(target, target.aim)
        table.add_row(row.name, value, target.unit, _number(row.baseline), ratio, floor, aim, style=_style(row))
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    console.print(table)
    for row in rows:
        console.print(f"{row.name}: {row.conditions}", style="dim", markup=False, highlight=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _bound(target: Target, value: float | None) -> str:
    """A floor or an aim with the sign of its direction, on the value or on the ratio."""
    if value is None:
        return "-"
    return f"{target.judged} {'≥' if target.better == 'higher' else '≤'} {value:g}"


def _style(row: Row) -> str:
    floor, aim = row.target.floor, row.target.aim
    if row.value is None or (floor is not None and not row.reaches(floor)):
        return "red"
    return "green" if aim is not None and row.reaches(aim) else ""

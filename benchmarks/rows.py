"""The one form of every figure: a `Row`, its target, and the file and the table that rows end up in.

`speed.py`, `quality.py` and `leakage.py` measure rows; `__main__.py` collects them. A row that could not be measured
keeps its place, without a value and with the reason in `conditions`.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from privatelora.protocol.errors import PrivateLoraError

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "bench-out"


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


def table(rows: Sequence[Row]) -> Table:
    """The same rows for a terminal; green reaches its aim, red misses its floor."""
    made = Table(show_edge=False, header_style="bold")
    made.add_column("row", no_wrap=True)
    for column in ("value", "baseline", "ratio", "floor", "aim"):
        made.add_column(column, justify="right", no_wrap=True)
    made.add_column("conditions", overflow="fold", ratio=1)
    for row in rows:
        value = "not measured" if row.value is None else f"{row.value:.4g} {row.target.unit}"
        cells = (number(row.baseline), number(row.ratio), bound(row, row.target.floor), bound(row, row.target.aim))
        made.add_row(row.name, value, *cells, row.conditions, style=_style(row))
    return made


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the table, whole where there is no terminal to fit."""
    console.print(table(rows), width=None if console.is_terminal else 240)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def bound(row: Row, value: float | None) -> str:
    """A floor or an aim, with the sign of its direction."""
    if value is None:
        return "-"
    return f"{'≥' if row.target.better == 'higher' else '≤'} {value:g}"


def _style(row: Row) -> str:
    floor, aim = row.target.floor, row.target.aim
    if row.value is None or (floor is not None and not row.reaches(floor)):
        return "red"
    return "green" if aim is not None and row.reaches(aim) else ""

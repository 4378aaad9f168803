"""What the commands share on a terminal: `Spinner` for slow work, and rows as a table, as JSON or as CSV."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.table import Table
from rich.text import Text

PLAIN_INTERVAL_S = 1.0


class Spinner:
    """Says what slow work is doing: one changing line on a terminal, elsewhere at most a line a second.

    Called with a text; gone at the end of its `with` block, or at `stop`.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("", spinner="dots") if console.is_terminal else None
        self._running = False
        self._next_line_s = 0.0
        self._text = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __call__(self, text: str) -> None:
        if text == self._text:
            return
        if self._status is not None:
            self._status.update(text)
            if not self._running:
                self._status.start()
                self._running = True
        elif time.monotonic() < self._next_line_s:
            return
        else:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            self._next_line_s = time.monotonic() + PLAIN_INTERVAL_S
        self._text = text

    def stop(self) -> None:
        """Remove the line from a terminal."""
        if self._status is not None and self._running:
            self._status.stop()
            self._running = False


def print_rows(rows: Sequence[Mapping[str, Any]], names: Sequence[str], as_json: bool) -> None:
    """A table of the columns `names`, or JSON of everything."""
    if as_json:
        print(json.dumps([dict(row) for row in rows], default=str))
        return
    table = columns(*names)
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in names))
    print_table(table)


def print_csv(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """CSV on stdout, with a line of names first."""
    writer = csv.writer(sys.stdout)
    writer.writerow(names)
    writer.writerows([_formula_free(row[name]) for name in names] for row in rows)


def columns(*titles: str) -> Table:
    """A table without lines, in which a path or a hash is never shortened."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def print_table(table: Table) -> None:
    """Fit a terminal; in a pipe one line a row, for grep."""
    Console(width=None if sys.stdout.isatty() else 1000, highlight=False).print(table)


def _cell(value: object) -> Text:
    if value is None:
        return Text("-")
    if isinstance(value, datetime):
        return Text(value.strftime("%Y-%m-%d %H:%M:%S"))
    if isinstance(value, dict):
        return Text(" ".join(f"{name}={one}" for name, one in value.items()) or "-")
    return Text(str(value))  # not markup, which a user's name could be


def _formula_free(value: object) -> object:
    """A text that a spreadsheet would compute is told as a text."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value

"""What a person sees of a fine-tune: a progress bar while it runs, and its loss curve as text or as a PNG.

From: the `StepRecord`s of `DeviceSession.finetune`. To: a terminal, a log or a file. Numbers only; no text of anyone.

    with FinetuneProgress() as progress:
        report = me.finetune(data, callbacks=[progress])
    print(loss_curve_text(report.history))
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import uniplot
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from privatelora.protocol.errors import DataError, StoreError

if TYPE_CHECKING:
    from privatelora.device.training import StepRecord

PLAIN_LINES = 10  # a fine-tune whose output is no terminal prints about this many
SMOOTHING = 0.8  # share of the last value in the curve's running mean


class FinetuneProgress:
    """A callback for `DeviceSession.finetune`: a bar with loss, tokens/s, bytes and time left, or plain lines.

    Where `console` is no terminal it prints a line a tenth of the way. `last` is the newest record, None before the
    first step. It is a context manager, so that the bar is gone whatever ends the training.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.last: StepRecord | None = None
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, record: StepRecord) -> None:
        """Show one step."""
        before, self.last = self.last, record
        if self.console.is_terminal:
            self._draw(record)
        elif before is None or _tenth(record) > _tenth(before):
            self.console.print(_line(record), highlight=False, soft_wrap=True)

    def _draw(self, record: StepRecord) -> None:
        if self._bar is None:
            # refreshed by each step and by nothing else, so that no thread draws
            self._bar = Progress(
                BarColumn(bar_width=None),  # what the numbers leave of the line
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("[bold]loss {task.fields[loss]}[/bold]"),
                TextColumn("{task.fields[speed]} tokens/s"),
                TextColumn("[cyan]↑ {task.fields[up]} ↓ {task.fields[down]}[/cyan]"),
                TextColumn("[dim]{task.fields[left]} left[/dim]"),
                console=self.console,
                auto_refresh=False,
                expand=True,
            )
            self._bar.start()
            self._bar.add_task("", total=record.total_steps, **_fields(record))
        self._bar.update(self._bar.task_ids[0], completed=record.step, refresh=True, **_fields(record))


def loss_curve_text(history: Sequence[StepRecord], width: int = 60, height: int = 12) -> str:
    """Draw the loss of each step with characters; `width` and `height` are of the plotting area."""
    _require_steps(history)
    drawn: str = uniplot.plot_to_string(
        [record.loss for record in history],
        [record.step for record in history],
        title="loss (nats per labelled token) by step",
        lines=len(history) > 1,
        width=width,
        height=height,
        y_min=0.0,
        y_max=max(max(record.loss for record in history), 1e-3),
    )
    return drawn


def save_loss_curve(history: Sequence[StepRecord], path: str | Path) -> Path:
    """Write the loss curve as a PNG; raises `StoreError` where the file cannot be written."""
    _require_steps(history)
    # imported here: it takes a second, which nothing else needs
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [record.step for record in history]
    losses = [record.loss for record in history]
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9db7d5", linewidth=1, marker="." if len(steps) == 1 else "", label="each step")
    axes.plot(steps, _smoothed(losses), color="#1f5fa8", linewidth=2.2, label="running mean")
    boundaries = [b.step - 0.5 for a, b in pairwise(history) if b.epoch != a.epoch]
    for number, boundary in enumerate(boundaries):
        label = "new epoch" if number == 0 else None
        axes.axvline(boundary, color="#c8c8c8", linewidth=0.8, linestyle=":", label=label, zorder=0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per labelled token)")
    axes.set_title("Loss of the fine-tune, measured on the device")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    target = Path(path)
    try:
        figure.savefig(target, format="png")
    except OSError as error:
        raise StoreError(f"{target} cannot be written ({error}); choose another file or make its folder") from None
    return target


def time_text(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def size_text(nbytes: float) -> str:
    """A number of bytes for people, in powers of 1000: `850 B`, `12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            break
        nbytes /= 1000
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"


def _fields(record: StepRecord) -> dict[str, Any]:
    return {
        "epoch": str(record.epoch + 1),
        "loss": f"{record.loss:.3f}",
        "speed": f"{record.tokens_per_s:.0f}",
        "up": size_text(record.bytes_up),
        "down": size_text(record.bytes_down),
        "left": str(timedelta(seconds=round(record.eta_s))),
    }


def _line(record: StepRecord) -> str:
    shown = _fields(record)
    return (
        f"step {record.step}/{record.total_steps}  epoch {shown['epoch']}  loss {shown['loss']}  "
        f"{shown['speed']} tokens/s  up {shown['up']}  down {shown['down']}  {shown['left']} left"
    )


def _tenth(record: StepRecord) -> int:
    return record.step * PLAIN_LINES // record.total_steps


def _smoothed(values: Sequence[float]) -> list[float]:
    """Running mean whose weights are corrected for the start, where there is no past (as in Adam)."""
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(mean / weight)
    return smoothed


def _require_steps(history: Sequence[StepRecord]) -> None:
    if not history:
        raise DataError("the fine-tune took no step, so it has no loss curve; give it more data or a larger budget")

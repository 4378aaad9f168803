"""`privatelora demo`: a device teaches a frozen model in another process ten private facts, and asks for them.

    facts.json -> DeviceSession -> socket -> a service process of its own
               -> ten answers before and after, losses, counted bytes -> report.json, report.html, loss.png

Everything in the report is measured in this run. What was started is stopped, whatever ends the demo.
"""

from __future__ import annotations

import re
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from privatelora.platform.child import running_service
from privatelora.platform.console import Spinner
from privatelora.platform.report import Answer, Report, write_report
from privatelora.protocol.accounting import device_lora_elements, reduction_by_shape
from privatelora.protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from privatelora.device.session import DeviceSession

BATCH_SIZE = 4
SEED = 0
MAX_ANSWER_TOKENS = 24  # the longest right answer has 13
RIGHT, WRONG = "[green]✓[/green]", "[red]✗[/red]"


@dataclass(frozen=True)
class DemoOptions:
    """What the command line chooses."""

    placement: str
    model: str
    rank: int
    m_kind: str
    epochs: int
    output: Path


class Fact(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A made-up private fact: four training wordings, a question in a fifth, and the word that a right answer holds."""

    answer: str
    expected: str
    training: list[str]
    question: str

    def is_right(self, answer: str) -> bool:
        """Whether the expected word stands in `answer` as a whole word, in any case."""
        return re.search(rf"(?<!\w){re.escape(self.expected)}(?!\w)", answer, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Replies:
    """Answers to the ten questions; `tokens` include the end token that closes an answer."""

    texts: list[str]
    right: int
    tokens: int
    seconds: float


def load_facts() -> list[Fact]:
    """The ten facts that ship with the package."""
    return msgspec.json.decode((files("privatelora.platform") / "facts.json").read_bytes(), type=list[Fact])


def run_demo(options: DemoOptions, console: Console) -> Report:
    """Run the demo, print what happens, and write the report into `options.output`.

    Raises `ConfigurationError` for a folder that cannot be written, and what the service and the session raise.
    """
    started = time.monotonic()
    _make_folder(options.output)
    with _ended_by_signals(), tempfile.TemporaryDirectory(prefix="privatelora-demo-") as store:
        _heading(console, "A service starts, as a process of its own")
        with (
            Spinner(console) as progress,
            running_service(["--model", options.model, "--log-level", "warning"], progress) as service,
        ):
            progress.stop()
            # torch takes seconds to import, during which an error of the service would not show
            from privatelora.device.session import DeviceSession

            with DeviceSession(
                service.url,
                token=service.token,
                name="demo",
                placement=options.placement,
                adapter="calibrated",
                rank=options.rank,
                m_kind=options.m_kind,
                seed=SEED,
                store_dir=store,
            ) as me:
                return _teach(me, options, started, console)


def _teach(me: DeviceSession, options: DemoOptions, started: float, console: Console) -> Report:
    """Ask, fine-tune, ask again; print and write the report."""
    from privatelora.device.progress import FinetuneProgress, loss_curve_text, save_loss_curve

    facts = load_facts()
    lessons = [_chat(wording, fact.answer) for fact in facts for wording in fact.training]
    rows = [_chat(fact.question, fact.answer) for fact in facts]
    _introduce(me, console)

    _heading(console, f"Before: {len(facts)} questions to the frozen model")
    before = _ask(me, facts, console)
    loss_before = me.evaluate(rows)

    _heading(console, f"Fine-tune: {len(lessons)} sequences, {options.epochs} epochs, over the socket")
    with FinetuneProgress(console) as progress:
        trained = me.finetune(lessons, epochs=options.epochs, batch_size=BATCH_SIZE, callbacks=[progress], seed=SEED)
    console.print(loss_curve_text(trained.history), highlight=False, markup=False, soft_wrap=True)

    _heading(console, "After: the same questions, in words that no training sequence had")
    payload = me.remote.count.payload_up + me.remote.count.payload_down
    loss_after = me.evaluate(rows)
    payload = me.remote.count.payload_up + me.remote.count.payload_down - payload
    after = _ask(me, facts, console)

    count, expected = me.remote.count, me.remote.expected
    report = Report(
        model=me.service.info.model.name,
        adapter_kind=me.settings.spec.kind,
        m_kind=me.settings.m_kind,
        placement=me.placement.describe(me.service.info.model.shape.layers),
        rank_down=me.settings.spec.rank_down,
        rank_up=me.settings.spec.rank_up,
        loss_before=loss_before.loss,
        loss_after=loss_after.loss,
        heldout_tokens=loss_after.tokens,
        answers=[
            Answer(fact.question, fact.expected, old, new)
            for fact, old, new in zip(facts, before.texts, after.texts, strict=True)
        ],
        answers_right_before=before.right,
        answers_right_after=after.right,
        m_parameters=me.adapter.count(),
        train_tokens=trained.tokens,
        train_tokens_per_s=trained.tokens_per_s,
        generate_tokens_per_s=(before.tokens + after.tokens) / (before.seconds + after.seconds),
        payload_bytes_up=count.payload_up,
        payload_bytes_down=count.payload_down,
        expected_payload_bytes_up=expected.up,
        expected_payload_bytes_down=expected.down,
        frame_overhead_bytes=count.overhead,
        reduction_vs_device_lora=_reduction(me, payload, me.examples(rows).tokens, loss_after.tokens),
        reduction_by_shape=reduction_by_shape(),
        seconds=time.monotonic() - started,
    )
    curve = save_loss_curve(trained.history, options.output / "loss.png")
    write_report(report, len(me.placement.inline), curve, options.output)
    _conclude(report, facts, len(me.placement.inline), options.output, console)
    return report


def _ask(me: DeviceSession, facts: Sequence[Fact], console: Console) -> Replies:
    """Greedy answers to every question."""
    texts: list[str] = []
    tokens = 0
    started = time.perf_counter()
    with Spinner(console) as progress:
        for fact in facts:
            if console.is_terminal:
                progress(f"{len(texts) + 1} of {len(facts)}: {fact.question}")
            answer = me.generate(_question(fact.question), max_new_tokens=MAX_ANSWER_TOKENS)
            length = len(me.tokenizer(answer, add_special_tokens=False)["input_ids"])
            tokens += min(length + 1, MAX_ANSWER_TOKENS)
            texts.append(" ".join(answer.split()))
    right = sum(fact.is_right(text) for fact, text in zip(facts, texts, strict=True))
    console.print(f"{right} of {len(facts)} right", highlight=False)
    return Replies(texts, right, tokens, time.perf_counter() - started)


def _reduction(me: DeviceSession, payload_bytes: int, n_f: int, n_labelled: int) -> float:
    """Share of the per-layer exchange saved against LoRA on q, k, v held on the device, from counted bytes.

    `payload_bytes` crossed in forward passes over `n_f` tokens. The hidden states at both ends of the service's layers
    cross in either scheme and are taken out; where no layer is inline, nothing is left.
    """
    shape, placement = me.service.info.model.shape, me.placement
    n_o = n_f if placement.last else n_labelled
    exchanged = payload_bytes / me.remote.wire_dtype.nbytes((1,)) - (n_f + n_o) * shape.hidden  # elements
    layers = len(placement.inline) or len(placement.cloud_layers(shape.layers))
    return 1 - exchanged / (n_f * device_lora_elements(shape, layers))


def _introduce(me: DeviceSession, console: Console) -> None:
    """Who holds what, before anything is sent."""
    from privatelora.device.progress import size_text

    shape, placement, spec = me.service.info.model.shape, me.placement, me.settings.spec
    cloud, own = len(placement.cloud_layers(shape.layers)), placement.first + placement.last
    console.print(
        f"{me.service.base_url} holds {cloud} frozen layers of {me.service.info.model.name}, the same for every user.",
        highlight=False,
        soft_wrap=True,
    )
    here = "tokenizer, embedding and head" + (f", {own} layers with LoRA" if own else "")
    if placement.inline:
        here += f", M ({me.settings.m_kind})"
    crossing = "hidden states and their gradients" if placement.sends_gradient else "hidden states"
    if placement.inline:
        widths = f"u ({spec.encoders} x {spec.rank_down} numbers a token) and v (3 x {spec.rank_up})"
        crossing += f"; at {len(placement.inline)} layers {widths}"
    table = Table.grid(padding=(0, 2))
    here = f"the facts, every token, the loss, the optimizer; {here}"
    table.add_row("[bold green]stays on this device[/bold green]", here)
    table.add_row("[bold yellow]crosses the wire[/bold yellow]", f"{crossing}; no text, no token, no M")
    table.add_row("", "[dim]the service's operator could still reconstruct text from these: see report.html[/dim]")
    table.add_row("trained here", f"{me.adapter.count():,} numbers, {size_text(4 * me.adapter.count())}")
    console.print(table)


def _conclude(report: Report, facts: Sequence[Fact], inline_layers: int, output: Path, console: Console) -> None:
    """The table of answers, what crossed, and where the report is."""
    from privatelora.device.progress import size_text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("question")
    table.add_column("before", style="dim", no_wrap=True, overflow="ellipsis", max_width=24)
    table.add_column("after")
    for fact, answer in zip(facts, report.answers, strict=True):
        mark = RIGHT if fact.is_right(answer.after) else f"{WRONG} ({escape(fact.expected)})"
        table.add_row(fact.question, escape(answer.before), f"{mark} {escape(answer.after)}")
    console.print(table)
    equal = (report.payload_bytes_up, report.payload_bytes_down) == (
        report.expected_payload_bytes_up,
        report.expected_payload_bytes_down,
    )
    rows = {
        "right answers": f"{report.answers_right_before} before, {report.answers_right_after} after, of {len(facts)}",
        "loss of the answers": f"{report.loss_before:.3f} to {report.loss_after:.3f} nats a token",
        "tensors on the wire": f"{size_text(report.payload_bytes_up)} up, {size_text(report.payload_bytes_down)} down, "
        + ("to the byte what the formula says" if equal else "NOT what the formula says"),
        "exchange at the layers": f"{report.reduction_vs_device_lora:.1%} less than LoRA on the device would need"
        if inline_layers
        else "none",
        "tokens/s": f"{report.train_tokens_per_s:.0f} in training, {report.generate_tokens_per_s:.0f} in answering",
        "all of it took": f"{report.seconds:.0f} s",
        "read on": f"{output / 'report.html'}, {output / 'report.json'}, {output / 'loss.png'}",
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(name, value)
    console.print(grid, highlight=False)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and a closed terminal unwind the block, so that the service is stopped then too."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"the demo cannot write into {folder} ({error}); choose another --output") from None


def _question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [*_question(question), {"role": "assistant", "content": answer}]}


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]", highlight=False)

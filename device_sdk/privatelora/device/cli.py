"""`privatelora-device`: what a device owner types. Options become one `DeviceSession`, a command one of its verbs.

    finetune, chat, eval, info, export  ->  DeviceSession.finetune, .stream, .evaluate, its announcement, .export_peft
    agent                               ->  agent.Agent: jobs that operators ask for and the owner's policy allows

Errors of the tree become one line and exit status 2; Ctrl-C ends with 130. Training data are read by the SDK only.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from privatelora.device.cli_options import Common, with_common
from privatelora.protocol import local
from privatelora.protocol.errors import DataError, PrivateLoraError

if TYPE_CHECKING:
    from privatelora.device.agent import Agent
    from privatelora.device.session import DeviceSession
    from privatelora.device.training import FinetuneReport

INTERRUPTED = 130  # 128 + SIGINT, as shells expect
TRAINING, BUDGET, SAMPLING, OUTPUT = "Training", "Budget", "Sampling", "Output"

app = typer.Typer(
    help="Personalise a frozen language model that someone else hosts, with data that stays on this device.",
    epilog="Start with [bold]privatelora-device info[/bold]. Every command finds an embedded service of this machine "
    "and its token by itself.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # a traceback with locals would print private text
)


@app.command(
    epilog="Examples:\n\n  privatelora-device finetune notes.jsonl\n\n"
    "  privatelora-device finetune chats.jsonl --placement one-trip --epochs 5 --curve loss.png\n\n"
    "  privatelora-device finetune notes.jsonl --max-minutes 10   (and later the same with --resume)",
)
@with_common
def finetune(
    common: Common,
    data: Annotated[
        Path,
        typer.Argument(help="JSONL, CSV or Parquet with text, prompt and completion, or messages; or a text file."),
    ],
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.", rich_help_panel=TRAINING)] = 3,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate; unset, it follows the rank.", rich_help_panel=TRAINING)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step.", rich_help_panel=TRAINING)] = 4,
    warmup_steps: Annotated[
        int, typer.Option(min=0, help="Steps up to the peak learning rate.", rich_help_panel=TRAINING)
    ] = 10,
    clip_norm: Annotated[
        float, typer.Option(min=0, help="Largest total norm of a step's gradient.", rich_help_panel=TRAINING)
    ] = 1.0,
    validation: Annotated[
        Path | None, typer.Option(help="Held-out data, evaluated after each epoch.", rich_help_panel=TRAINING)
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after this many epochs without a better validation.", rich_help_panel=TRAINING),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the data.", rich_help_panel=TRAINING)] = 0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the last step of a fine-tune that was cut off.", rich_help_panel=TRAINING
        ),
    ] = False,
    on_quota: Annotated[
        Literal["stop", "wait"],
        typer.Option(
            help="Where an allowance of the service is spent: stop, or wait until it resets.", rich_help_panel=BUDGET
        ),
    ] = "stop",
    max_minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Stop after this time; what was learned is kept.", rich_help_panel=BUDGET),
    ] = None,
    max_megabytes: Annotated[
        float | None,
        typer.Option(min=0, help="Stop after this much tensor traffic, both ways.", rich_help_panel=BUDGET),
    ] = None,
    curve: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Write the loss curve to this file.", rich_help_panel=OUTPUT)
    ] = None,
) -> None:
    """Train this device's adapter on local data, which never leaves it.

    Every step is kept in the local store, so a fine-tune that was cut off goes on with --resume.
    """
    from privatelora.device.progress import FinetuneProgress, loss_curve_text, save_loss_curve

    console = Console()
    with common.session() as me, _plain_warnings(), FinetuneProgress(console) as progress:
        try:
            report = me.finetune(
                data,
                epochs=epochs,
                learning_rate=learning_rate,
                batch_size=batch_size,
                validation=validation,
                callbacks=[progress],
                warmup_steps=warmup_steps,
                clip_norm=clip_norm,
                patience=patience,
                max_seconds=None if max_minutes is None else 60 * max_minutes,
                max_bytes=None if max_megabytes is None else int(1e6 * max_megabytes),
                seed=seed,
                resume=resume,
                on_quota=on_quota,
            )
        except KeyboardInterrupt:
            last = progress.last
            done = f"after step {last.step} of {last.total_steps}" if last else "before the first step"
            _note(f"stopped {done}; every finished step is saved. Go on with the same command and --resume.")
            raise typer.Exit(INTERRUPTED) from None
    if report.history:
        console.print(loss_curve_text(report.history), highlight=False, markup=False, soft_wrap=True)
    _print_report(console, report, common.name)
    if curve is not None:
        console.print(f"loss curve: {save_loss_curve(report.history, curve)}", highlight=False, soft_wrap=True)


@app.command(
    epilog='Examples:\n\n  privatelora-device chat\n\n  privatelora-device chat --message "What is my cat called?"\n\n'
    '  privatelora-device chat --complete --message "Dear diary," --temperature 0.8',
)
@with_common
def chat(
    common: Common,
    message: Annotated[str | None, typer.Option(help="Ask this once, print the answer and end.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message before the conversation.")] = None,
    complete: Annotated[
        bool, typer.Option("--complete", help="Continue the text itself, without the model's chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer, in tokens.", rich_help_panel=SAMPLING)
    ] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token.", rich_help_panel=SAMPLING)
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(help="Sample among the likeliest tokens of this total probability.", rich_help_panel=SAMPLING),
    ] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End the answer before this text; may be repeated.", rich_help_panel=SAMPLING),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.", rich_help_panel=SAMPLING)] = None,
) -> None:
    """Talk with the personalised model; the words stay here, the answer appears as it is generated."""
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "stop": stop or (),
        "seed": seed,
    }
    with common.session() as me:
        talk = Conversation(me, options, system, complete)
        if message is not None:
            talk.ask(message)
            return
        print("/reset forgets the conversation, /quit or Ctrl-D ends. Ctrl-C breaks off an answer.")
        while True:
            try:
                said = input("you> ").strip()
            except EOFError:
                print()
                return
            if said == "/quit":
                return
            if said == "/reset":
                talk.reset()
            elif said:
                talk.try_to_ask(said)


@app.command("eval", epilog="Example:\n\n  privatelora-device eval held-out.jsonl")
@with_common
def evaluate(
    common: Common,
    data: Annotated[Path, typer.Argument(help="Local data, as for finetune.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a pass.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Measure the loss of the personalised model on local data."""
    with common.session() as me, _plain_warnings():
        found = me.evaluate(data, batch_size=batch_size)
    if as_json:
        print(json.dumps({"loss": found.loss, "tokens": found.tokens, "examples": found.examples}))
    else:
        print(f"loss {found.loss:.4f} nats per labelled token ({found.tokens} tokens in {found.examples} examples)")


@app.command(epilog="Example:\n\n  privatelora-device info --placement one-trip")
@with_common
def info(
    common: Common,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Show the service, the adapter, what is held on this device, and what crosses the wire per token."""
    from privatelora.device.inventory import Inventory

    with common.session() as me:
        inventory = Inventory.of(me)
    if as_json:
        print(json.dumps(inventory.as_dict(), indent=2))
    else:
        inventory.show(Console())


@app.command(epilog="Example:\n\n  privatelora-device export ./my-lora")
@with_common
def export(
    common: Common,
    directory: Annotated[Path, typer.Argument(help="Folder for adapter_config.json and adapter_model.safetensors.")],
) -> None:
    """Write the adapter in PEFT's format, to be used with the whole model anywhere.

    Works for a linear M and for LoRA on layers that the device holds; an mlp M is no LoRA.
    """
    with common.session() as me:
        me.export_peft(directory)
    print(f"{directory}: load it with peft.PeftModel.from_pretrained(model, {str(directory)!r})")


@app.command(
    epilog="Examples:\n\n  privatelora-device agent --example-policy > policy.toml\n\n"
    "  privatelora-device agent --policy policy.toml\n\n  privatelora-device agent --policy policy.toml --dry-run",
)
@with_common
def agent(
    common: Common,
    policy: Annotated[Path, typer.Option(help="What you agree to: which jobs, on which data, when, how much.")] = Path(
        "policy.toml"
    ),
    device_name: Annotated[str, typer.Option(help="What the operator sees this device called.")] = "",
    once: Annotated[bool, typer.Option("--once", help="Do what is offered now, and end.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print what the policy answers to what is offered now.")
    ] = False,
    example_policy: Annotated[
        bool, typer.Option("--example-policy", help="Print a policy to begin with, and end.")
    ] = False,
) -> None:
    """Run jobs that the operator asks for and your policy allows; they see numbers, never text or tensors.

    Without the kind of a job in your policy, nothing of it runs. Ctrl-C ends after the present step, and the job goes
    on from there another time.
    """
    from privatelora.device.policy import EXAMPLE, Policy

    if example_policy:
        print(EXAMPLE, end="")
        return
    Policy.read(policy)
    from privatelora.device.agent import Agent

    common = common.asked()
    with (
        common.control() as control,
        closing(Agent(control, policy, common.session, local.store_dir(), _note, device_name)) as worker,
    ):
        if dry_run:
            for offer, refusal in worker.answers():
                print(f"{offer.kind} {offer.id}: {'would run' if refusal is None else refusal}")
            return
        with _stopped_by_signals(worker):
            _note(f"waiting for jobs at {common.server}, as {policy} allows")
            worker.run(once)


def main() -> None:
    """The `privatelora-device` script: one line and exit status 2 for every error of the tree."""
    try:
        app()
    except PrivateLoraError as error:
        _note(f"error: {error.message}", "red")
        sys.exit(2)


class Conversation:
    """A chat on the terminal: keeps the messages and prints each answer as it grows."""

    def __init__(self, me: DeviceSession, options: dict[str, Any], system: str | None, complete: bool) -> None:
        self._me, self._options, self._complete = me, options, complete
        self._opening = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self._messages = list(self._opening)

    def ask(self, text: str) -> None:
        """Print the answer to `text`, and remember both."""
        asked = [*self._messages, {"role": "user", "content": text}]
        answer = ""
        for piece in self._me.stream(text if self._complete else asked, **self._options):
            answer += piece
            print(piece, end="", flush=True)
        print()
        self._messages = [*asked, {"role": "assistant", "content": answer}]

    def try_to_ask(self, text: str) -> None:
        """`ask`, where a question that cannot be answered or is broken off leaves the conversation as it was."""
        try:
            self.ask(text)
        except KeyboardInterrupt:
            print(" (broken off)")
        except DataError as error:
            _note(f"{error.message} (/reset forgets the conversation)", "yellow")


def _print_report(console: Console, report: FinetuneReport, name: str) -> None:
    from privatelora.device.progress import size_text, time_text

    lines = [
        f"{report.stopped}: {report.steps} steps, {report.tokens} tokens in {report.seconds:.1f} s "
        f"({report.tokens_per_s:.0f} tokens/s)",
        f"crossed the wire: {size_text(report.bytes_up)} up, {size_text(report.bytes_down)} down",
    ]
    if report.history:
        lines.insert(
            1, f"loss of a batch: {report.history[0].loss:.3f} at first, {report.history[-1].loss:.3f} at last"
        )
    if report.validation:
        lines.append("validation by epoch: " + " ".join(f"{loss:.4f}" for loss in report.validation))
    lines.append(f"adapter {name!r} is saved on this device")
    if report.retry_after_s is not None:
        lines.append(f"an allowance of the service is spent; it resets in {time_text(report.retry_after_s)}")
    if report.stopped.endswith("budget") or report.stopped == "quota":
        lines.append("the same command with --resume goes on from here")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _stopped_by_signals(worker: Agent) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends an agent that waits, and a job that runs after its step; the second ends all."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(*_: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        if worker.idle:
            raise SystemExit(0)
        # in a thread, since this one may be within a wait for the very event that `stop` sets
        threading.Thread(target=worker.stop).start()

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show a warning of the SDK, such as rows that were split, as one line."""

    def show(message: Warning | str, category: type[Warning], *place: object, **more: object) -> None:
        _note(str(message), "yellow")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _note(text: str, style: str | None = None) -> None:
    Console(stderr=True).print(text, style=style, highlight=False, markup=False, soft_wrap=True)

"""Options that every command of `privatelora-device` has: `Common`, and `with_common`, which gives them to a command.

From: the command line and `PRIVATELORA_*` variables. To: the one `DeviceSession` that a command works with.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec

import typer

from privatelora.protocol.errors import ConfigurationError, QuotaError

if TYPE_CHECKING:
    from privatelora.device.control import ControlPlane
    from privatelora.device.session import DeviceSession

DEFAULT_SERVER = "http://127.0.0.1:8765"
SERVICE, ADAPTER = "Service", "Adapter"
TIMEOUT_S = 30.0  # of a request to the control plane

P = ParamSpec("P")


@dataclass(frozen=True)
class Common:
    """The options that every command has; `session` opens what they describe."""

    server: Annotated[
        str,
        typer.Option(
            envvar="PRIVATELORA_SERVER",
            help="Base URL of the service: https:// off this machine.",
            rich_help_panel=SERVICE,
        ),
    ] = DEFAULT_SERVER
    token: Annotated[
        str | None,
        typer.Option(
            envvar="PRIVATELORA_TOKEN",
            help="Bearer token; the variable keeps it out of process lists. An embedded service's is found by itself.",
            rich_help_panel=SERVICE,
        ),
    ] = None
    ca_file: Annotated[
        Path | None, typer.Option(help="PEM of an authority to trust besides the system's.", rich_help_panel=SERVICE)
    ] = None
    allow_plain: Annotated[
        bool,
        typer.Option(
            "--allow-plain", help="Accept http:// to another machine, readable on the way.", rich_help_panel=SERVICE
        ),
    ] = False
    name: Annotated[str, typer.Option(help="Adapter in the local store.", rich_help_panel=ADAPTER)] = "default"
    placement: Annotated[
        str | None,
        typer.Option(
            help="Who holds which layer: paper, few-trips, one-trip, or first=2,last=4,inline=7+12. "
            "Unset: the saved adapter's, else the service's default. So with the options below.",
            rich_help_panel=ADAPTER,
        ),
    ] = None
    adapter: Annotated[
        str | None, typer.Option(help="Kind of the service's set: calibrated or random.", rich_help_panel=ADAPTER)
    ] = None
    rank: Annotated[
        str | None,
        typer.Option(help="Rank of what crosses: 64, or down,up as in 64,32.", rich_help_panel=ADAPTER),
    ] = None
    m_kind: Annotated[str | None, typer.Option(help="The device's M: linear or mlp.", rich_help_panel=ADAPTER)] = None
    m_hidden: Annotated[int | None, typer.Option(help="Hidden width of an mlp M.", rich_help_panel=ADAPTER)] = None
    lora_rank: Annotated[
        int | None, typer.Option(help="Rank of the LoRA on layers that the device holds.", rich_help_panel=ADAPTER)
    ] = None
    passphrase: Annotated[
        str | None,
        typer.Option(
            envvar="PRIVATELORA_PASSPHRASE", help="Encrypts the adapter in the local store.", rich_help_panel=ADAPTER
        ),
    ] = None
    ask_passphrase: Annotated[
        bool, typer.Option("--ask-passphrase", help="Ask for the passphrase.", rich_help_panel=ADAPTER)
    ] = False

    def asked(self) -> Common:
        """These options with the passphrase, asked for now if it is to be asked for at all."""
        if not self.ask_passphrase:
            return self
        return replace(self, passphrase=typer.prompt("passphrase", hide_input=True), ask_passphrase=False)

    def session(self) -> DeviceSession:
        """Open the session; raises what makes it impossible."""
        from privatelora.device.session import DeviceSession  # torch takes seconds, which --help does not need

        return DeviceSession(
            self.server,
            token=self.token,
            name=self.name,
            placement=self.placement,
            adapter=self.adapter,
            rank=_rank(self.rank),
            m_kind=self.m_kind,
            m_hidden=self.m_hidden,
            lora_rank=self.lora_rank,
            passphrase=self.asked().passphrase,
            allow_plain=self.allow_plain,
            ca_file=self.ca_file,
            on_wait=say_place,
            on_quota=say_quota,
        )

    @contextmanager
    def control(self) -> Iterator[ControlPlane]:
        """The control plane at the service's URL, with the same token and the same rules of safety."""
        from privatelora.device.control import ControlPlane
        from privatelora.device.service import access

        token, tls = access(self.server, self.token, self.allow_plain, self.ca_file)
        control = ControlPlane(self.server.rstrip("/"), token, TIMEOUT_S, tls if tls is not None else True)
        try:
            yield control
        finally:
            control.close()


def with_common(command: Callable[Concatenate[Common, P], None]) -> Callable[..., None]:
    """Give a command the options of `Common` after its own; its first argument is the `Common` made from them."""
    hints = typing.get_type_hints(Common, include_extras=True)
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(Common)
    ]

    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        given: dict[str, Any] = {f.name: kwargs.pop(f.name) for f in fields(Common)}  # typer has checked their types
        common = Common(**given)
        command(common, *args, **kwargs)

    parameters = [*(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own), *shared]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect reads it from any callable
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def say_place(place: int, waiting: int) -> None:
    """One line on stderr, while a busy service has no room yet."""
    teens = place % 100 in (11, 12, 13)
    ending = "th" if teens else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    print(f"waiting for a place: {place}{ending} of {waiting}", file=sys.stderr, flush=True)


def say_quota(spent: QuotaError) -> None:
    """One line on stderr, before a wait for a quota to reset."""
    from privatelora.device.progress import time_text

    print(f"{spent.message} Waiting {time_text(spent.retry_after_s or 0)}.", file=sys.stderr, flush=True)


def _rank(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    try:
        ranks = [int(part) for part in text.split(",")]
        return ranks[0] if len(ranks) == 1 else (ranks[0], ranks[1])
    except (ValueError, IndexError):
        raise ConfigurationError(f"rank {text!r} cannot be read; write one number, or down,up as in 64,32") from None

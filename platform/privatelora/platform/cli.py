"""`privatelora`: what an operator types. Thin: options become `Settings` or a call, and errors become one line.

up                  `up.run`, which runs the next four           admin       `cli_admin`: users, keys, quotas, jobs
api, worker, beat   the control plane's processes                adapters    `cli_adapters`: sets of A and B as files
backbone            the data plane, `service.serve`              config      every setting and where it came from
demo                `demo.run_demo`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from privatelora.platform.cli_adapters import adapters
from privatelora.platform.cli_admin import admin
from privatelora.platform.cli_options import (
    CONTROL_PANEL,
    MODEL_PANEL,
    OUTPUT_PANEL,
    SESSION_PANEL,
    AliveFile,
    AsJson,
    Certfile,
    DatabaseUrl,
    DataDir,
    Dtype,
    Host,
    Keyfile,
    LogFormat,
    Model,
    Port,
    ValkeyUrl,
)
from privatelora.platform.console import Spinner, columns, print_table
from privatelora.protocol.errors import PrivateLoraError
from privatelora.protocol.placement import NAMES

if TYPE_CHECKING:
    from privatelora.platform.settings import Settings

app = typer.Typer(
    help="Host one frozen language model that many devices personalise without handing over their data.",
    epilog="Start with [bold]privatelora demo[/bold]; then [bold]privatelora up[/bold] here and "
    "[bold]privatelora-device finetune notes.jsonl[/bold] on the device.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # a traceback with locals would print tensors
)
app.add_typer(adapters, name="adapters")
app.add_typer(admin, name="admin")


@app.command(
    epilog="Examples:\n\n  privatelora up\n\n  privatelora up --model ./my-llama --port 9000\n\n"
    "Every other setting is a variable, such as PRIVATELORA_MAX_SESSIONS; see [bold]privatelora config[/bold].",
)
def up(
    model: Model = None,
    dtype: Dtype = None,
    data_dir: DataDir = None,
    host: Host = None,
    port: Port = None,
    database_url: DatabaseUrl = None,
    valkey_url: ValkeyUrl = None,
    log_format: LogFormat = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="When ready, print one JSON line with url, admin_key (of the first start) and token_file.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = False,
) -> None:
    """Start the whole service on this machine: database, Valkey, API, worker, beat and backbone.

    The first start converts the model, computes the adapter sets from public text, about half a minute for the bundled
    model, and prints the first operator's key; later starts take seconds. Ctrl-C stops it.
    """
    from privatelora.platform.embedded import load_settings_here
    from privatelora.platform.up import Ready, run

    settings = load_settings_here(
        {
            "model": model,
            "dtype": dtype,
            "data_dir": data_dir,
            "host": host,
            "port": port,
            "database_url": database_url,
            "valkey_url": valkey_url,
            "log_format": log_format,
        }
    )

    def ready(service: Ready) -> None:
        token_file = str(service.token_file)
        if as_json:
            told = {"url": service.url, "admin_key": service.admin_key, "token_file": token_file}
            print(json.dumps(told), flush=True)
            return
        _announce(
            "[bold]The service is ready.[/bold]",
            {
                "URL": f"[bold green]{service.url}[/bold green]",
                "token file": f"{token_file} (used by devices on this machine)",
                "API": f"{service.url}/openapi.json",
                "try": f"privatelora-device finetune notes.jsonl --server {service.url}",
                "": "privatelora admin list-users",
            },
        )
        if service.admin_key is not None:
            print(f"  admin key   {service.admin_key}\n              Keep it now: it is not shown again.")
        print("Ctrl-C stops it.\n", flush=True)
        _warn_if_plain(settings, service.url)

    run(settings, ready)


@app.command(
    epilog="Examples:\n\n  privatelora backbone --host 0.0.0.0 --certfile cert.pem --keyfile key.pem\n\n"
    "  privatelora backbone --model Qwen/Qwen3-0.6B --default-placement one-trip --placements one-trip,few-trips",
)
def backbone(
    model: Model = None,
    dtype: Dtype = None,
    device: Annotated[
        str | None, typer.Option(help="torch device: cpu, cuda, cuda:1.", rich_help_panel=MODEL_PANEL)
    ] = None,
    torch_threads: Annotated[
        int | None, typer.Option(help="Threads of one matmul.", rich_help_panel=MODEL_PANEL)
    ] = None,
    data_dir: DataDir = None,
    host: Host = None,
    port: Port = None,
    certfile: Certfile = None,
    keyfile: Keyfile = None,
    database_url: DatabaseUrl = None,
    valkey_url: ValkeyUrl = None,
    public_url: Annotated[
        str | None,
        typer.Option(help="URL at which devices reach this backbone.", rich_help_panel=CONTROL_PANEL),
    ] = None,
    placements: Annotated[
        str | None,
        typer.Option(
            help=f"Placements to allow: {', '.join(NAMES)}, custom, or texts such as first=2,last=4.",
            rich_help_panel=SESSION_PANEL,
        ),
    ] = None,
    default_placement: Annotated[
        str | None, typer.Option(help="Placement of sessions that name none.", rich_help_panel=SESSION_PANEL)
    ] = None,
    max_sessions: Annotated[
        int | None, typer.Option(help="Sessions at one time.", rich_help_panel=SESSION_PANEL)
    ] = None,
    max_waiting: Annotated[
        int | None,
        typer.Option(help="Devices that may wait for a session, and passes for memory.", rich_help_panel=SESSION_PANEL),
    ] = None,
    memory_mb: Annotated[
        int | None,
        typer.Option(help="MiB for KV caches and training activations.", rich_help_panel=SESSION_PANEL),
    ] = None,
    kept_layers: Annotated[
        int | None,
        typer.Option(help="Layers whose training activations are kept.", rich_help_panel=SESSION_PANEL),
    ] = None,
    park_after_s: Annotated[
        float | None,
        typer.Option(help="Seconds of silence that give a device's memory to others.", rich_help_panel=SESSION_PANEL),
    ] = None,
    idle_timeout_s: Annotated[
        float | None, typer.Option(help="Seconds of silence that end a session.", rich_help_panel=SESSION_PANEL)
    ] = None,
    drain_s: Annotated[
        float | None,
        typer.Option(help="Seconds that running passes get at a stop.", rich_help_panel=SESSION_PANEL),
    ] = None,
    busy_poll_ms: Annotated[
        float | None,
        typer.Option(help="Milliseconds to stay awake for a device that is fast.", rich_help_panel=SESSION_PANEL),
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning or error.", rich_help_panel=OUTPUT_PANEL)
    ] = None,
    log_format: LogFormat = None,
    as_json: AsJson = False,
) -> None:
    """Serve the data plane alone, with every setting at hand.

    What is not given comes from PRIVATELORA_* variables, then from the defaults.
    """
    _serve(
        {
            "model": model,
            "dtype": dtype,
            "device": device,
            "torch_threads": torch_threads,
            "data_dir": data_dir,
            "host": host,
            "port": port,
            "certfile": certfile,
            "keyfile": keyfile,
            "database_url": database_url,
            "valkey_url": valkey_url,
            "public_url": public_url,
            "placements": placements,
            "default_placement": default_placement,
            "max_sessions": max_sessions,
            "max_waiting": max_waiting,
            "memory_mb": memory_mb,
            "kept_layers": kept_layers,
            "park_after_s": park_after_s,
            "idle_timeout_s": idle_timeout_s,
            "drain_s": drain_s,
            "busy_poll_ms": busy_poll_ms,
            "log_level": log_level,
            "log_format": log_format,
        },
        as_json,
    )


@app.command(
    epilog="Example:\n\n  PRIVATELORA_DATABASE_URL=postgresql://… PRIVATELORA_VALKEY_URL=redis://… privatelora api",
)
def api(
    host: Host = None,
    port: Port = None,
    certfile: Certfile = None,
    keyfile: Keyfile = None,
    database_url: DatabaseUrl = None,
    valkey_url: ValkeyUrl = None,
    data_dir: DataDir = None,
    log_format: LogFormat = None,
    fd: Annotated[int | None, typer.Option(hidden=True, help="A listening socket that was opened for it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Serve the REST API, alone: one process of the control plane, of which there may be many."""
    settings = _settings(
        {
            "host": host,
            "port": port,
            "certfile": certfile,
            "keyfile": keyfile,
            "database_url": database_url,
            "valkey_url": valkey_url,
            "data_dir": data_dir,
            "log_format": log_format,
        }
    )
    from privatelora.platform.api.server import serve
    from privatelora.platform.net import adopted, listening

    with adopted(fd) if fd is not None else listening(settings.host, settings.port) as listener:
        serve(settings, listener, lambda url: _ready("API", as_json, url=url))


@app.command()
def worker(
    database_url: DatabaseUrl = None,
    valkey_url: ValkeyUrl = None,
    data_dir: DataDir = None,
    log_format: LogFormat = None,
    alive_file: AliveFile = None,
    as_json: AsJson = False,
) -> None:
    """Run jobs: one process of the control plane, of which there may be many."""
    settings = _settings(
        {"database_url": database_url, "valkey_url": valkey_url, "data_dir": data_dir, "log_format": log_format}
    )
    from privatelora.platform.queue import run_worker

    run_worker(settings, lambda: _ready("worker", as_json), _toucher(alive_file))


@app.command()
def beat(
    database_url: DatabaseUrl = None,
    valkey_url: ValkeyUrl = None,
    data_dir: DataDir = None,
    log_format: LogFormat = None,
    alive_file: AliveFile = None,
    as_json: AsJson = False,
) -> None:
    """Wake workers by the clock: one process of the control plane, of which there should be one."""
    settings = _settings(
        {"database_url": database_url, "valkey_url": valkey_url, "data_dir": data_dir, "log_format": log_format}
    )
    from privatelora.platform.queue import run_beat

    run_beat(settings, lambda: _ready("beat", as_json), _toucher(alive_file))


@app.command(
    epilog="Examples:\n\n  privatelora demo\n\n  privatelora demo --placement one-trip --output one-trip-out",
)
def demo(
    placement: Annotated[
        str, typer.Option(help=f"Who holds which layer: {', '.join(NAMES)}, or first=2,last=4.")
    ] = "paper",
    model: Annotated[
        str, typer.Option(metavar="SOURCE", help="smollm2, a GGUF file, a directory, a hub name.")
    ] = "smollm2",
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter, down and up.")] = 32,
    m_kind: Annotated[str, typer.Option(help="The device's M: linear or mlp.")] = "linear",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the forty training sequences.")] = 10,
    output: Annotated[Path, typer.Option(help="Folder of report.json, report.html and loss.png.")] = Path("demo-out"),
) -> None:
    """Watch a device teach a remote frozen model ten private facts that the service never sees.

    Starts a service of its own on a free port, fine-tunes over the real socket, asks ten questions before and after,
    and stops everything that it started. Under three minutes on two cores.
    """
    from privatelora.platform.demo import DemoOptions, run_demo

    run_demo(DemoOptions(placement, model, rank, m_kind, epochs, output), Console())


@app.command()
def config(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print every setting, its value and where it came from."""
    from privatelora.platform.settings import load_settings, origins, unknown_variables

    found = origins(load_settings())
    if as_json:
        print(json.dumps({one.name: {"value": one.value, "source": one.source} for one in found}, indent=2))
    else:
        table = columns("setting", "value", "from", "meaning")
        for one in found:
            table.add_row(one.name, one.value, one.source, one.description)
        print_table(table)
    for name in unknown_variables():
        Console(stderr=True).print(
            f"[yellow]{name} is set, but nothing reads it; is it misspelt?[/yellow]", highlight=False
        )


def main() -> None:
    """The `privatelora` script: one line and exit status 2 for every error of the tree."""
    try:
        app()
    except PrivateLoraError as error:
        Console(stderr=True).print(
            f"error: {error.message}", style="red", highlight=False, markup=False, soft_wrap=True
        )
        sys.exit(2)


def _settings(options: dict[str, Any]) -> Settings:
    """Settings of a process of the control plane, whose log is set up by them."""
    from privatelora.platform.logs import configure_logging
    from privatelora.platform.settings import load_settings

    settings = load_settings(options)
    configure_logging(settings.log_level, settings.log_format)
    return settings


def _serve(options: dict[str, Any], as_json: bool) -> None:
    from privatelora.platform.settings import load_settings

    settings = load_settings(options)
    # torch and the service take seconds to import, which --help and a wrong option do not wait for
    from privatelora.platform.logs import configure_logging
    from privatelora.platform.service import Ready, serve

    configure_logging(settings.log_level, settings.log_format)
    progress = Spinner(Console(stderr=True))

    def ready(service: Ready) -> None:
        progress.stop()
        if as_json:
            print(
                json.dumps({"url": service.url, "token_file": str(service.token_file) if service.token_file else None}),
                flush=True,
            )
            return
        _announce(
            f"[bold]{service.model}[/bold] is served: {service.layers} frozen layers, {service.dtype}",
            {
                "URL": f"[bold green]{service.url}[/bold green]",
                "token file": str(service.token_file or "none: the control plane knows the keys"),
                "placement": f"{service.default_placement} unless a session names another",
                "try": f"privatelora-device finetune notes.jsonl --server {service.url}",
            },
        )
        print("Ctrl-C stops it.\n", flush=True)
        _warn_if_plain(settings, service.url)

    with progress:
        serve(settings, progress, ready)


def _announce(title: str, rows: dict[str, str]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"\n{title}")
    for name, value in rows.items():
        console.print(f"  {name:<11} {value}")


def _warn_if_plain(settings: Settings, url: str) -> None:
    if url.startswith("http:") and settings.host not in ("127.0.0.1", "::1", "localhost"):
        Console(highlight=False, soft_wrap=True).print(
            "[yellow]This address is open to other machines without TLS: the network can read tokens and "
            "activations. Set --certfile and --keyfile, or put a TLS proxy in front.[/yellow]"
        )


def _toucher(path: Path | None) -> Callable[[], None]:
    return path.touch if path is not None else lambda: None


def _ready(name: str, as_json: bool, **more: str) -> None:
    """Say that a process of the control plane does its work: one line on stdout."""
    if as_json:
        print(json.dumps({"ready": name.lower(), **more}), flush=True)
    else:
        print(" ".join([f"the {name} is ready", *more.values()]), flush=True)

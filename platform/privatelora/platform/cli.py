"""`privatelora`: what an operator types. Thin: options become `Settings` or a call, and errors become one line.

up, backbone    `service.serve` in this process            config      every setting and where it came from
demo            `demo.run_demo`                            adapters    the published sets of A and B, as files
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from privatelora.platform.console import Spinner, columns, print_table
from privatelora.protocol.errors import PrivateLoraError
from privatelora.protocol.placement import NAMES

if TYPE_CHECKING:
    from privatelora.platform.settings import Settings

MODEL_PANEL, ADDRESS_PANEL, SESSION_PANEL, OUTPUT_PANEL = "Model", "Address", "Sessions", "Output"
CONTROL_PANEL = "Control plane"

app = typer.Typer(
    help="Host one frozen language model that many devices personalise without handing over their data.",
    epilog="Start with [bold]privatelora demo[/bold]; then [bold]privatelora up[/bold] here and "
    "[bold]privatelora-device finetune notes.jsonl[/bold] on the device.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # a traceback with locals would print tensors
)
adapters = typer.Typer(
    help="The published sets of frozen A and B that every device's M works between.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(adapters, name="adapters")

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="SOURCE",
        help="[bold]smollm2[/bold] (bundled), a GGUF file, a model directory or a hub name.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.", rich_help_panel=MODEL_PANEL)
]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Folder of models, adapter sets and the token.", rich_help_panel=MODEL_PANEL),
]
Host = Annotated[
    str | None,
    typer.Option("--host", help="Address to listen on; this machine only unless set.", rich_help_panel=ADDRESS_PANEL),
]
Port = Annotated[
    int | None, typer.Option("--port", help="Port, 8765 unless set; 0 takes a free one.", rich_help_panel=ADDRESS_PANEL)
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(help="postgresql://user@host/name or sqlite:////file.", rich_help_panel=CONTROL_PANEL),
]
ValkeyUrl = Annotated[
    str | None, typer.Option(help="redis://host:port of a Valkey or Redis.", rich_help_panel=CONTROL_PANEL)
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json", help="When ready, print one JSON line with url and token_file.", rich_help_panel=OUTPUT_PANEL
    ),
]


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
    as_json: AsJson = False,
) -> None:
    """Start everything embedded in this process, with defaults that need no other server.

    The first start converts the model and computes the adapter sets from public text, about half a minute for the
    bundled model; later starts take seconds. Ctrl-C stops it.
    """
    _serve({"model": model, "dtype": dtype, "data_dir": data_dir, "host": host, "port": port}, as_json)


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
    certfile: Annotated[
        Path | None, typer.Option(help="TLS certificate chain (PEM).", rich_help_panel=ADDRESS_PANEL)
    ] = None,
    keyfile: Annotated[Path | None, typer.Option(help="TLS private key (PEM).", rich_help_panel=ADDRESS_PANEL)] = None,
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
    log_format: Annotated[str | None, typer.Option(help="console or json.", rich_help_panel=OUTPUT_PANEL)] = None,
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


@app.command()
def worker(database_url: DatabaseUrl = None, valkey_url: ValkeyUrl = None, data_dir: DataDir = None) -> None:
    """Run jobs: one process of the control plane, of which there may be many."""
    settings = _settings({"database_url": database_url, "valkey_url": valkey_url, "data_dir": data_dir})
    from privatelora.platform.queue import run_worker

    run_worker(settings, lambda: print(json.dumps({"ready": "worker"}), flush=True))


@app.command()
def beat(database_url: DatabaseUrl = None, valkey_url: ValkeyUrl = None) -> None:
    """Wake workers by the clock: one process of the control plane, of which there should be one."""
    settings = _settings({"database_url": database_url, "valkey_url": valkey_url})
    from privatelora.platform.queue import run_beat

    run_beat(settings, lambda: print(json.dumps({"ready": "beat"}), flush=True))


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


@adapters.command("list")
def list_sets(data_dir: DataDir = None) -> None:
    """List the sets that this service has published; the newest of a kind is the one that new sessions get."""
    from privatelora.cloud.sets import SetStore
    from privatelora.platform.settings import load_settings

    directory = load_settings({"data_dir": data_dir}).data_dir / "sets"
    infos = SetStore(directory).list() if directory.is_dir() else []
    if not infos:
        print(f"no set is published in {directory}; the first start of `privatelora up` makes them")
        return
    newest = {(info.model_hash, info.kind): info.sha256 for info in infos}
    table = columns("set", "kind", "ranks up to", "size", "model", "")
    for info in infos:
        default = "default" if newest[info.model_hash, info.kind] == info.sha256 else ""
        ranks = f"{info.max_rank_down} down, {info.max_rank_up} up"
        table.add_row(info.sha256[:16], info.kind, ranks, f"{info.nbytes / 1e6:.1f} MB", info.model_hash[:16], default)
    print_table(table)


@adapters.command("export", epilog="Example:\n\n  privatelora adapters export 3f9a01 ./backup/")
def export_set(
    set_hash: Annotated[str, typer.Argument(metavar="HASH", help="The set's hash, or its beginning.")],
    target: Annotated[Path, typer.Argument(help="File to write, or a folder.")],
    data_dir: DataDir = None,
) -> None:
    """Copy a published set to a file, for another service of the same model."""
    from privatelora.cloud.sets import SetStore
    from privatelora.platform.settings import load_settings

    print(SetStore(load_settings({"data_dir": data_dir}).data_dir / "sets").export(set_hash, target))


@adapters.command("import", epilog="Example:\n\n  privatelora adapters import ./backup/3f9a01….safetensors")
def import_set(
    source: Annotated[Path, typer.Argument(help="File that `adapters export` wrote.")],
    model: Model = None,
    dtype: Dtype = None,
    data_dir: DataDir = None,
) -> None:
    """Publish an exported set here, after checking that it is whole and made for this service's model.

    A service that is running announces it at once, and existing adapters that name it work again.
    """
    import torch

    from privatelora.cloud.sets import SetStore
    from privatelora.decoder.publish import publish_model
    from privatelora.platform.models import source_of
    from privatelora.platform.settings import load_settings

    settings = load_settings({"model": model, "dtype": dtype, "data_dir": data_dir})
    with Spinner(Console(stderr=True)) as progress:
        parts = publish_model(source_of(settings.model), settings.data_dir, getattr(torch, settings.dtype), progress)
    info = SetStore(settings.data_dir / "sets").add_file(source, parts.config, parts.model_hash)
    print(f"{info.sha256} ({info.kind}, ranks up to {info.max_rank_down} down and {info.max_rank_up} up)")


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
        rows = {
            "URL": f"[bold green]{service.url}[/bold green]",
            "token file": str(service.token_file or "-"),
            "placement": f"{service.default_placement} unless a session names another",
            "try": f"privatelora-device finetune notes.jsonl --server {service.url}",
        }
        console = Console(highlight=False, soft_wrap=True)
        console.print(f"\n[bold]{service.model}[/bold] is served: {service.layers} frozen layers, {service.dtype}")
        for name, value in rows.items():
            console.print(f"  {name:<11} {value}")
        console.print("Ctrl-C stops it.\n")
        if service.url.startswith("http:") and settings.host not in ("127.0.0.1", "::1", "localhost"):
            console.print(
                "[yellow]This address is open to other machines without TLS: the network can read tokens and "
                "activations. Set --certfile and --keyfile, or put a TLS proxy in front.[/yellow]"
            )

    with progress:
        serve(settings, progress, ready)

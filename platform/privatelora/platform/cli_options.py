"""Options that several commands of `privatelora` have, each worded once; they become fields of `Settings`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL_PANEL, ADDRESS_PANEL, SESSION_PANEL, OUTPUT_PANEL = "Model", "Address", "Sessions", "Output"
CONTROL_PANEL = "Control plane"

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
Certfile = Annotated[
    Path | None, typer.Option("--certfile", help="TLS certificate chain (PEM).", rich_help_panel=ADDRESS_PANEL)
]
Keyfile = Annotated[
    Path | None, typer.Option("--keyfile", help="TLS private key (PEM).", rich_help_panel=ADDRESS_PANEL)
]
LogFormat = Annotated[str | None, typer.Option("--log-format", help="console or json.", rich_help_panel=OUTPUT_PANEL)]
AliveFile = Annotated[
    Path | None,
    typer.Option(help="Touched every few seconds while it can work, for a health check.", rich_help_panel=OUTPUT_PANEL),
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json", help="When ready, print one JSON line with url and token_file.", rich_help_panel=OUTPUT_PANEL
    ),
]

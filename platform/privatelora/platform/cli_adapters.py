"""`privatelora adapters`: the published sets of A and B, as files that move between services of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from privatelora.platform.cli_options import DataDir, Dtype, Model
from privatelora.platform.console import Spinner, columns, print_table

adapters = typer.Typer(
    help="The published sets of frozen A and B that every device's M works between.",
    no_args_is_help=True,
    rich_markup_mode="rich",
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

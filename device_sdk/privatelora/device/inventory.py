"""What a session consists of: `Inventory`, shown by `privatelora-device info`.

From: the service's announcement, the session's settings and the files on this device. To: a terminal, or JSON. It tells
apart what is held here from what crosses the wire, in bytes per token by the formula of `protocol.accounting`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from privatelora.device.progress import size_text
from privatelora.protocol.accounting import Traffic, backward_traffic, forward_traffic

if TYPE_CHECKING:
    from privatelora.device.session import DeviceSession

MEANINGS = {
    "prompt_token": "a token of a prompt",
    "generated_token": "a generated token",
    "training_token": "a token of training, with a label",
}


@dataclass(frozen=True)
class Inventory:
    """Service, adapter, what is held locally (bytes by part), and the wire's bytes per token (up, down by kind)."""

    service: dict[str, Any]
    adapter: dict[str, Any]
    held_here: dict[str, int]
    wire_bytes: dict[str, Traffic]
    round_trips_per_token: int

    @classmethod
    def of(cls, me: DeviceSession) -> Inventory:
        """Take stock of an open session."""
        info, model, spec = me.service.info, me.service.info.model, me.settings.spec
        stored = me.store.path.is_file()
        inline = bool(me.placement.inline)
        return cls(
            service={
                "url": me.service.base_url,
                "encrypted": me.service.tls is not None,
                "protocol": info.protocol_version,
                "model": model.name,
                "model_hash": model.sha256,
                "layers": model.shape.layers,
                "hidden_size": model.shape.hidden,
                "dtype": model.dtype,
                "context_length": model.context_length,
                "placements": info.placements,
                "default_placement": info.default_placement,
                "sets": {found.sha256: found.kind for found in info.sets},
            },
            adapter={
                "file": str(me.store.path),
                "saved": stored,
                "saved_bytes": me.store.path.stat().st_size if stored else 0,
                "steps_of_last_finetune": int(me.progress.get("step", 0)),
                "last_finetune_finished": bool(me.progress.get("finished", False)),
                "placement": me.placement.describe(model.shape.layers),
                "parameters": me.adapter.count(),
                "set": me.identity.set_hash,
                **({"kind": spec.kind, "rank_down": spec.rank_down, "rank_up": spec.rank_up} if inline else {}),
                **({"m_kind": me.settings.m_kind} if inline else {}),
            },
            held_here=_held(me),
            wire_bytes=_wire(me),
            round_trips_per_token=me.placement.round_trips,
        )

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON; sizes in bytes."""
        return asdict(self)

    def show(self, console: Console) -> None:
        """Print four short sections."""
        service, adapter = self.service, self.adapter
        _section(
            console,
            "Service",
            {
                "URL": service["url"] + (" (TLS)" if service["encrypted"] else " (plain)"),
                "model": f"{service['model']}, {service['dtype']}",
                "shape": f"{service['layers']} layers of width {service['hidden_size']}",
                "context": f"{service['context_length']} tokens",
                "placements": f"{', '.join(service['placements'])} (default {service['default_placement']})",
                "adapter sets": ", ".join(f"{sha[:12]} {kind}" for sha, kind in service["sets"].items()),
            },
        )
        rows = {"file": adapter["file"] if adapter["saved"] else f"{adapter['file']} (not written yet)"}
        if adapter["saved"]:
            end = "finished" if adapter["last_finetune_finished"] else "cut off, --resume goes on"
            rows["last fine-tune"] = f"{adapter['steps_of_last_finetune']} steps, {end}"
        rows["placement"] = adapter["placement"]
        if "kind" in adapter:
            rows["inline"] = (
                f"{adapter['kind']} set {adapter['set'][:12]}, rank {adapter['rank_down']} down and "
                f"{adapter['rank_up']} up, {adapter['m_kind']} M"
            )
        rows["trainable"] = f"{adapter['parameters']:,} numbers"
        _section(console, "Adapter", rows)
        held = {part: size_text(nbytes) for part, nbytes in self.held_here.items()}
        _section(
            console, "Held on this device, and sent to nobody", held | {"": "your text, tokens, logits and losses"}
        )
        wire = {
            MEANINGS[name]: f"{size_text(traffic.up)} up, {size_text(traffic.down)} down"
            for name, traffic in self.wire_bytes.items()
        }
        _section(console, "Crosses the wire", wire | {"round trips a token": str(self.round_trips_per_token)})
        console.print(
            "Activations are not encrypted against the service: its operator can reconstruct text from them.",
            style="yellow",
            soft_wrap=True,
        )


def _held(me: DeviceSession) -> dict[str, int]:
    """Bytes of what this device has in memory or in its cache, by part."""
    parts, shape = me.service.info.model.parts, me.service.info.model.shape
    own = [*me.model.first, *me.model.last]
    held = {
        "embedding, also the head" if me.config.tied_head else "embedding": parts["embedding"].nbytes,
        "final norm" if me.config.tied_head else "final norm and head": parts["final"].nbytes,
        "tokenizer": sum(blob.nbytes for name, blob in parts.items() if name.startswith("tokenizer")),
    }
    if own:
        held[f"{len(own)} of {shape.layers} layers"] = sum(parts[f"layer.{l}"].nbytes for l in own)
    adapter = sum(parameter.nbytes for parameter in me.adapter.parameters())
    return held | {"adapter (M, LoRA)": adapter, "optimizer state while it trains": 2 * adapter}


def _wire(me: DeviceSession) -> dict[str, Traffic]:
    shape, spec, dtype = me.service.info.model.shape, me.settings.spec, me.remote.wire_dtype
    return {
        "prompt_token": forward_traffic(shape, me.placement, spec, 1, 0, dtype),
        "generated_token": forward_traffic(shape, me.placement, spec, 1, 1, dtype),
        "training_token": forward_traffic(shape, me.placement, spec, 1, 1, dtype)
        + backward_traffic(shape, me.placement, spec, 1, 1, dtype),
    }


def _section(console: Console, title: str, rows: dict[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(f"  {name}", value)
    console.print(f"[bold]{title}[/bold]")
    console.print(table)
    console.print()

"""Which placement, set and adapter a session uses: what its owner asked for, what is stored, what the service offers.

`DeviceSession` collects its arguments in `Options`; `resolve` settles each one, in that order of precedence, and
refuses what the service does not offer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from privatelora.device.adapters import AdapterSettings
from privatelora.device.state import Identity
from privatelora.protocol.adapter import AdapterSpec
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.errors import ConfigurationError, IncompatibleError
from privatelora.protocol.messages import ServiceInfo
from privatelora.protocol.placement import Placement

DEFAULTS = AdapterSettings()


@dataclass(frozen=True)
class Options:
    """What the owner asked for; None leaves it to the saved adapter, and then to the service's or our default."""

    placement: str | Placement | None = None
    adapter: str | None = None
    rank: int | tuple[int, int] | None = None
    m_kind: str | None = None
    m_hidden: int | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    seed: int | None = None
    wire_dtype: str | None = None


@dataclass(frozen=True)
class Resolved:
    identity: Identity
    wire_dtype: WireDtype


def resolve(options: Options, info: ServiceInfo, saved: Identity | None) -> Resolved:
    """Settle every option; raises `ConfigurationError` or `IncompatibleError` where that cannot be."""
    if saved is not None and saved.model_hash != info.model.sha256:
        raise IncompatibleError(
            f"the saved adapter belongs to model {saved.model_hash[:12]}, and this service hosts "
            f"{info.model.sha256[:12]} ({info.model.name}); connect to the other service, or start a new "
            "adapter under another name="
        )
    depth = info.model.shape.layers
    placement = options.placement or (saved.placement if saved else info.default_placement)
    if isinstance(placement, str):
        placement = Placement.parse(placement, depth)
    name = placement.check(depth).describe(depth)
    if "custom" not in info.placements and name not in info.placements:
        raise ConfigurationError(f"placement {name} is not allowed here; use one of {', '.join(info.placements)}")

    base = saved.settings if saved else DEFAULTS
    kind = options.adapter or base.spec.kind
    own = {"m_kind", "m_hidden", "lora_rank", "lora_alpha", "seed"}
    asked = {name: value for name in own if (value := getattr(options, name)) is not None}
    ranks = (options.rank, options.rank) if isinstance(options.rank, int) else options.rank
    keeps_set = saved is not None and saved.settings.spec.kind == kind and saved.set_hash is not None
    set_hash = saved.set_hash if saved is not None and keeps_set else info.default_sets.get(kind)
    offered = next((found for found in info.sets if found.sha256 == set_hash), None)
    if ranks is None and saved is None and offered is not None:  # a small model's set may not reach our default
        ranks = min(base.spec.rank_down, offered.max_rank_down), min(base.spec.rank_up, offered.max_rank_up)
    spec = AdapterSpec(kind, *(ranks or (base.spec.rank_down, base.spec.rank_up)))
    settings = replace(base, spec=spec, **asked)
    identity = Identity(info.model.sha256, set_hash if placement.inline else None, placement, settings)
    if saved is not None:
        identity.require(saved)
    if placement.inline:
        _check_set(identity, info)
    return Resolved(identity, WireDtype.named(options.wire_dtype or info.model.dtype))


def _check_set(identity: Identity, info: ServiceInfo) -> None:
    spec = identity.settings.spec
    offered = next((found for found in info.sets if found.sha256 == identity.set_hash), None)
    if offered is None:
        known = ", ".join(f"{found.sha256[:12]} ({found.kind})" for found in info.sets) or "none"
        raise IncompatibleError(
            f"adapter set {(identity.set_hash or spec.kind)[:12]} is not published by this service (published: "
            f"{known}); ask its operator to import it, or start a new adapter under another name="
        )
    if spec.rank_down > offered.max_rank_down or spec.rank_up > offered.max_rank_up:
        raise ConfigurationError(
            f"rank {spec.rank_down} down and {spec.rank_up} up were asked for; this set has up to "
            f"{offered.max_rank_down} and {offered.max_rank_up}"
        )

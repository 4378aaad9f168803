"""The adapter in PEFT's format, so that its owner can use it with the whole model anywhere.

A linear M between frozen A and B is a LoRA of each projection: lora_A = A, lora_B = (M_p B_p)^T, with alpha = r. The
LoRA of device-held layers already is one. Layers of both kinds go into one adapter, each with its own rank and alpha.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from privatelora.device.adapters import LayerLora, LinearM
from privatelora.protocol.adapter import PROJECTIONS
from privatelora.protocol.errors import ConfigurationError, StoreError
from privatelora.protocol.messages import Blob

if TYPE_CHECKING:
    from privatelora.device.session import DeviceSession

MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

Pairs = dict[str, tuple[Tensor, Tensor]]
"""module name, from `model.layers` on -> lora_A (r, in), lora_B (out, r) with alpha = r"""


def export_peft(session: DeviceSession, directory: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` (float32) into `directory`.

    Raises
    ------
    ConfigurationError : M is not linear, so that no LoRA equals it.
    StoreError : the files cannot be written.
    """
    kind = session.settings.m_kind
    if session.placement.inline and kind != "linear":
        raise ConfigurationError(
            f"an {kind!r} M is not linear, so no LoRA equals it and PEFT has no format for it; train with "
            "m_kind='linear' to export, or keep this adapter with save()"
        )
    pairs = _inline_pairs(session) | _device_pairs(session)
    if not pairs:
        raise ConfigurationError("this placement trains nothing, so there is nothing to export")
    ranks = {module: a.shape[0] for module, (a, _) in pairs.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": session.service.info.model.name,
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted(pairs),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.float().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.float().contiguous()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise StoreError(f"{directory} cannot take the exported adapter ({error}); choose another place") from None


def _inline_pairs(session: DeviceSession) -> Pairs:
    """M between the downloaded A and B, as LoRA of q, k and v."""
    if not session.placement.inline:
        return {}
    info = session.service.info
    published = next(found for found in info.sets if found.sha256 == session.identity.set_hash)
    blob = Blob(sha256=published.sha256, nbytes=published.nbytes)
    spec, pairs = session.settings.spec, Pairs()
    with safe_open(session.service.download(blob), framework="pt") as file, torch.no_grad():
        for l in session.placement.inline:
            m = session.adapter.m[str(l)]
            assert isinstance(m, LinearM)
            encoders = file.get_tensor(f"layer.{l}.a")[:, : spec.rank_down]  # (E, r_down, d)
            maps = m.weight.view(spec.encoders, spec.rank_down, -1, spec.rank_up)  # (E, r_down, 3/E, r_up)
            for p, name in enumerate(PROJECTIONS):
                encoder, map_ = (encoders[p], maps[p, :, 0]) if spec.encoders > 1 else (encoders[0], maps[0, :, p])
                b = file.get_tensor(f"layer.{l}.b.{name}")[: spec.rank_up]  # (r_up, d_p)
                # a copy each: safetensors refuses tensors that share memory
                pairs[_module(l, name)] = encoder.clone(), (map_ @ b).T  # (r_down, d), (d_p, r_down)
    return pairs


def _device_pairs(session: DeviceSession) -> Pairs:
    """LoRA of the device-held layers, its scale moved into B so that alpha = r."""
    pairs = Pairs()
    with torch.no_grad():
        for l, lora in session.adapter.lora.items():
            assert isinstance(lora, LayerLora)
            pairs |= {_module(int(l), name): (a.clone(), b.clone()) for name, (a, b) in lora.weights().items()}
    return pairs


def _module(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{MODULES[name]}"

"""Frozen weights in parts, as a service publishes them and a device downloads them.

`publish.publish_model` writes a directory of parts and a manifest; `open_parts` reads the manifest, and `load_layer`,
`load_embedding` and `load_final` read single parts, on the service all of the cloud's layers, on the device its own
layers, the embedding and the head. `layer.py` computes with the `LayerWeights`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from privatelora.decoder.checkpoint import layer_tensors
from privatelora.decoder.config import ModelConfig, load_config
from privatelora.decoder.linear import Linear
from privatelora.protocol.errors import ConfigurationError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1

CONFIG = "config.json"
EMBEDDING = "embedding"
FINAL = "final"
LAYER = "layer.{}"
_LINEARS, _NORMS = ("qkv", "o", "gate_up", "down"), ("input_norm", "q_norm", "k_norm", "post_norm")


@dataclass(frozen=True)
class LayerWeights:
    """Frozen weights of one decoder layer; q | k | v and gate | up are fused by rows, so that each pair is one matmul.

    d hidden, q and kv the query's and key's widths, m the MLP's; None where the family has no such norm.
    """

    input_norm: Tensor  # (d,)
    qkv: Linear  # d to q + 2 kv
    q_norm: Tensor | None  # (head_dim,)
    k_norm: Tensor | None  # (head_dim,)
    o: Linear  # q to d
    post_norm: Tensor  # (d,)
    gate_up: Linear  # d to 2 m
    down: Linear  # m to d

    def projections(self) -> dict[str, Tensor]:
        """Views of the seven linears' weights, each (out, in), under the names that LoRA and its export use."""
        o, down = self.o.weight, self.down.weight
        q_size = o.shape[1]
        kv_size = (len(self.qkv.weight) - q_size) // 2
        q, k, v = torch.split(self.qkv.weight, [q_size, kv_size, kv_size])
        gate, up = self.gate_up.weight.chunk(2)
        return {"q": q, "k": k, "v": v, "o": o, "gate": gate, "up": up, "down": down}


@dataclass(frozen=True)
class Part:
    """One file of a published model: `sha256` of its bytes in hex, `nbytes` its size, `path` where it lies here."""

    name: str
    sha256: str
    nbytes: int
    path: Path


@dataclass(frozen=True)
class ModelParts:
    """A published model on disk.

    Parameters
    ----------
    directory : where the parts lie; transformers' tokenizer and config loaders read it as it is.
    model_hash : sha256 in hex over the source's weights and config, the same for every dtype and path.
    parts : `config.json`, `tokenizer.json` and other tokenizer files by file name; `embedding` (`weight`), `final`
        (`norm`, and `head` unless tied) and `layer.0` ... (what `LayerWeights` is made of), each one safetensors file.
    """

    directory: Path
    model_hash: str
    config: ModelConfig
    name: str
    dtype: torch.dtype
    parts: dict[str, Part]


def open_parts(directory: Path) -> ModelParts:
    """Read a published model's manifest and config, and check that every part is there at its full size.

    Raises `ConfigurationError` where it is not a whole published model of this version's form.
    """
    path = directory / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != MANIFEST_FORMAT:
            raise ConfigurationError(f"{path} has the form {manifest['format']}, not {MANIFEST_FORMAT}; publish again")
        parts = {
            name: Part(name, entry["sha256"], entry["nbytes"], directory / entry["file"])
            for name, entry in manifest["parts"].items()
        }
        model_hash, model_name, dtype = manifest["model_hash"], manifest["name"], DTYPES[manifest["dtype"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{path} is not the manifest of a published model ({error!r}); publish again"
        ) from error
    for part in parts.values():
        if not part.path.is_file() or part.path.stat().st_size != part.nbytes:
            raise ConfigurationError(f"part {part.path} is missing or not of {part.nbytes} bytes; publish again")
    return ModelParts(directory, model_hash, load_config(directory / CONFIG), model_name, dtype, parts)


def load_layer(part: Path | Part, config: ModelConfig, device: torch.device | str = "cpu") -> LayerWeights:
    """Read a layer part; on the CPU the tensors are a memory map of the file, shared by all processes that read it, and
    each `Linear` has a packed copy besides.

    Raises `ConfigurationError` naming the tensor that is missing or of another shape than the config's.
    """
    tensors = _load(part, layer_shapes(config), device)
    linears: dict[str, Any] = {n: Linear(tensors.pop(n), tensors.pop(f"{n}_bias", None)) for n in _LINEARS}
    norms: dict[str, Any] = {name: tensors.get(name) for name in _NORMS}  # `_load` has checked which of them are there
    return LayerWeights(**linears, **norms)


def load_embedding(part: Path | Part, config: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """Read the embedding part: (vocab, d)."""
    return _load(part, embedding_shapes(config), device)["weight"]


def load_final(
    part: Path | Part, config: ModelConfig, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor | None]:
    """Read the final part: the norm (d,) and the LM head (vocab, d), None where it is the embedding."""
    tensors = _load(part, final_shapes(config), device)
    return tensors["norm"], tensors.get("head")


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a layer part."""
    shapes = {}
    for name, rows in layer_tensors(config).items():
        first, *_ = rows.values()
        shapes[name] = (sum(shape[0] for shape in rows.values()), *first[1:])
    return shapes


def embedding_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the embedding part."""
    return {"weight": (config.vocab_size, config.hidden_size)}


def final_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the final part."""
    shapes: dict[str, tuple[int, ...]] = {"norm": (config.hidden_size,)}
    if not config.tied_head:
        shapes["head"] = (config.vocab_size, config.hidden_size)
    return shapes


def _load(part: Path | Part, shapes: dict[str, tuple[int, ...]], device: torch.device | str) -> dict[str, Tensor]:
    path = part.path if isinstance(part, Part) else part
    try:
        tensors = load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(
            f"cannot read the weights in {path}: {error}; delete the file, to have it made again"
        ) from error
    for name in sorted(shapes.keys() | tensors.keys()):
        found = tuple(tensors[name].shape) if name in tensors else "absent"
        if found != shapes.get(name, "absent"):
            raise ConfigurationError(
                f"tensor {name} in {path} has shape {found}, but the config asks for {shapes.get(name, 'absent')}; "
                "delete the file, to have it made again, or use the config that it was published with"
            )
    return tensors

"""The frozen model as the service holds it: layers, rotary tables and adapter sets, once per process.

`Backbone.load` publishes a model's parts and, at the first start, its adapter sets; sessions take their view of it
(`inline_weights`), and the endpoint announces it (`model_info`, `blobs`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer

from privatelora.cloud.calibrate import calibrated_set
from privatelora.cloud.sets import SetStore, load_set, random_set
from privatelora.decoder import kernels
from privatelora.decoder.config import ModelConfig
from privatelora.decoder.layer import InlineWeights
from privatelora.decoder.publish import publish_model
from privatelora.decoder.rotary import RotaryTables
from privatelora.decoder.weights import LayerWeights, ModelParts, load_embedding, load_final, load_layer
from privatelora.protocol.adapter import KINDS, PROJECTIONS, AdapterSpec, ModelShape
from privatelora.protocol.errors import ConfigurationError, IncompatibleError
from privatelora.protocol.messages import Blob, ModelInfo, SetInfo

MAX_RANK = 128
KEPT_CUTS = 8  # combinations of set and ranks held at once
RANDOM_SEED = 2311  # any; the set's hash is what names it


@dataclass
class Backbone:
    """One frozen model and its published sets."""

    parts: ModelParts
    layers: Mapping[int, LayerWeights]
    tables: RotaryTables
    sets: SetStore
    device: torch.device
    _cut: dict[tuple[str, AdapterSpec], dict[int, InlineWeights]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def load(
        cls,
        source: str | Path,
        data_dir: Path,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
        progress: Callable[[str], None] = lambda text: None,
    ) -> Backbone:
        """Load a model (GGUF file, directory or hub name), making its parts and its sets at the first start."""
        parts = publish_model(source, data_dir, dtype, progress)
        target = torch.device(device)
        layers = {
            l: load_layer(parts.parts[f"layer.{l}"], parts.config, device) for l in range(parts.config.num_layers)
        }
        sets = SetStore(data_dir / "sets")
        _make_missing_sets(parts, layers, sets, progress)
        return cls(parts, layers, RotaryTables(parts.config, dtype=dtype, device=target), sets, target)

    @property
    def config(self) -> ModelConfig:
        return self.parts.config

    @property
    def dtype(self) -> torch.dtype:
        return self.parts.dtype

    @property
    def model_info(self) -> ModelInfo:
        parts = self.parts
        return ModelInfo(
            name=parts.name,
            sha256=parts.model_hash,
            dtype=str(parts.dtype).removeprefix("torch."),
            shape=model_shape(parts.config),
            context_length=parts.config.context_length,
            parts={name: Blob(sha256=part.sha256, nbytes=part.nbytes) for name, part in parts.parts.items()},
        )

    def set_infos(self) -> list[SetInfo]:
        return self.sets.list(self.parts.model_hash)

    @property
    def default_sets(self) -> dict[str, str]:
        """The newest published set of each kind: what new adapters get."""
        newest = {info.kind: info.sha256 for info in self.set_infos()}
        return {kind: newest[kind] for kind in KINDS}

    def blob_path(self, sha256: str) -> Path | None:
        """File of a downloadable part or set, None for a hash that is not published."""
        for part in self.parts.parts.values():
            if part.sha256 == sha256:
                return part.path
        return next((self.sets.path(info.sha256) for info in self.set_infos() if info.sha256 == sha256), None)

    def inline_weights(self, set_hash: str, spec: AdapterSpec) -> dict[int, InlineWeights]:
        """A and B of a published set at a session's ranks, shared by all sessions that ask for the same."""
        with self._lock:
            found = self._cut.pop((set_hash, spec), None) or self._cut_to(set_hash, spec)
            while len(self._cut) >= KEPT_CUTS:
                self._cut.pop(next(iter(self._cut)))  # the least recently asked for; its sessions keep it alive
            self._cut[set_hash, spec] = found
            return found

    def _cut_to(self, set_hash: str, spec: AdapterSpec) -> dict[int, InlineWeights]:
        path = self.sets.path(set_hash)
        info = next(info for info in self.sets.list() if info.sha256 == set_hash)
        if info.model_hash != self.parts.model_hash:
            raise IncompatibleError(
                f"adapter set {set_hash[:12]} was made for model {info.model_hash[:12]}, this service hosts "
                f"{self.parts.model_hash[:12]}; connect to the other service, or start a new adapter"
            )
        if info.kind != spec.kind or spec.rank_down > info.max_rank_down or spec.rank_up > info.max_rank_up:
            raise ConfigurationError(
                f"adapter set {set_hash[:12]} is {info.kind} with ranks up to {info.max_rank_down} down and "
                f"{info.max_rank_up} up; {spec.kind} with {spec.rank_down} and {spec.rank_up} was asked for"
            )
        cut = {}
        for l, layer in load_set(path, range(self.config.num_layers)).items():
            a = layer.a[:, : spec.rank_down].transpose(0, 1).reshape(-1, self.config.hidden_size)  # (r*E, d)
            b = torch.cat([layer.b[name][: spec.rank_up].T for name in PROJECTIONS])  # (q+k+v, r)
            a, b = a.to(self.device, self.dtype), b.to(self.device, self.dtype)
            packs = kernels.can_add_delta(b, self.config.q_size, self.config.kv_size)
            cut[l] = InlineWeights(a, b, spec.encoders, kernels.pack_b(b) if packs else None)
        return cut


def model_shape(config: ModelConfig) -> ModelShape:
    """The sizes that the wire depends on."""
    return ModelShape(
        hidden=config.hidden_size, layers=config.num_layers, q=config.q_size, k=config.kv_size, v=config.kv_size
    )


def calibrate(
    parts: ModelParts,
    layers: Mapping[int, LayerWeights],
    sets: SetStore,
    progress: Callable[[str], None],
    max_rank: int = MAX_RANK,
    seed: int = 0,
) -> SetInfo:
    """Make and publish a calibrated set for a model; `seed` chooses the passages of public text."""
    tokenizer = AutoTokenizer.from_pretrained(parts.directory)
    embedding = load_embedding(parts.parts["embedding"], parts.config)
    norm, head = load_final(parts.parts["final"], parts.config)
    made = calibrated_set(
        parts.config, layers, embedding, norm, embedding if head is None else head, tokenizer, max_rank,
        lambda done: progress(f"calibrating the adapter set on public text: {done:.0%}"), seed,
    )  # fmt: skip
    return sets.publish(made, "calibrated", parts.model_hash)


def _make_missing_sets(
    parts: ModelParts, layers: Mapping[int, LayerWeights], sets: SetStore, progress: Callable[[str], None]
) -> None:
    """A set of each kind that was not published yet."""
    kinds = {info.kind for info in sets.list(parts.model_hash)}
    if "random" not in kinds:
        sets.publish(random_set(parts.config, MAX_RANK, RANDOM_SEED), "random", parts.model_hash)
    if "calibrated" not in kinds:
        calibrate(parts, layers, sets, progress)

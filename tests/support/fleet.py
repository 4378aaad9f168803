"""The services that the exactness tests share: one real process a model, and transformers' own model beside it.

`MODELS` names the tiny models; `Fleet` makes them, serves them through `tests/support/service.py`, and opens device
sessions. Everything lies under one folder, which the test session throws away.
"""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from tests.support.service import ServiceProcess, service
from tests.support.tiny import smollm2_path, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from privatelora.cloud.sets import SetLayer, SetStore, random_set
from privatelora.decoder.publish import publish_model
from privatelora.device import DeviceSession

DEPTH = 6
SMOLLM2 = "smollm2"

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-llama3": (
        "llama",
        {
            "head_dim": 24,  # not hidden / heads
            "rope_parameters": LLAMA3,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "mistral-yarn": ("mistral", {"sliding_window": 24, "rope_parameters": YARN}),
    "qwen2-linear": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 2,  # the layers above slide
            "rope_parameters": LINEAR,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 32, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
}
"""Every family, and between them every config field that changes the mathematics."""


class Fleet:
    """One float32 service a model, started at its first use; all are stopped with the fleet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running = ExitStack()
        self._services: dict[str, ServiceProcess] = {}
        self._models: dict[str, PreTrainedModel] = {}
        self._sessions = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for running in self._services.values():
            running.process.send_signal(signal.SIGTERM)  # all at once, before each is waited for
        self._running.close()

    def source(self, name: str) -> Path:
        """What a service loads: the directory of a tiny model, or SmolLM2's GGUF file."""
        if name == SMOLLM2:
            return smollm2_path()
        directory = self.folder / "models" / name
        if not directory.exists():
            family, fields = MODELS[name]
            tiny_model(family, directory, num_hidden_layers=DEPTH, **fields)
        return directory

    def service(self, name: str) -> ServiceProcess:
        """The running service of a model."""
        if name not in self._services:
            if name == SMOLLM2:
                _publish_set_of_smollm2(self.data_dir(name))
            started = service(self.source(name), self.data_dir(name))
            self._services[name] = self._running.enter_context(started)
        return self._services[name]

    def data_dir(self, name: str) -> Path:
        """Where the service of a model keeps its parts and its sets."""
        return self.folder / "services" / name

    def model(self, name: str) -> PreTrainedModel:
        """transformers' own model of the same weights, float32, frozen."""
        if name not in self._models:
            source = self.source(name)
            where = (source.parent, {"gguf_file": source.name}) if source.is_file() else (source, {})
            model = AutoModelForCausalLM.from_pretrained(
                where[0], dtype=torch.float32, attn_implementation="eager", **where[1]
            )
            self._models[name] = model.eval().requires_grad_(False)
        return self._models[name]

    def session(self, name: str, **settings: Any) -> DeviceSession:
        """A new device of a model's service, with an empty store."""
        return self.connect(self.service(name), **settings)

    def connect(self, to: ServiceProcess, **settings: Any) -> DeviceSession:
        """A device of a service: a new one, unless the settings name its store."""
        self._sessions += 1
        places = {"store_dir": self.folder / "stores" / str(self._sessions), "cache_dir": self.folder / "cache"}
        return DeviceSession(**({"server": to.url, "token": to.token} | places | settings))


def _publish_set_of_smollm2(data_dir: Path) -> None:
    """Give SmolLM2's service a set of the calibrated kind before its first start.

    Half a minute of calibration is saved; what the exactness tests claim holds for any A and B, and the tiny models'
    services calibrate.
    """
    parts = publish_model(smollm2_path(), data_dir, torch.float32)
    made = random_set(parts.config, 64, seed=1)
    one_encoder = {l: SetLayer(layer.a[:1], layer.b) for l, layer in made.items()}
    SetStore(data_dir / "sets").publish(one_encoder, "calibrated", parts.model_hash)

"""A GGUF file as a model source: metadata to config, and tensors dequantized one at a time.

transformers (5.23) reads such files too, and a test holds the two against each other; but it ignores metadata and drops
tensors that it has no name for, which gives wrong logits without a word, keeps the whole model in memory as float32,
and takes 12 s for SmolLM2-135M where this takes 4. So metadata are read by a whitelist here, and the tensors' names
and shapes must be those of the config. Only the tokenizer is left to transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor

from privatelora.decoder.checkpoint import (
    EMBEDDING,
    FINAL_NORM,
    GENERATION_CONFIG,
    HEAD,
    LAYER,
    Checkpoint,
    Say,
    checkpoint_shapes,
    convert_tokenizer,
)
from privatelora.decoder.config import FAMILIES, ModelConfig, read_config
from privatelora.protocol.errors import ConfigurationError, UnsupportedModelError

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # llama.cpp writes Mistral models as llama, and so do they compute

# Metadata under the architecture's prefix: the config field that it becomes.
_FIELDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONAL_FIELDS = {"rope.freq_base": "rope_theta", "attention.key_length": "head_dim"}

# Metadata that changes the mathematics, with the values at which it does not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (1.0,),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
}
_CHECKED = ("vocab_size", "rope.dimension_count", "attention.value_length")
_IRRELEVANT = ("tensor_data_layout",)

_TOKEN_IDS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}

_TENSORS = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", HEAD: "output.weight"}
_LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class GgufSource:
    """One GGUF file, weights, config and tokenizer in one."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.stem
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ConfigurationError(f"{path} is not a GGUF file; give a GGUF file or a model's directory")

    def files(self) -> list[Path]:
        return [self.path]

    def config(self) -> ModelConfig:
        """Read the config from the metadata, and hold the tensors' names and shapes against it."""
        shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}  # torch's order
        config = self._read_config(shapes)
        wanted = {gguf_name(name): shape for name, shape in checkpoint_shapes(config).items()}
        if "rope_freqs.weight" in shapes:
            raise UnsupportedModelError(
                f"{self.path} holds rope_freqs.weight, scaled rotary frequencies that its metadata do not describe; "
                "publish the model's safetensors directory instead"
            )
        for name in sorted(wanted.keys() | shapes.keys()):
            if wanted.get(name) != shapes.get(name):
                raise ConfigurationError(
                    f"{self.path}: tensor {name} has shape {shapes.get(name, 'absent')}, but its metadata ask for "
                    f"{wanted.get(name, 'none of that name')}; fetch the file again or use the model's safetensors"
                )
        return config

    def model_hash(self, config: ModelConfig, say: Say) -> str:
        say(f"hashing {self.path.name}")
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def checkpoint(self, config: ModelConfig) -> Checkpoint:
        tensors = {name: self._tensors[gguf_name(name)] for name in checkpoint_shapes(config)}
        return Checkpoint(_Dequantized(tensors, config), config, f"GGUF file {self.path}")

    def write_tokenizer(self, target: Path) -> None:
        convert_tokenizer(self.path.parent, target, gguf_file=self.path.name)
        ids = {field: self._metadata[key] for key, field in _TOKEN_IDS.items() if key in self._metadata}
        (target / GENERATION_CONFIG).write_text(json.dumps(ids, indent=2, sort_keys=True), encoding="utf-8")

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        """Every tensor's description by llama.cpp's name; the data stay on disk until they are asked for."""
        return {tensor.name: tensor for tensor in self._header[0].tensors}

    @property
    def _metadata(self) -> dict[str, Any]:
        """Metadata without the vocabulary."""
        return self._header[1]

    @cached_property
    def _header(self) -> tuple[GGUFReader, dict[str, Any]]:
        """The file's header, parsed once: 2 s for a vocabulary of 49k tokens."""
        try:
            reader = GGUFReader(self.path)
            wanted = [key for key in reader.fields if not key.startswith("tokenizer.") or key in _TOKEN_IDS]
            return reader, {key: reader.fields[key].contents() for key in wanted}
        except (ValueError, IndexError, KeyError, OverflowError, TypeError, OSError) as error:
            raise ConfigurationError(f"{self.path} is damaged: {error}; fetch the GGUF file again") from error

    def _read_config(self, shapes: dict[str, tuple[int, ...]]) -> ModelConfig:
        metadata = self._metadata
        architecture = metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{self.path} is of the architecture {architecture!r}; GGUF files of {', '.join(ARCHITECTURES)} work, "
                f"and safetensors of {', '.join(FAMILIES)}"
            )
        prefix = f"{architecture}."
        own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        values: dict[str, Any] = {"model_type": architecture, "tie_word_embeddings": _TENSORS[HEAD] not in shapes}
        for key, field in (_FIELDS | _OPTIONAL_FIELDS).items():
            if key in own:
                values[field] = own.pop(key)
            elif key == "attention.head_count_kv":
                values[field] = values["num_attention_heads"]
            elif key in _FIELDS:
                raise ConfigurationError(f"{self.path} has no {prefix}{key} in its metadata; fetch the file again")
        for field, value in values.items():
            if field in ("num_attention_heads", "num_key_value_heads", "intermediate_size") and not isinstance(
                value, int
            ):
                raise UnsupportedModelError(f"{self.path} gives {field} per layer, which is not implemented: {value}")
        values["vocab_size"] = shapes.get(_TENSORS[EMBEDDING], (own.get("vocab_size", 0),))[0]
        if values["num_attention_heads"] > 0:  # else read_config says so
            values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        values |= {field: metadata[key] for key, field in _TOKEN_IDS.items() if key in metadata}
        checked = {key: own.pop(key) for key in _CHECKED if key in own}
        for key in ("rope.dimension_count", "attention.value_length"):
            if key in checked and checked[key] != values.get("head_dim"):
                raise UnsupportedModelError(
                    f"{self.path}: {prefix}{key}={checked[key]} beside a head size of {values.get('head_dim')} is not "
                    "implemented; use another model"
                )
        for key, value in own.items():
            if key not in _IRRELEVANT and value not in _NEUTRAL.get(key, ()):
                raise UnsupportedModelError(
                    f"{self.path}: metadata {prefix}{key}={value!r} is not implemented for GGUF files; publish the "
                    "model's safetensors directory instead"
                )
        return read_config(values)


class _Dequantized(Mapping[str, Tensor]):
    """Tensors of a GGUF file under transformers' names, made float32 when they are asked for."""

    def __init__(self, tensors: dict[str, Any], config: ModelConfig) -> None:
        self._tensors, self._config = tensors, config

    def __getitem__(self, name: str) -> Tensor:
        stored = self._tensors[name]
        try:
            tensor = torch.from_numpy(np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32))
        except (NotImplementedError, ValueError) as error:
            raise ConfigurationError(
                f"tensor {stored.name} cannot be read from GGUF type {stored.tensor_type.name}: {error}; use a file of "
                "another quantization"
            ) from error
        if self._config.family == "llama":
            if ".q_proj." in name:
                return _unpermute(tensor, self._config.num_heads)
            if ".k_proj." in name:
                return _unpermute(tensor, self._config.num_kv_heads)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _unpermute(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads * e, d) of llama.cpp's q or k, whose rotary pairs are neighbours, to halves as transformers has them.

    Source: llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute, turned around.
    """
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor that transformers calls `name`."""
    if name in _TENSORS:
        return _TENSORS[name]
    layer, _, rest = name.removeprefix(LAYER.split("{")[0]).partition(".")
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_LAYER_TENSORS[module]}.{kind}"

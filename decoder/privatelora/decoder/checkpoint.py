"""What a checkpoint holds: the tensors of a model under transformers' names, and its tokenizer's files.

`sources` and `gguf_source` fill a `Checkpoint`, which checks every tensor against the config as it is read;
`publish.publish_model` turns it into parts. What is wrong with a checkpoint is a `ConfigurationError` that names the
tensor.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer

from privatelora.decoder.config import ModelConfig
from privatelora.protocol.errors import ConfigurationError

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
LAYER = "model.layers.{}."
IGNORED_TENSORS = re.compile(r"\.rotary_emb\.inv_freq$")  # older Llama checkpoints carry what the config says already
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
GENERATION_CONFIG = "generation_config.json"

Say = Callable[[str], None]
"""Takes one line of progress."""


def layer_tensors(config: ModelConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Tensors of a layer part, each with the tensors that are its rows in order: name within the layer -> shape."""
    d, q, kv, m = config.hidden_size, config.q_size, config.kv_size, config.intermediate_size
    qkv = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
    gate_up = {"mlp.gate_proj": m, "mlp.up_proj": m}
    fields: dict[str, dict[str, tuple[int, ...]]] = {
        "input_norm": {"input_layernorm.weight": (d,)},
        "qkv": {f"{name}.weight": (rows, d) for name, rows in qkv.items()},
        "o": {"self_attn.o_proj.weight": (d, q)},
        "post_norm": {"post_attention_layernorm.weight": (d,)},
        "gate_up": {f"{name}.weight": (rows, d) for name, rows in gate_up.items()},
        "down": {"mlp.down_proj.weight": (d, m)},
    }
    if config.qkv_bias:
        fields["qkv_bias"] = {f"{name}.bias": (rows,) for name, rows in qkv.items()}
    if config.o_bias:
        fields["o_bias"] = {"self_attn.o_proj.bias": (d,)}
    if config.mlp_bias:
        fields["gate_up_bias"] = {f"{name}.bias": (rows,) for name, rows in gate_up.items()}
        fields["down_bias"] = {"mlp.down_proj.bias": (d,)}
    if config.qk_norm:
        fields["q_norm"] = {"self_attn.q_norm.weight": (config.head_dim,)}
        fields["k_norm"] = {"self_attn.k_norm.weight": (config.head_dim,)}
    return fields


def checkpoint_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model under transformers' name, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    per_layer = {name: shape for tensors in layer_tensors(config).values() for name, shape in tensors.items()}
    for layer in range(config.num_layers):
        shapes |= {LAYER.format(layer) + name: shape for name, shape in per_layer.items()}
    shapes[FINAL_NORM] = (config.hidden_size,)
    if not config.tied_head:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


class Checkpoint:
    """The tensors of one model under transformers' names, complete and nothing else; `where` names it in errors."""

    def __init__(self, tensors: Mapping[str, Tensor], config: ModelConfig, where: str) -> None:
        self.tensors, self.config, self.where = tensors, config, where
        self.shapes = checkpoint_shapes(config)
        self._embedding = EMBEDDING
        present = {name for name in tensors if not IGNORED_TENSORS.search(name)}
        if config.tied_head and HEAD in present:
            if EMBEDDING not in present:
                self._embedding = HEAD  # transformers ties either way round
                present.add(EMBEDDING)
            present.discard(HEAD)
        if missing := sorted(self.shapes.keys() - present):
            raise ConfigurationError(
                f"{where} lacks the tensor {missing[0]} ({len(missing)} missing in all); fetch the model again, or "
                "correct its config.json"
            )
        if unknown := sorted(present - self.shapes.keys()):
            raise ConfigurationError(
                f"{where} holds the tensor {unknown[0]} ({len(unknown)} such), which a {config.family} model of its "
                "config does not use; correct the config, or remove what is not part of the model"
            )
        if config.tied_head and self._embedding == EMBEDDING and HEAD in tensors:
            self._check_tied()

    def read(self, name: str) -> Tensor:
        """Return a tensor in the dtype it is stored in, after checking its shape."""
        tensor = self._stored(self._embedding if name == EMBEDDING else name)
        if tuple(tensor.shape) != self.shapes[name]:
            raise ConfigurationError(
                f"{self.where} gives {name} the shape {tuple(tensor.shape)}, but the config asks for "
                f"{self.shapes[name]}; correct config.json or fetch the model again"
            )
        if tensor.dtype not in FLOATS:
            raise ConfigurationError(
                f"{self.where} stores {name} as {tensor.dtype}: quantized weights are not implemented; use the float "
                "checkpoint of this model, or a GGUF file of it"
            )
        return tensor

    def digest(self, say: Say) -> str:
        """sha256 over the config's identity and every tensor's name, dtype, shape and bytes, one tensor in memory."""
        sha = hashlib.sha256(self.config.identity().encode())
        for done, name in enumerate(sorted(self.shapes)):
            if done % 50 == 0:
                say(f"hashing the weights: {done} of {len(self.shapes)} tensors")
            tensor = self.read(name)
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def _stored(self, name: str) -> Tensor:
        try:
            return self.tensors[name]
        except (SafetensorError, OSError) as error:
            raise ConfigurationError(f"{self.where}: cannot read {name}: {error}; fetch the model again") from error

    def _check_tied(self) -> None:
        """Refuse a head that is not the embedding that it is said to be: transformers would compute with the head."""
        if not torch.equal(self._stored(HEAD), self._stored(EMBEDDING)):
            raise ConfigurationError(
                f"{self.where} says tie_word_embeddings, but its {HEAD} differs from {EMBEDDING}; set "
                "tie_word_embeddings to false in config.json"
            )


def convert_tokenizer(directory: Path, target: Path, **options: Any) -> None:
    """Let transformers read a tokenizer of any kind, and save it with its tokenizer.json under `target`."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, **options)
        tokenizer.save_pretrained(target)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ConfigurationError(
            f"cannot read a tokenizer from {directory} ({error}); put its tokenizer.json there"
        ) from error
    if not (target / "tokenizer.json").is_file():
        raise ConfigurationError(f"the tokenizer of {directory} cannot be saved as tokenizer.json; add that file")

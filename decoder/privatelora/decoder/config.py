"""What a model computes: a Hugging Face config read into `ModelConfig`, or refused by the name of the field.

The config comes from `publish.publish_model` (a config.json, or the metadata of a GGUF file) and from the config.json
part that a device downloads; the result steers the layers, the rotary tables and the shapes of all weights. A field
that this file does not know stops the model, since a field that is silently ignored gives wrong logits.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig

from privatelora.protocol.errors import ConfigurationError, UnsupportedModelError


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

ROPE_KEYS: dict[str, frozenset[str]] = {
    "default": _names(""),
    "linear": _names("factor"),
    "proportional": _names("factor"),
    "llama3": _names("factor low_freq_factor high_freq_factor original_max_position_embeddings"),
    "yarn": _names(
        "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim truncate "
        "finetuned"  # stands in older configs and is read by nobody
    ),
}
"""Rope types whose frequencies are fixed once the config is known, and the parameters that each reads."""

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

# Fields that `read_config` or transformers' rotary initialisers read, in every family and in some.
_READ = _names(
    "model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
    "vocab_size max_position_embeddings original_max_position_embeddings rms_norm_eps tie_word_embeddings "
    "rope_parameters layer_types"
)
_READ_BY_FAMILY = {
    "llama": _names("attention_bias mlp_bias"),
    "mistral": _names("sliding_window"),
    "qwen2": _names("use_sliding_window sliding_window max_window_layers"),
    "qwen3": _names("use_sliding_window sliding_window max_window_layers attention_bias"),
}

# Fields that change the mathematics, with the values at which they do not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (1, None),
    "attention_dropout": (0, None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "per_layer_config": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_causal": (True, None),
    "pruned_heads": ({}, None),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
}

# Fields that logits do not depend on. `max_window_layers` means something only beside a sliding window.
_IRRELEVANT = _names(
    "architectures dtype torch_dtype transformers_version _name_or_path name_or_path _model_name_or_path "
    "initializer_range use_cache pad_token_id bos_token_id eos_token_id unk_token_id sep_token_id "
    "decoder_start_token_id output_hidden_states output_attentions return_dict chunk_size_feed_forward id2label "
    "label2id num_labels problem_type finetuning_task task_specific_params tokenizer_class prefix torchscript "
    "use_bfloat16 tie_encoder_decoder is_decoder max_window_layers max_sequence_length is_llama_config "
    "transformers.js_config unsloth_version unsloth_fixed"
)

# Of the irrelevant fields, those that a published config keeps: a reader of the model may want them.
_KEPT = _names("architectures initializer_range pad_token_id bos_token_id eos_token_id")


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that a decoder needs.

    Parameters
    ----------
    family : transformers' `model_type`, one of `FAMILIES`.
    norm_eps : epsilon of every RMS norm.
    tied_head : the LM head is the embedding matrix.
    qkv_bias, o_bias, mlp_bias : which linears carry a bias; `qk_norm`: RMS norms over each head of q and of k.
    windows : per layer, position i attends to j with 0 <= i - j < window; None attends to all before it.
    hf : the config as transformers reads it, for the rotary initialisers and for export.
    """

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    norm_eps: float
    tied_head: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    hf: dict[str, Any] = field(repr=False, hash=False)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return self.q_size + 2 * self.kv_size

    def identity(self) -> str:
        """Everything that logits depend on beside the weights, as canonical JSON: the config's share of a model's hash.

        The fields are named one by one, since a new field of this class must not rename every model.
        """
        rope = {
            name: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
            for name, value in self.hf["rope_parameters"].items()
            if name in ROPE_KEYS[self.hf["rope_parameters"]["rope_type"]] or name in ("rope_type", "rope_theta")
        }
        values = {
            "family": self.family,
            "widths": [self.hidden_size, self.intermediate_size, self.vocab_size],
            "layers": self.num_layers,
            "heads": [self.num_heads, self.num_kv_heads, self.head_dim],
            "context": self.context_length,
            "norm_eps": self.norm_eps,
            "tied_head": self.tied_head,
            "biases": [self.qkv_bias, self.o_bias, self.mlp_bias],
            "qk_norm": self.qk_norm,
            "windows": self.windows,
            "rope": rope,
        }
        return json.dumps(values, sort_keys=True, separators=(",", ":"))


def read_config(hf_config: PretrainedConfig | Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face config, of transformers' class or as the dict of a config.json.

    Raises `UnsupportedModelError` naming the family or the field that this decoder does not implement, and
    `ConfigurationError` for values that make no model. Source: transformers 5.23, models/{llama,mistral,qwen2,qwen3}.
    """
    hf = build_hf_config(hf_config)
    family = hf.model_type
    _check_fields(hf)
    _check_rope(hf)
    heads: int = hf.num_attention_heads
    sizes = {
        "hidden_size": hf.hidden_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": hf.num_key_value_heads,
        "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // heads,
        "intermediate_size": hf.intermediate_size,
        "vocab_size": hf.vocab_size,
        "context_length": hf.max_position_embeddings,
    }
    _check_sizes(sizes)
    if not _positive(hf.rms_norm_eps):
        raise ConfigurationError(f"config field rms_norm_eps={hf.rms_norm_eps!r} is not a positive number; correct it")
    attention_bias = bool(getattr(hf, "attention_bias", False))
    return ModelConfig(
        family=family,
        **sizes,
        norm_eps=float(hf.rms_norm_eps),
        tied_head=bool(hf.tie_word_embeddings),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=family in ("llama", "qwen3") and attention_bias,
        mlp_bias=family == "llama" and bool(hf.mlp_bias),
        qk_norm=family == "qwen3",
        windows=_windows(hf),
        hf=_plain(hf),
    )


def load_config(path: Path) -> ModelConfig:
    """Read a config.json file; raises as `read_config` does, and `ConfigurationError` for what is no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read the model config {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"the model config {path} holds a {type(values).__name__}, not a JSON object")
    return read_config(values)


def build_hf_config(hf_config: PretrainedConfig | Mapping[str, Any]) -> PretrainedConfig:
    """Return a fresh transformers config, so that its defaults and its reading of older field names apply."""
    values = hf_config.to_dict() if isinstance(hf_config, PretrainedConfig) else copy.deepcopy(dict(hf_config))
    family = values.pop("model_type", None)
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"model family (model_type) {family!r} is not implemented; use a model of {', '.join(FAMILIES)}"
        )
    if values.get("head_dim", 0) is None:
        del values["head_dim"]  # qwen2 has no such field, and the rotary initialisers would read the None
    try:
        config = CONFIG_MAPPING[family](**values)
        config.standardize_rope_params()  # a top-level original_max_position_embeddings counts from the second call on
        return config
    except (StrictDataclassError, TypeError, ValueError, KeyError, ZeroDivisionError, AttributeError) as error:
        reason = " ".join(str(error).split())  # names the field: transformers' classes check their types
        raise ConfigurationError(f"the {family} config is not valid: {reason}; correct its config.json") from error


def _check_fields(hf: PretrainedConfig) -> None:
    """Refuse every field that is neither read, nor neutral, nor irrelevant, nor at its family's default."""
    read = _READ | _READ_BY_FAMILY[hf.model_type]
    defaults: dict[str, Any] = type(hf).default_config_fields()  # type: ignore[no-untyped-call]  # transformers leaves it bare
    for name, value in hf.to_dict().items():
        if name in read or name in _IRRELEVANT:
            continue
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                float_model = "use the float checkpoint of this model, or a GGUF file of it"
                only = f"only {_NEUTRAL[name][0]!r} is implemented"
                _refuse(name, value, float_model if name == "quantization_config" else only)
        elif name not in defaults or value != defaults[name]:
            _refuse(name, value, "this field is not known here; if logits do not depend on it, remove it")


def _check_rope(hf: PretrainedConfig) -> None:
    """Refuse rotary embeddings whose frequencies move with the length, or whose parameters are not all read."""
    rope: dict[str, Any] = hf.rope_parameters or {}
    kind = str(rope.get("rope_type"))
    if kind in LENGTH_DEPENDENT_ROPE:
        _refuse("rope_type", kind, "its frequencies change with the current length, so a cached prefix cannot be kept")
    if kind not in ROPE_KEYS:
        _refuse("rope_type", kind, f"implemented are {', '.join(ROPE_KEYS)}")
    for name, value in rope.items():
        if name in ("rope_type", "type", "rope_theta"):
            continue
        if name == "partial_rotary_factor":
            if value not in (1, None):
                _refuse(name, value, "only whole heads are rotated here, 1.0")
        elif name not in ROPE_KEYS[kind]:
            _refuse(f"rope_parameters.{name}", value, f"rope type {kind!r} does not read it; correct or remove it")
        elif not (_positive(value) or (kind == "yarn" and name != "factor" and value in (None, True, False))):
            raise ConfigurationError(
                f"config field rope_parameters.{name}={value!r} is not a positive number; correct it"
            )
    if not _positive(rope.get("rope_theta")):
        raise ConfigurationError(
            f"config field rope_theta={rope.get('rope_theta')!r} is not a positive number; correct it"
        )


def _check_sizes(sizes: dict[str, int]) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ConfigurationError(f"config gives {name}={value!r}, not a positive integer; correct config.json")
    if sizes["num_heads"] % sizes["num_kv_heads"]:
        raise ConfigurationError(
            f"config gives {sizes['num_heads']} attention heads for {sizes['num_kv_heads']} key-value heads, which do "
            "not divide; correct config.json"
        )
    if sizes["head_dim"] % 2:
        raise ConfigurationError(f"config gives head_dim={sizes['head_dim']}, but rotary embeddings pair dimensions")


def _windows(hf: PretrainedConfig) -> tuple[int | None, ...]:
    """Sliding window of each layer.

    transformers masks with `kv_idx > q_idx - window` (masking_utils.sliding_window_overlay): a token sees itself and
    the window - 1 tokens before it. Mistral slides in all layers; Qwen in those that `layer_types` names, which its
    config class derives from `use_sliding_window` and `max_window_layers`.
    """
    window: int | None = getattr(hf, "sliding_window", None)
    layer_types: list[str] | None = getattr(hf, "layer_types", None)
    if window is not None and (not isinstance(window, int) or window <= 0):
        raise ConfigurationError(f"config field sliding_window={window!r} is not a positive integer; correct it")
    if hf.model_type in ("qwen2", "qwen3"):
        types = list(layer_types or ())
    else:
        types = [("full" if window is None else "sliding") + "_attention"] * hf.num_hidden_layers
        if layer_types is not None and list(layer_types) != types:
            _refuse("layer_types", layer_types, f"transformers' {hf.model_type} computes {types[0]} in every layer")
    if len(types) != hf.num_hidden_layers:
        raise ConfigurationError(
            f"config field layer_types names {len(types)} layers of {hf.num_hidden_layers}; correct config.json"
        )
    windows: list[int | None] = []
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            _refuse("layer_types", kind, "implemented are full_attention and sliding_attention")
        if kind == "sliding_attention" and window is None:
            raise ConfigurationError("config field layer_types asks for sliding_attention, but sliding_window is unset")
        windows.append(window if kind == "sliding_attention" else None)
    return tuple(windows)


def _positive(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _plain(hf: PretrainedConfig) -> dict[str, Any]:
    dropped = _IRRELEVANT - _KEPT
    return {name: copy.deepcopy(value) for name, value in sorted(hf.to_dict().items()) if name not in dropped}


def _refuse(name: str, value: object, why: str) -> None:
    raise UnsupportedModelError(f"config field {name}={value!r} is not implemented: {why}")

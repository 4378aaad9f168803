"""`read_config`: what the four families compute, and that nothing which changes it is ignored. Rotary tables."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from tests.support.tiny import FAMILIES, tiny_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config

from privatelora.decoder.config import load_config, read_config
from privatelora.decoder.rotary import SMALLEST_TABLE, RotaryTables, rotary_tables
from privatelora.protocol.errors import ConfigurationError, UnsupportedModelError

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
    "proportional": {"rope_parameters": {"rope_type": "proportional", "rope_theta": 10000.0, "factor": 2.0}},
    "llama3": {"rope_parameters": LLAMA3_ROPE},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
    "yarn with all its settings": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.4,
            "truncate": False,
        }
    },
    "original length beside": {
        "original_max_position_embeddings": 64,
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.3},
    },
    "older spelling": {"rope_theta": 54321.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
}

# config.json files as their owners publish them, for models that must work.
PUBLISHED: dict[str, dict[str, Any]] = {
    "SmolLM2-135M-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "transformers_version": "4.42.3",
        "use_cache": True,
        "vocab_size": 49152,
    },
    "Llama-3.2-1B-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "Qwen2.5-0.5B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_of_every_family_are_read(name: str) -> None:
    values = PUBLISHED[name]
    config = read_config(values)
    assert config.family == values["model_type"]
    assert config.num_layers == len(config.windows) == values["num_hidden_layers"]
    assert config.kv_size == config.num_kv_heads * config.head_dim
    assert config.qkv_size == config.q_size + 2 * config.kv_size
    assert config.context_length == values["max_position_embeddings"]
    assert config.tied_head is values["tie_word_embeddings"]
    assert config.windows == ((4096,) * 32 if config.family == "mistral" else (None,) * config.num_layers)
    assert config.qkv_bias is (config.family == "qwen2")
    assert config.qk_norm is (config.family == "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_survives_json_and_transformers_own_class(family: str) -> None:
    config = read_config(tiny_config(family, head_dim=24))
    assert read_config(json.loads(json.dumps(config.hf))) == config
    values = tiny_config(family, head_dim=24)
    assert read_config(CONFIG_MAPPING[values.pop("model_type")](**values)) == config
    assert config.head_dim == 24 and config.q_size == 96


def test_the_callers_config_is_left_as_it_was() -> None:
    values = tiny_config("llama", rope_scaling={"type": "linear", "factor": 2.0})
    before = json.dumps(values)
    read_config(values)
    assert json.dumps(values) == before


def test_biases_follow_each_familys_own_rule() -> None:
    llama = read_config(tiny_config("llama", attention_bias=True, mlp_bias=True))
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = read_config(tiny_config("qwen2"))
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias) == (True, False, False)
    qwen3 = read_config(tiny_config("qwen3", attention_bias=True))
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.mlp_bias) == (True, True, False)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("llama", {"pretraining_tp": 2}, "pretraining_tp=2"),
    ("qwen2", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    (
        "llama",
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
        "rope_type='longrope'",
    ),
    ("llama", {"rope_scaling": {"rope_type": "spiral"}}, "rope_type='spiral'"),
    ("qwen2", {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}, "rope_parameters.mrope_section"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}}, "rope_parameters.beta_fast"),
    ("llama", {"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config"),
    ("llama", {"sliding_window": 16}, "sliding_window=16"),
    ("llama", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    ("mistral", {"sliding_window": 8, "layer_types": ["full_attention"] * 4}, "layer_types"),
    ("qwen3", {"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "linear_attention"),
    ("mistral", {"attention_bias": True}, "attention_bias=True"),
    ("qwen2", {"mlp_bias": True}, "mlp_bias=True"),
    ("qwen2", {"attention_bias": True}, "attention_bias=True"),
    ("llama", {"is_causal": False}, "is_causal=False"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved=True"),
    ("qwen2", {"use_mrope": True}, "use_mrope=True"),
    ("llama", {"per_layer_config": {"0": {"intermediate_size": 32}}}, "intermediate_size|per_layer_config"),
    ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}, "auto_map"),
    ("llama", {"logit_softcapping": 30.0}, "logit_softcapping=30.0"),
    ("qwen2", {"a_field_of_next_year": True}, "a_field_of_next_year=True"),
]


@pytest.mark.parametrize(("family", "changes", "named"), REFUSED, ids=[f"{f}-{n}" for f, _, n in REFUSED])
def test_mathematics_that_is_not_implemented_is_refused_by_name(
    family: str, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        read_config(tiny_config(family, **changes))


@pytest.mark.parametrize("config", [GPT2Config(), {"model_type": "mixtral"}, {"hidden_size": 64}], ids=str)
def test_another_family_is_refused_with_those_that_work(config: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="llama, mistral, qwen2, qwen3"):
        read_config(config)


INVALID: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"num_attention_heads": 4, "num_key_value_heads": 3}, "4 attention heads for 3"),
    ("llama", {"hidden_size": 66}, "hidden size"),
    ("qwen2", {"num_attention_heads": 0}, "valid|num_heads=0"),
    ("mistral", {"num_hidden_layers": -1}, "num_layers=-1"),
    ("qwen3", {"head_dim": 15}, "head_dim"),
    ("qwen3", {"hidden_size": "64"}, "hidden_size"),
    ("llama", {"rms_norm_eps": 0.0}, "rms_norm_eps=0.0"),
    ("llama", {"rope_theta": -1.0}, "rope_theta=-1.0"),
    ("llama", {"rope_theta": math.nan}, "rope_theta=nan"),
    ("mistral", {"sliding_window": 0}, "sliding_window=0"),
    ("qwen2", {"layer_types": ["full_attention"] * 3}, "layer_types|layers"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "sliding_window is unset"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor='2'"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor=0"),
    ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": None}}, "factor=None"),
    ("mistral", {"rope_parameters": 5}, "rope_parameters"),
]


@pytest.mark.parametrize(("family", "changes", "named"), INVALID, ids=[f"{f}-{n}" for f, _, n in INVALID])
def test_values_that_make_no_model_are_refused_by_name(family: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        read_config(tiny_config(family, **changes))


@pytest.mark.parametrize("text", ["", "{", "[1]", '"llama"', "null"])
def test_a_config_file_that_is_no_object_is_refused(text: str, tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        load_config(tmp_path / "config.json")


WINDOWS: list[tuple[str, dict[str, Any], tuple[int | None, ...]]] = [
    ("mistral", {"sliding_window": 3}, (3, 3)),
    ("mistral", {"sliding_window": 1}, (1, 1)),
    ("mistral", {"sliding_window": None}, (None, None)),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, (None, 4)),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0}, (None, None)),
    (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        (2, None),
    ),
    ("llama", {}, (None, None)),
]


@pytest.mark.parametrize(("family", "changes", "windows"), WINDOWS)
def test_windows_say_what_transformers_layers_see(
    family: str, changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    """Position i of a layer's output moves with position j of its input exactly where 0 <= i - j < window."""
    values = tiny_config(family, num_hidden_layers=2, **changes)
    assert read_config(values).windows == windows
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[values.pop("model_type")](**values), attn_implementation="eager"
    )
    seen: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []

    def cut(module: Any, args: tuple[torch.Tensor, ...], kwargs: Any) -> Any:
        inputs.append(args[0].detach().requires_grad_())  # each layer on its own
        return (inputs[-1], *args[1:]), kwargs

    for layer in model.model.layers:
        layer.register_forward_pre_hook(cut, with_kwargs=True)
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    tokens = 9
    model(torch.arange(10, 10 + tokens)[None], use_cache=False)
    for window, x, h in zip(windows, inputs, seen, strict=True):
        for i in range(tokens):
            (gradient,) = torch.autograd.grad(h[0, i].sum(), x, retain_graph=True)
            reached = gradient[0].abs().sum(dim=-1) > 0
            expected = [0 <= i - j < (window or tokens) for j in range(tokens)]
            assert reached.tolist() == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ROPES)
def test_rotary_tables_equal_transformers_far_past_the_context(family: str, rope: str) -> None:
    length = 4096  # of a context of 512, and of original ones of 32 to 128
    values = tiny_config(family, **ROPES[rope])
    config = read_config(values)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[values.pop("model_type")](**values))
    for dtype in (torch.float32, torch.bfloat16):
        theirs = model.model.rotary_emb(torch.zeros(1, dtype=dtype), torch.arange(length)[None])
        ours = rotary_tables(config, length, "cpu", dtype)
        for mine, reference in zip(ours, theirs, strict=True):
            assert mine.dtype == dtype and mine.shape == (length, config.head_dim)
            assert torch.equal(mine, reference[0])


def test_rotary_tables_grow_to_the_positions_asked_for() -> None:
    config = read_config(tiny_config("llama", **ROPES["yarn"]))
    tables = RotaryTables(config)
    whole = rotary_tables(config, 3000)
    early = torch.tensor([5, 0, SMALLEST_TABLE - 1])
    for positions in (early, torch.tensor([], dtype=torch.long), torch.tensor([2999, 7, SMALLEST_TABLE]), early):
        for rows, table in zip(tables.rows(positions), whole, strict=True):
            assert torch.equal(rows, table[positions])


def test_identity_names_what_logits_depend_on_and_nothing_else() -> None:
    base = tiny_config("llama", rope_theta=10000)
    identity = read_config(base).identity()
    same = base | {"rope_theta": 10000.0, "transformers_version": "4.0", "eos_token_id": 9, "torch_dtype": "float16"}
    assert read_config(same).identity() == identity
    seen = {identity}
    for change in (
        {"rope_theta": 10001.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 64},
        {"rms_norm_eps": 1e-5},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"num_hidden_layers": 3},
        {"max_position_embeddings": 1024},
    ):
        seen.add(read_config(base | change).identity())
    assert len(seen) == 10

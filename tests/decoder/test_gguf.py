"""GGUF files as sources: the same tensors as transformers reads, and nothing that its metadata say is ignored."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.support.tiny import SPECIAL, smollm2_path, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from privatelora.decoder.config import read_config
from privatelora.decoder.gguf_source import gguf_name
from privatelora.decoder.publish import publish_model
from privatelora.decoder.weights import load_embedding, load_final, load_layer
from privatelora.protocol.errors import ConfigurationError, UnsupportedModelError

Change = Callable[[dict[str, Any], dict[str, np.ndarray[Any, Any]]], object]


def unchanged(metadata: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    pass


def write_gguf(
    path: Path, model: PreTrainedModel, change: Change = unchanged, merges: tuple[str, ...] = ("a b",)
) -> None:
    """Write a model as llama.cpp's converter does; `change` edits metadata (under the architecture) and tensors."""
    config = model.config
    architecture = config.model_type
    metadata: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": config.head_dim,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            # neighbours rotate together in llama.cpp, halves in transformers
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        tensors[gguf_name(name)] = tensor.numpy().copy()
    change(metadata, tensors)
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", architecture))
    for key, value in metadata.items():
        key = f"{architecture}.{key}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_float32(key, value)
    vocabulary = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary]
    tokens += ["ab", *(f"<unused{i}>" for i in range(config.vocab_size - len(tokens) - 1))]  # "ab" is what merges make
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(2)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_gives_the_model_it_was_made_from(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(family, tmp_path / "source", tie_word_embeddings=tied, rope_theta=77777.0, rms_norm_eps=2**-17)
    write_gguf(tmp_path / "tiny.gguf", model)
    data = tmp_path / "data"
    ours = publish_model(tmp_path / "tiny.gguf", data, torch.float32)
    reference = publish_model(tmp_path / "source", data, torch.float32)
    assert ours.name == "tiny" and ours.config.identity() == reference.config.identity()
    names = [f"layer.{i}" for i in range(4)] + ["embedding", "final"]
    assert [ours.parts[name].sha256 for name in names] == [reference.parts[name].sha256 for name in names]
    tokenizer = AutoTokenizer.from_pretrained(ours.directory)
    assert tokenizer("hi").input_ids == tiny_tokenizer()("hi").input_ids
    assert tokenizer.eos_token == SPECIAL[0]


def test_the_hash_of_a_gguf_file_is_its_content(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "source")
    write_gguf(tmp_path / "a.gguf", model)
    write_gguf(tmp_path / "b.gguf", model)
    write_gguf(tmp_path / "c.gguf", model, lambda metadata, tensors: tensors["output_norm.weight"].__iadd__(1e-3))
    a, b, c = (publish_model(tmp_path / f"{n}.gguf", tmp_path / "data", torch.bfloat16) for n in "abc")
    assert a.model_hash == b.model_hash != c.model_hash
    assert publish_model(tmp_path / "a.gguf", tmp_path / "data", torch.float32).model_hash == a.model_hash


def meta(**values: Any) -> Change:
    return lambda metadata, tensors: metadata.update({key.replace("__", "."): value for key, value in values.items()})


def tensor(name: str, *shape: int) -> Change:
    return lambda metadata, tensors: tensors.update({name: np.ones(shape, np.float32)})


REFUSED: dict[str, tuple[Change, type[ConfigurationError], str]] = {
    "yarn": (meta(rope__scaling__type="yarn"), UnsupportedModelError, r"llama\.rope\.scaling\.type='yarn'"),
    "linear": (meta(rope__scaling__factor=4.0), UnsupportedModelError, r"rope\.scaling\.factor=4"),
    "llama3": (tensor("rope_freqs.weight", 8), UnsupportedModelError, r"rope_freqs\.weight"),
    "window": (meta(attention__sliding_window=64), UnsupportedModelError, r"attention\.sliding_window=64"),
    "experts": (meta(expert_count=8), UnsupportedModelError, "expert_count=8"),
    "scaled logits": (meta(logit_scale=0.5), UnsupportedModelError, r"llama\.logit_scale=0\.5"),
    "partial rotation": (meta(rope__dimension_count=8), UnsupportedModelError, r"rope\.dimension_count=8"),
    "values of another size": (meta(attention__value_length=8), UnsupportedModelError, "value_length=8"),
    "heads per layer": (meta(attention__head_count_kv=[2, 2, 1, 2]), UnsupportedModelError, "per layer"),
    "architecture": (meta(architecture="gemma2"), UnsupportedModelError, "gemma2.*llama, qwen2, qwen3"),
    "lost metadata": (
        lambda metadata, tensors: metadata.pop("block_count"),
        ConfigurationError,
        r"no llama\.block_count",
    ),
    "no heads": (meta(attention__head_count=0), ConfigurationError, "num_heads=0|valid"),
    "lost tensor": (
        lambda metadata, tensors: tensors.pop("blk.2.ffn_up.weight"),
        ConfigurationError,
        r"blk\.2\.ffn_up\.weight has shape absent",
    ),
    "bias": (tensor("blk.0.attn_q.bias", 64), ConfigurationError, r"blk\.0\.attn_q\.bias has shape \(64,\)"),
    "shape": (tensor("blk.1.attn_k.weight", 16, 64), ConfigurationError, r"attn_k\.weight has shape \(16, 64\)"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_metadata_and_tensors_that_are_not_implemented_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    change, error, named = REFUSED[kind]
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", tmp_path / "source"), change)
    with pytest.raises(error, match=named):
        publish_model(tmp_path / "tiny.gguf", tmp_path / "data", torch.float32)


def test_a_tokenizer_that_cannot_be_built_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", tmp_path / "source"), merges=("x yz",))
    with pytest.raises(ConfigurationError, match="cannot read a tokenizer"):
        publish_model(tmp_path / "tiny.gguf", tmp_path / "data", torch.float32)


@pytest.mark.parametrize("size", [0, 3, 10, 100, 5000, -100])
def test_a_cut_gguf_file_is_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model("llama", tmp_path / "source"))
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    with pytest.raises(ConfigurationError, match=r"tiny\.gguf"):
        publish_model(path, tmp_path / "data", torch.float32)


def test_smollm2_publishes_as_transformers_reads_it_and_is_found_at_once(tmp_path: Path) -> None:
    """The real model: every tensor, the config and the tokenizer against transformers' own GGUF reader."""
    path = smollm2_path()
    start = time.perf_counter()
    published = publish_model(path, tmp_path, torch.float32)
    first_s = time.perf_counter() - start
    start = time.perf_counter()
    assert publish_model(path, tmp_path, torch.float32) == published
    second_s = time.perf_counter() - start
    print(f"published in {first_s:.1f} s, found in {second_s * 1000:.1f} ms")
    assert second_s < 0.5

    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    values = {name: value for name, value in theirs.config.to_dict().items() if name != "quantization_config"}
    assert read_config(values).identity() == published.config.identity()
    state = theirs.state_dict()
    config = published.config
    assert torch.equal(load_embedding(published.parts["embedding"], config), state["model.embed_tokens.weight"])
    norm, head = load_final(published.parts["final"], config)
    assert head is None and torch.equal(norm, state["model.norm.weight"])
    for index in range(config.num_layers):
        weights = load_layer(published.parts[f"layer.{index}"], config)
        prefix = f"model.layers.{index}."
        for name, rows in weights.projections().items():
            module = "self_attn" if name in "qkvo" else "mlp"
            assert torch.equal(rows, state[f"{prefix}{module}.{name}_proj.weight"])
        assert torch.equal(weights.input_norm, state[f"{prefix}input_layernorm.weight"])
        assert torch.equal(weights.post_norm, state[f"{prefix}post_attention_layernorm.weight"])

    tokenizer = AutoTokenizer.from_pretrained(published.directory)
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    chat = [{"role": "user", "content": "What is 12345 + 67?"}]
    assert tokenizer.apply_chat_template(chat) == reference.apply_chat_template(chat)

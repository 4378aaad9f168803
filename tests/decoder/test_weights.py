"""Publishing models from safetensors and reading their parts: right rows, made once, named by content, never half."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tests.support.tiny import FAMILIES, edit_config, tiny_model
from transformers import AutoConfig, AutoTokenizer

from privatelora.decoder.config import read_config
from privatelora.decoder.linear import Linear
from privatelora.decoder.publish import publish_model
from privatelora.decoder.weights import (
    LayerWeights,
    ModelParts,
    load_embedding,
    load_final,
    load_layer,
    open_parts,
)
from privatelora.protocol.errors import ConfigurationError, StoreError, UnsupportedModelError

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "wide heads": ("mistral", {"head_dim": 24}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved llama, copied by each test that changes it."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", directory)
    return directory


@pytest.fixture
def source(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "source"))


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("name", MODELS)
def test_parts_hold_the_rows_of_transformers_model(name: str, tmp_path: Path) -> None:
    family, overrides = MODELS[name]
    model = tiny_model(family, tmp_path / "source", **overrides)
    published = publish_model(tmp_path / "source", tmp_path / "data", torch.float32)
    config, state = published.config, model.state_dict()
    assert config == read_config(model.config)
    for layer in range(config.num_layers):
        weights = load_layer(published.parts[f"layer.{layer}"], config)
        theirs = {
            key.removeprefix(f"model.layers.{layer}."): tensor
            for key, tensor in state.items()
            if key.startswith(f"model.layers.{layer}.")
        }
        modules = {"q": "self_attn.q", "k": "self_attn.k", "v": "self_attn.v", "o": "self_attn.o"}
        modules |= {"gate": "mlp.gate", "up": "mlp.up", "down": "mlp.down"}
        for short, rows in weights.projections().items():
            assert torch.equal(rows, theirs.pop(f"{modules[short]}_proj.weight"))
            assert rows.untyped_storage().data_ptr() in {
                linear.weight.untyped_storage().data_ptr()
                for linear in (weights.qkv, weights.o, weights.gate_up, weights.down)
            }
        assert torch.equal(weights.input_norm, theirs.pop("input_layernorm.weight"))
        assert torch.equal(weights.post_norm, theirs.pop("post_attention_layernorm.weight"))
        fused = [
            (weights.qkv.bias, ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")),
            (weights.o.bias, ("self_attn.o_proj.bias",)),
            (weights.gate_up.bias, ("mlp.gate_proj.bias", "mlp.up_proj.bias")),
            (weights.down.bias, ("mlp.down_proj.bias",)),
            (weights.q_norm, ("self_attn.q_norm.weight",)),
            (weights.k_norm, ("self_attn.k_norm.weight",)),
        ]
        for ours, keys in fused:
            if ours is not None:
                assert torch.equal(ours, torch.cat([theirs.pop(key) for key in keys]))
        assert not theirs  # nothing of the layer was left behind
    embedding = load_embedding(published.parts["embedding"], config)
    norm, head = load_final(published.parts["final"], config)
    assert torch.equal(embedding, state["model.embed_tokens.weight"])
    assert torch.equal(norm, state["model.norm.weight"])
    assert (head is None) is config.tied_head
    assert torch.equal(embedding if head is None else head, state["lm_head.weight"])


def test_a_published_directory_is_what_transformers_loaders_read(source: Path, tmp_path: Path) -> None:
    published = publish_model(source, tmp_path / "data", torch.bfloat16)
    assert read_config(AutoConfig.from_pretrained(published.directory)) == published.config
    ours, theirs = AutoTokenizer.from_pretrained(published.directory), AutoTokenizer.from_pretrained(source)
    chat = [{"role": "user", "content": "Grüße, 世界!"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= published.parts.keys()


def test_the_manifest_names_every_file_by_its_bytes(source: Path, tmp_path: Path) -> None:
    published = publish_model(source, tmp_path / "data", torch.float16)
    assert open_parts(published.directory) == published
    assert {part.path for part in published.parts.values()} == {
        path for path in published.directory.iterdir() if path.name != "manifest.json"
    }
    for part in published.parts.values():
        content = part.path.read_bytes()
        assert (part.sha256, part.nbytes) == (hashlib.sha256(content).hexdigest(), len(content))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_come_in_the_service_dtype(dtype: torch.dtype, source: Path, tmp_path: Path) -> None:
    published = publish_model(source, tmp_path / "data", dtype)
    weights = load_layer(published.parts["layer.2"], published.config)
    stored = load_file(source / "model.safetensors")["model.layers.2.mlp.down_proj.weight"]
    assert published.dtype == weights.down.weight.dtype == dtype
    assert torch.equal(weights.down.weight, stored.to(dtype))


def test_sharded_and_moved_models_are_the_same_model_in_every_dtype(tmp_path: Path) -> None:
    tiny_model("qwen3", tmp_path / "one file")
    tiny_model("qwen3", tmp_path / "shards", shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    tiny_model("qwen3", tmp_path / "another", seed=1)
    data = tmp_path / "data"
    whole = publish_model(tmp_path / "one file", data, torch.float32)
    shards = publish_model(tmp_path / "shards", data, torch.float32)
    assert shards.model_hash == whole.model_hash and shards.directory == whole.directory
    assert (whole.name, shards.name) == ("one file", "shards")
    elsewhere = publish_model(tmp_path / "shards", tmp_path / "data 2", torch.bfloat16)
    assert elsewhere.model_hash == whole.model_hash
    assert elsewhere.directory.name == f"{whole.model_hash[:16]}-bfloat16"
    assert publish_model(tmp_path / "another", data, torch.float32).model_hash != whole.model_hash
    again = publish_model(tmp_path / "shards", tmp_path / "data 3", torch.float32)  # not linked to the first
    assert {n: p.sha256 for n, p in again.parts.items()} == {n: p.sha256 for n, p in shards.parts.items()}


def test_the_config_belongs_to_the_hash(source: Path, tmp_path: Path) -> None:
    before = publish_model(source, tmp_path / "data", torch.float32)
    edit_config(source, rms_norm_eps=1e-5)
    assert publish_model(source, tmp_path / "data", torch.float32).model_hash != before.model_hash


def test_the_second_call_finds_what_the_first_made(source: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    first = publish_model(source, tmp_path / "data", torch.float32, lines.append)
    assert any("layer 4 of 4" in line for line in lines)
    lines.clear()
    start = time.perf_counter()
    second = publish_model(str(source), tmp_path / "data", torch.float32, lines.append)
    assert time.perf_counter() - start < 0.5
    assert second == first and lines == []


def test_a_new_chat_template_is_published_without_new_weights(source: Path, tmp_path: Path) -> None:
    first = publish_model(source, tmp_path / "data", torch.float32)
    inode = first.parts["layer.0"].path.stat().st_ino
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    second = publish_model(source, tmp_path / "data", torch.float32)
    assert second.model_hash == first.model_hash
    assert second.parts["chat_template.jinja"].path.read_text() == "{{ messages[0]['content'] }}"
    assert second.parts["layer.0"].path.stat().st_ino == inode


def test_weights_are_shared_by_copies_where_hard_links_are_not_to_be_had(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(path: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    first = publish_model(source, tmp_path / "data", torch.float32)
    (source / "chat_template.jinja").write_text("another")
    monkeypatch.setattr(Path, "hardlink_to", no_links)
    second = publish_model(source, tmp_path / "data", torch.float32)
    assert second.parts["layer.0"] == first.parts["layer.0"] and open_parts(second.directory) == second


def test_a_source_that_changes_while_it_is_read_is_refused(source: Path, tmp_path: Path) -> None:
    def meddle(line: str) -> None:
        if line.startswith("writing layer 2"):
            os.utime(source / "model.safetensors", (1, 1))

    with pytest.raises(ConfigurationError, match="changed while they were read"):
        publish_model(source, tmp_path / "data", torch.float32, meddle)
    assert [path.name for path in (tmp_path / "data" / "models").iterdir()] == [".lock"]


def test_changed_weights_are_another_model(source: Path, tmp_path: Path) -> None:
    first = publish_model(source, tmp_path / "data", torch.float32)
    change_tensors(source, lambda tensors: tensors["model.norm.weight"].add_(1e-3))
    second = publish_model(source, tmp_path / "data", torch.float32)
    assert second.model_hash != first.model_hash
    assert (
        load_final(second.parts["final"], second.config)[0][0] != load_final(first.parts["final"], first.config)[0][0]
    )


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update() if tensors.pop(name) is None else None


def put(name: str, make: Callable[[torch.Tensor | None], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: make(tensors.get(name))})


DOWN = "model.layers.1.mlp.down_proj.weight"
DAMAGED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "missing": (drop(DOWN), rf"lacks the tensor {DOWN}"),
    "shape": (put(DOWN, lambda t: torch.zeros(64, 95)), rf"{DOWN} the shape \(64, 95\).*\(64, 96\)"),
    "unknown": (put("model.layers.0.self_attn.sinks", lambda t: torch.zeros(4)), r"layers\.0\.self_attn\.sinks"),
    "bias": (put("model.layers.0.self_attn.q_proj.bias", lambda t: torch.zeros(64)), r"q_proj\.bias"),
    "a layer too many": (put("model.layers.4.input_layernorm.weight", lambda t: torch.ones(64)), r"layers\.4"),
    "quantized": (put(DOWN, lambda t: torch.zeros(64, 96, dtype=torch.int8)), rf"{DOWN} as torch.int8"),
    "nan": (put(DOWN, lambda t: torch.full((64, 96), torch.nan)), rf"{DOWN} is not finite.*stored so"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_checkpoint_that_does_not_fit_its_config_is_refused_by_tensor(
    kind: str, source: Path, tmp_path: Path
) -> None:
    change, named = DAMAGED[kind]
    change_tensors(source, change)
    with pytest.raises(ConfigurationError, match=named):
        publish_model(source, tmp_path / "data", torch.float32)
    assert [path.name for path in (tmp_path / "data" / "models").iterdir()] == [".lock"]


def test_values_too_large_for_float16_are_refused_by_tensor(source: Path, tmp_path: Path) -> None:
    change_tensors(source, put(DOWN, lambda t: torch.full((64, 96), 1e6)))
    with pytest.raises(ConfigurationError, match=rf"{DOWN} is not finite in float16 \(too large for float16\)"):
        publish_model(source, tmp_path / "data", torch.float16)
    publish_model(source, tmp_path / "data", torch.bfloat16)


def test_frequencies_that_older_checkpoints_carry_are_passed_over(source: Path, tmp_path: Path) -> None:
    change_tensors(source, put("model.layers.0.self_attn.rotary_emb.inv_freq", lambda t: torch.ones(8)))
    publish_model(source, tmp_path / "data", torch.float32)


def test_a_tied_head_may_be_stored_twice_or_either_way_but_not_differ(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model("llama", source, tie_word_embeddings=True)
    once = publish_model(source, tmp_path / "data", torch.float32)
    change_tensors(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert publish_model(source, tmp_path / "data", torch.float32).model_hash == once.model_hash
    change_tensors(source, drop("model.embed_tokens.weight"))
    assert publish_model(source, tmp_path / "data", torch.float32).model_hash == once.model_hash
    change_tensors(source, lambda t: t.update({"model.embed_tokens.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ConfigurationError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        publish_model(source, tmp_path / "data", torch.float32)


def cut_file(name: str) -> Callable[[Path], object]:
    return lambda source: os.truncate(source / name, (source / name).stat().st_size // 2)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda source: (source / "config.json").unlink(), r"has no config\.json"),
    "no weights": (lambda source: (source / "model.safetensors").unlink(), r"lacks model\.safetensors"),
    "pickled weights": (
        lambda source: (source / "model.safetensors").rename(source / "pytorch_model.bin"),
        "only safetensors",
    ),
    "no tokenizer": (lambda source: (source / "tokenizer.json").unlink(), r"tokenizer"),
    "half a tokenizer": (cut_file("tokenizer.json"), r"tokenizer\.json is damaged"),
    "half a config": (cut_file("config.json"), r"config\.json"),
    "half the weights": (cut_file("model.safetensors"), r"model\.safetensors"),
    "quantized": (lambda source: edit_config(source, quantization_config={"bits": 4}), "quantization_config"),
    "another family": (lambda source: edit_config(source, model_type="gpt2"), "llama, mistral, qwen2, qwen3"),
    "index of lost shards": (
        lambda source: (source / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}})
        ),
        "lacks model-00002-of-00002",
    ),
    "index out of the directory": (
        lambda source: (source / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"lm_head.weight": "../other.safetensors"}})
        ),
        "outside its own directory",
    ),
    "half an index": (
        lambda source: (source / "model.safetensors.index.json").write_text("{"),
        r"index\.json",
    ),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_directory_that_is_no_whole_model_is_refused_with_the_file(kind: str, source: Path, tmp_path: Path) -> None:
    spoil, named = SPOILED[kind]
    spoil(source)
    with pytest.raises(ConfigurationError, match=named):
        publish_model(source, tmp_path / "data", torch.float32)


def test_a_damaged_publication_is_made_anew(source: Path, tmp_path: Path) -> None:
    def spoil_and_publish(name: str, spoil: Callable[[Path], object]) -> ModelParts:
        spoil(first.directory / name)
        with pytest.raises(ConfigurationError):
            open_parts(first.directory)
        return publish_model(source, tmp_path / "data", torch.float32)

    first = publish_model(source, tmp_path / "data", torch.float32)
    for name, spoil in (
        ("layer.1.safetensors", lambda path: os.truncate(path, 100)),
        ("tokenizer.json", Path.unlink),
        ("manifest.json", lambda path: path.write_text("{}")),
    ):
        again = spoil_and_publish(name, spoil)
        assert again == first
        assert load_layer(again.parts["layer.1"], again.config).down.weight.shape == (64, 96)


def test_what_a_killed_process_left_is_cleared_away(source: Path, tmp_path: Path) -> None:
    left = tmp_path / "data" / "models" / ".partial-12345"
    left.mkdir(parents=True)
    (left / "layer.0.safetensors").write_bytes(b"half a layer")
    (tmp_path / "data" / "models" / "index.json").write_text("half an ind")
    published = publish_model(source, tmp_path / "data", torch.float32)
    assert open_parts(published.directory) == published
    assert sorted(path.name for path in left.parent.iterdir()) == [".lock", published.directory.name, "index.json"]


def test_two_at_once_make_it_once(source: Path, tmp_path: Path) -> None:
    results: list[ModelParts] = []
    lines: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(publish_model(source, tmp_path / "data", torch.float32, lines.append))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(result == results[0] for result in results)
    assert lines.count("writing layer 1 of 4") == 1


def test_a_full_disk_is_a_store_error_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))  # writing past it fails as a full disk does
        with pytest.raises(StoreError, match="free some room"):
            publish_model(source, tmp_path / "data", torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "data" / "models").iterdir()] == [".lock"]
    publish_model(source, tmp_path / "data", torch.float32)


def test_too_little_room_is_said_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StoreError, match=r"needs [\d,]+ bytes .* 1,000 are free"):
        publish_model(source, tmp_path / "data", torch.float32)


def test_a_data_directory_that_cannot_be_made_is_a_store_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(StoreError, match="data directory"):
        publish_model(source, tmp_path / "data", torch.float32)


def test_other_dtypes_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="float32, bfloat16, float16"):
        publish_model(source, tmp_path / "data", torch.int8)


def test_a_part_that_is_not_the_configs_is_refused_by_tensor(source: Path, tmp_path: Path) -> None:
    published = publish_model(source, tmp_path / "data", torch.float32)
    config = published.config
    wider = read_config(config.hf | {"intermediate_size": 128})
    with pytest.raises(ConfigurationError, match=r"tensor down in .*layer\.0.*\(64, 96\).*\(64, 128\)"):
        load_layer(published.parts["layer.0"], wider)
    with pytest.raises(ConfigurationError, match=r"tensor o_bias .* absent"):
        load_layer(published.parts["layer.0"], read_config(config.hf | {"attention_bias": True}))
    with pytest.raises(ConfigurationError, match=r"tensor head .* absent"):
        load_final(published.parts["final"].path, read_config(config.hf | {"tie_word_embeddings": True}))
    with pytest.raises(ConfigurationError, match=r"tensor head in .*final"):
        load_embedding(published.parts["final"], config)
    half = tmp_path / "half.safetensors"
    half.write_bytes(published.parts["layer.0"].path.read_bytes()[:5000])
    for path in (half, tmp_path / "absent.safetensors"):
        with pytest.raises(ConfigurationError, match=path.name):
            load_layer(path, config)


def test_projections_of_wide_grouped_heads_split_where_they_meet() -> None:
    q, kv, d, m = 6, 2, 3, 5
    rows = torch.arange((q + 2 * kv) * d).view(-1, d)
    one = torch.ones(1)
    qkv, o, gate_up, down = map(Linear, (rows, torch.zeros(d, q), torch.zeros(2 * m, d), torch.zeros(d, m)))
    layer = LayerWeights(one, qkv, None, None, o, one, gate_up, down)
    sizes = {name: tensor.shape[0] for name, tensor in layer.projections().items()}
    assert sizes == {"q": q, "k": kv, "v": kv, "o": d, "gate": m, "up": m, "down": d}
    assert torch.equal(layer.projections()["v"], rows[-kv:])


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache and no network, as HF_HOME and HF_HUB_OFFLINE=1 set them up."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_hub_name_is_found_in_the_local_cache(source: Path, hub_cache: Path, tmp_path: Path) -> None:
    repository = hub_cache / "models--someone--Tiny-1M"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots").mkdir()
    shutil.copytree(source, repository / "snapshots" / "c0ffee")
    published = publish_model("someone/Tiny-1M", tmp_path / "data", torch.float32)
    assert published.name == "someone/Tiny-1M"
    assert published.model_hash == publish_model(source, tmp_path / "data", torch.float32).model_hash
    (repository / "snapshots" / "c0ffee" / "model.safetensors").unlink()  # a download that broke off
    with pytest.raises(ConfigurationError, match=r"someone--Tiny-1M.* lacks model\.safetensors"):
        publish_model("someone/Tiny-1M", tmp_path / "data", torch.float32)


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_an_unknown_model_is_refused_with_what_to_do(name: str, hub_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Give a GGUF file or a model directory, or check the name"):
        publish_model(name, tmp_path / "data", torch.float32)


@pytest.mark.parametrize("name", ["./nothing", "/no/such/model", "a/b/c", "nothing.gguf", "", "-x/y"])
def test_a_path_that_is_not_there_is_never_asked_of_the_hub(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"does not exist|no config"):
        publish_model(name, tmp_path / "data", torch.float32)


def test_an_unsupported_config_is_refused_before_the_weights_are_read(source: Path, tmp_path: Path) -> None:
    edit_config(source, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    (source / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        publish_model(source, tmp_path / "data", torch.float32)

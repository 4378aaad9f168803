"""Where a model comes from: a directory of safetensors, a name on the Hugging Face hub, or a GGUF file.

`publish.publish_model` opens a source and asks it for its config, its hash, its `Checkpoint` and its tokenizer files.
A directory is read tensor by tensor, so no more than one is in memory at a time.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from privatelora.decoder.checkpoint import (
    GENERATION_CONFIG,
    TOKENIZER_FILES,
    Checkpoint,
    Say,
    convert_tokenizer,
)
from privatelora.decoder.config import ModelConfig, load_config
from privatelora.decoder.gguf_source import GgufSource
from privatelora.protocol.errors import ConfigurationError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_FILES = ["config.json", GENERATION_CONFIG, "*.safetensors", INDEX, *TOKENIZER_FILES]


class Source(Protocol):
    """One place that a model can be read from."""

    name: str

    def files(self) -> list[Path]:
        """Every file that the published model is made from."""

    def config(self) -> ModelConfig: ...

    def model_hash(self, config: ModelConfig, say: Say) -> str:
        """sha256 over the weights and the config, whatever the path and the service's dtype."""

    def checkpoint(self, config: ModelConfig) -> Checkpoint: ...

    def write_tokenizer(self, target: Path) -> None:
        """Write tokenizer.json and what stands beside it into the directory `target`."""


def open_source(source: str | Path, say: Say) -> Source:
    """Find out what `source` is: a GGUF file, a model directory, or a hub name (cached, else downloaded)."""
    path = Path(source).expanduser()
    if path.is_file():
        return GgufSource(path.absolute())
    if path.is_dir():
        return DirectorySource(path.absolute(), path.absolute().name)
    name = str(source)
    if HUB_NAME.fullmatch(name) and not name.endswith(".gguf"):
        return DirectorySource(_hub_directory(name, say), name)
    raise ConfigurationError(
        f"model source {name!r} does not exist; give a GGUF file, a directory with config.json and safetensors, or a "
        "hub name such as HuggingFaceTB/SmolLM2-135M-Instruct"
    )


class DirectorySource:
    """A directory with config.json, safetensors (one file, or shards and their index) and tokenizer files."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory, self.name = directory, name
        if not (directory / "config.json").is_file():
            raise ConfigurationError(
                f"model directory {directory} has no config.json; give a directory as transformers saves it, or a GGUF "
                "file itself"
            )
        self.shards = self._find_shards()

    def files(self) -> list[Path]:
        names = ("config.json", GENERATION_CONFIG, INDEX, *TOKENIZER_FILES)
        return [path for path in (self.directory / name for name in names) if path.is_file()] + self.shards

    def config(self) -> ModelConfig:
        return load_config(self.directory / "config.json")

    def model_hash(self, config: ModelConfig, say: Say) -> str:
        return self.checkpoint(config).digest(say)

    def checkpoint(self, config: ModelConfig) -> Checkpoint:
        return Checkpoint(_Shards(self.shards), config, f"model directory {self.directory}")

    def write_tokenizer(self, target: Path) -> None:
        tokenizer = self.directory / "tokenizer.json"
        if tokenizer.is_file():
            try:
                json.loads(tokenizer.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigurationError(f"{tokenizer} is damaged: {error}; fetch the model again") from error
            for name in TOKENIZER_FILES:
                if (self.directory / name).is_file():
                    shutil.copyfile(self.directory / name, target / name)
        else:
            convert_tokenizer(self.directory, target)
        if (self.directory / GENERATION_CONFIG).is_file():
            shutil.copyfile(self.directory / GENERATION_CONFIG, target / GENERATION_CONFIG)

    def _find_shards(self) -> list[Path]:
        index = self.directory / INDEX
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise ConfigurationError(f"cannot read {index}: {error!r}; fetch the model again") from error
            if foreign := [name for name in names if Path(name).name != name]:
                raise ConfigurationError(f"{index} names the file {foreign[0]!r} outside its own directory; correct it")
            shards = [self.directory / name for name in names]
        else:
            shards = [self.directory / SINGLE]
        if absent := [path.name for path in shards if not path.is_file()]:
            raise ConfigurationError(
                f"model directory {self.directory} lacks {absent[0]} ({len(absent)} of {len(shards)} weight files); "
                "only safetensors are read: save the model with transformers' save_pretrained, or fetch it again"
            )
        return shards


class _Shards(Mapping[str, Tensor]):
    """Tensors of several safetensors files by name, each read from disk when it is asked for."""

    def __init__(self, paths: list[Path]) -> None:
        self._where: dict[str, Any] = {}
        for path in paths:
            try:
                handle: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ConfigurationError(f"cannot read {path}: {error}; fetch the model again") from error
            self._where |= dict.fromkeys(handle.keys(), handle)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _hub_directory(name: str, say: Say) -> Path:
    """The snapshot of a hub model in the local cache, complete; downloaded only where it is not there.

    huggingface_hub itself honours HF_HOME, HF_TOKEN and HF_HUB_OFFLINE.
    """
    try:
        cached = Path(snapshot_download(name, local_files_only=True, allow_patterns=HUB_FILES))
        DirectorySource(cached, name)  # raises where an earlier download broke off
        return cached
    except (OSError, ValueError, ConfigurationError):
        say(f"fetching {name} from the Hugging Face hub")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client lets through errors of whichever HTTP library it uses
        reason = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
        raise ConfigurationError(
            f"model {name!r} is neither a path here nor in the Hugging Face cache, and cannot be downloaded: {reason} "
            "Give a GGUF file or a model directory, or check the name, HF_TOKEN, HF_HUB_OFFLINE and the network."
        ) from error

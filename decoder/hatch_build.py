"""Compiles kernels.c when the decoder is installed: hatchling calls this for a wheel and for an editable install.

The library is put beside kernels.c, from where `kernels.py` loads it. Without a working C compiler the install goes on
and torch does the kernels' work; `CC` names another compiler than `cc`.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sysconfig
import zlib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ["-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-march=x86-64-v3")  # AVX2; `runs_here` of kernels.c says whether a CPU has it


class KernelBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        folder = Path(self.root, "privatelora", "decoder")
        library = folder / "libkernels.so"
        problem = compile_kernels(folder / "kernels.c", library)
        if problem:
            self.app.display_warning(f"privatelora-decoder is installed without its compiled kernels: {problem}")
            return
        build_data["artifacts"].append(str(library.relative_to(self.root)))  # though git ignores it
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def compile_kernels(source: Path, library: Path) -> str | None:
    """Compile `source` into `library`; says in one line why it could not be done, in which case there is no library."""
    library.unlink(missing_ok=True)
    made = library.with_suffix(".tmp")  # renamed when whole, since a running process may have the old one mapped
    define = f"-DSOURCE={zlib.crc32(source.read_bytes())}u"
    command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, define, str(source), "-o", str(made), "-lm"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return f"{shlex.join(command[:1])}: {detail[0] if detail else 'failed'}"
    made.replace(library)
    return None

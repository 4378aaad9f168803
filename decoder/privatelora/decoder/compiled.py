"""Finds a library of C that `hatch_build.py` compiled when a package was installed, as `kernels.py` needs one."""

from __future__ import annotations

import ctypes
import zlib
from pathlib import Path


def load(source: Path) -> ctypes.CDLL | None:
    """The library made of `source`, beside it; None if there is none that was made of it as it is now.

    `kernels.c` becomes `libkernels.so`, which tells the checksum of its source as `uint32_t source`.
    """
    try:
        library = ctypes.CDLL(str(source.with_name(f"lib{source.stem}.so")))
        made_of = ctypes.c_uint32.in_dll(library, "source").value
        return library if made_of == zlib.crc32(source.read_bytes()) else None  # else its arguments may be others
    except (OSError, ValueError):
        return None

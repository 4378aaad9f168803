"""Compiled steps of a layer for decoded tokens: the typed face of kernels.c.

`hatch_build.py` compiles kernels.c to a library beside this file when the package is installed. Where that could not be
done, and for tensors that it does not read, `available` is False and the caller takes torch's way.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from privatelora.decoder import compiled
from privatelora.decoder.kv import BLOCK
from privatelora.protocol.errors import ServiceError

TILE = 16
"""Columns of B that lie together when it is packed."""

SOURCE = Path(__file__).with_name("kernels.c")

DTYPES = (torch.float32, torch.bfloat16)


class _Shape(ctypes.Structure):
    """`Shape` of kernels.c."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("n", "max_blocks", "num_blocks", "layers", "slot", "window")),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "head_dim")),
        ("eps", ctypes.c_float),
    )


def available(pool_dtype: torch.dtype, device_type: str) -> bool:
    """Whether the functions below can be called for tensors of this dtype on a device of this type."""
    return device_type == "cpu" and pool_dtype in DTYPES and _library(SOURCE) is not None


def decode_attention(
    qkv: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    pool: Tensor,
    slot: int,
    blocks: Tensor,
    positions: Tensor,
    window: int | None,
    heads: int,
    kv_heads: int,
) -> Tensor:
    """Attention of n decoded tokens, each the next one of its own sequence, over a block KV cache: (n, H * e).

    Norms and rotates q and k, writes the new k and v into the pool, and attends; a row's result does not depend on the
    others. All tensors are contiguous, on the CPU and of the pool's dtype but where another is named. H query heads,
    K key-value heads, e head_dim. No gradients.

    Parameters
    ----------
    qkv : (n, (H + 2 K) * e), before norm and rotary.
    cos, signed_sin : (n, e), as `functions.rotate` takes them.
    q_norm, k_norm : (e,) weights of the RMS norm of each head, of `eps`, or None.
    pool : (num_blocks, layers, 2, K, e * BLOCK). Of block b in layer `slot`, keys are pool[b, slot, 0] viewed as
        (K, e, BLOCK) and values pool[b, slot, 1] viewed as (K, BLOCK, e).
    blocks : (n, m) int32, the blocks of each row's sequence in order; those before a window are not read.
    positions : (n,) int32, position of the new token: it goes to block blocks[i, position // BLOCK].
    window : how many keys a token sees, its own included; None or 0: all.

    Raises
    ------
    ServiceError : a shape or dtype does not fit, or a position or a block is not in the pool; nothing was written.
    """
    dtype = pool.dtype
    n, m = blocks.shape
    num_blocks, layers, two, kept_heads, elements = pool.shape
    e = elements // BLOCK
    fits = (  # written out: a loop over the tensors takes as long as one row's attention
        (two, kept_heads, elements % BLOCK, e % 2, heads % kv_heads) == (2, kv_heads, 0, 0, 0)
        and 0 <= slot < layers
        and heads > 0
        and (window is None or window >= 0)
        and _holds(qkv, dtype, n * (heads + 2 * kv_heads) * e)
        and _holds(cos, dtype, n * e)
        and _holds(signed_sin, dtype, n * e)
        and _holds(pool, dtype, num_blocks * layers * 2 * kv_heads * elements)
        and _holds(blocks, torch.int32, n * m)
        and _holds(positions, torch.int32, n)
        and (q_norm is None or _holds(q_norm, dtype, e))
        and (k_norm is None or _holds(k_norm, dtype, e))
    )
    library = _library(SOURCE)
    if not fits or library is None or dtype not in DTYPES:
        raise ServiceError(
            f"decode_attention cannot take qkv {tuple(qkv.shape)} {qkv.dtype} with a pool {tuple(pool.shape)} {dtype} "
            f"on {pool.device}; see its docstring, and ask `available` first"
        )
    out = torch.empty((n, heads * e), dtype=dtype)
    shape = _Shape(n, m, num_blocks, layers, slot, window or 0, heads, kv_heads, e, eps)
    status = library.decode_attention(
        dtype is torch.bfloat16,
        shape,
        out.data_ptr(),
        qkv.data_ptr(),
        cos.data_ptr(),
        signed_sin.data_ptr(),
        None if q_norm is None else q_norm.data_ptr(),
        None if k_norm is None else k_norm.data_ptr(),
        pool.data_ptr(),
        blocks.data_ptr(),
        positions.data_ptr(),
    )
    if status > 0:
        row = status - 1
        raise ServiceError(
            f"decode_attention: row {row} at position {int(positions[row])} has blocks {blocks[row].tolist()} "
            f"of a pool of {num_blocks}; give each position a block of the pool"
        )
    if status:
        raise ServiceError("decode_attention: no memory for its scores")
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`functions.rms_norm` of x (n, d) with weight (d,), both contiguous and of one dtype; no gradients."""
    n, d = x.shape
    library = _library(SOURCE)
    if library is None or x.dtype not in DTYPES or not (_holds(x, x.dtype, n * d) and _holds(weight, x.dtype, d)):
        raise ServiceError(f"rms_norm cannot take x {tuple(x.shape)} {x.dtype} with a weight {tuple(weight.shape)}")
    out = torch.empty((n, d), dtype=x.dtype)
    if library.rms_norm(x.dtype is torch.bfloat16, n, d, eps, out.data_ptr(), x.data_ptr(), weight.data_ptr()):
        raise ServiceError("rms_norm: no memory for a row")
    return out


def pack_b(b: Tensor) -> Tensor:
    """B (q+k+v, r_up) as `add_delta` reads it: (tiles, r_up, TILE), of which [:, :r] is that of a smaller rank."""
    return b.view(-1, TILE, b.shape[1]).transpose(1, 2).contiguous()


def can_add_delta(b: Tensor, q_size: int, kv_size: int) -> bool:
    """Whether `add_delta` can be called with this B (q+k+v, r_up)."""
    return available(b.dtype, b.device.type) and not (q_size % TILE or kv_size % TILE)


def add_delta(qkv: Tensor, v: Tensor, packed_b: Tensor, q_size: int, kv_size: int) -> None:
    """q, k, v += v_p B_p, in place and rounded once: `layer.add_delta` for a few rows; no gradients.

    qkv (n, q+k+v) and v (n, 3, r), contiguous; packed_b (tiles, r, TILE) from `pack_b`; sizes multiples of TILE.
    """
    n, width = qkv.shape
    tiles, r, columns = packed_b.shape
    dtype = qkv.dtype
    fits = (
        width == q_size + 2 * kv_size == tiles * TILE
        and (columns, q_size % TILE, kv_size % TILE) == (TILE, 0, 0)
        and packed_b.stride()[1:] == (TILE, 1)
        and packed_b.dtype is dtype
        and packed_b.is_cpu
        and _holds(qkv, dtype, n * width)
        and _holds(v, dtype, n * 3 * r)
    )
    library = _library(SOURCE)
    if not fits or library is None or dtype not in DTYPES:
        raise ServiceError(
            f"add_delta cannot take qkv {tuple(qkv.shape)} {dtype}, v {tuple(v.shape)} {v.dtype} and a packed B "
            f"{tuple(packed_b.shape)}; see its docstring, and ask `available` first"
        )
    pointers = qkv.data_ptr(), v.data_ptr(), packed_b.data_ptr()
    if library.add_delta(dtype is torch.bfloat16, n, q_size, kv_size, r, packed_b.stride(0), *pointers):
        raise ServiceError("add_delta: no memory for its sums")


def _holds(x: Tensor, dtype: torch.dtype, elements: int) -> bool:
    """Whether the kernel may read `elements` of dtype from x's address on."""
    return x.dtype is dtype and x.numel() == elements and x.is_contiguous() and x.is_cpu


@cache
def _library(source: Path) -> ctypes.CDLL | None:
    """What was compiled of `source`; None if there is nothing, or nothing for this CPU."""
    library = compiled.load(source)
    if library is None or not library.runs_here():
        return None
    number, pointer = ctypes.c_int, ctypes.c_void_p
    library.decode_attention.argtypes = (number, ctypes.POINTER(_Shape), *(pointer,) * 9)
    library.rms_norm.argtypes = (number, number, number, ctypes.c_float, *(pointer,) * 3)
    library.add_delta.argtypes = (*(number,) * 5, ctypes.c_int64, *(pointer,) * 3)
    return library

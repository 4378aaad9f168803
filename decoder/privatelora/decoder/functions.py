"""Parts of the layer with a backward pass of their own: RMS norm, rotary embedding, gated SiLU, attention's core.

Autograd would give the same gradients from its records of every step; these take half of the kernels and keep little
but their inputs. Each part is a function, whose autograd both ends' layers use, and its `*_back`, the one place where
its derivative is written: what autograd calls, and what `backward.py` calls without autograd. Weights and tables are
frozen, so only the hidden states' gradients are formed. Results are written in place where they can be: memory fresh
from the system costs more than the arithmetic on it. Tried with torch 2.13, of which `silu.out`, `silu_backward` and
`_softmax_backward_data` are called by name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from privatelora.decoder import kernels

COMPILED_NORM_ROWS = 64
"""Rows up to which the compiled `kernels.rms_norm` is used: 4 us against torch's 12 at one row, 15 against 30 at 64."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, computed in float32."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        few = x.ndim == 2 and x.shape[0] <= COMPILED_NORM_ROWS and x.is_contiguous() and x.dtype is weight.dtype
        if few and kernels.available(x.dtype, x.device.type):
            return kernels.rms_norm(x, weight, eps)
        return F.rms_norm(x, weight.shape, weight, eps)
    y: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]  # torch leaves it bare
    return y


def rms_norm_back(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """dL/dy to dL/dx of `rms_norm`, both (..., d); `scale` (..., 1) from `rms_scale(x, eps)`."""
    unit = x * scale  # x / rms(x), float32
    g = grad * weight.float()
    along = (g * unit).mean(-1, keepdim=True)
    return g.addcmul_(unit, along, value=-1).mul_(scale).to(x.dtype)


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """1 / rms(x) in float32: (..., d) to (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(norm.square() / x.shape[-1] + eps)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary position embedding of x (n, heads, e).

    cos and signed_sin (n, e); the first half of signed_sin is negative, so that swapping the halves of x is enough.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _rotated(x, cos, signed_sin)
    y: Tensor = _Rotate.apply(x, cos, signed_sin)  # type: ignore[no-untyped-call]  # torch leaves it bare
    return y


def rotate_back(grad: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """dL/dy to dL/dx of `rotate`, both (n, heads, e)."""
    return (grad * signed_sin[:, None]).roll(grad.shape[-1] // 2, -1).addcmul_(grad, cos[:, None])


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: (n, 2m) to (n, m)."""
    if not (torch.is_grad_enabled() and gate_up.requires_grad):
        return _gated(gate_up)
    y: Tensor = _GatedSilu.apply(gate_up)  # type: ignore[no-untyped-call]  # torch leaves it bare
    return y


def gated_silu_back(grad: Tensor, gate_up: Tensor) -> Tensor:
    """dL/dy (n, m) to dL/d(gate_up) (n, 2m) of `gated_silu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    both = torch.empty_like(gate_up)
    d_gate, d_up = both.chunk(2, dim=-1)
    torch.ops.aten.silu.out(gate, out=d_up)
    d_up.mul_(grad)
    torch.mul(grad, up, out=d_gate)
    torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
    return both


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """softmax(q keys^T / sqrt(e) + mask) values, of B heads: q (B, rows, e), keys and values (B, T, e), mask (rows, T).

    Plain matmuls: in bfloat16 on a CPU, torch's fused kernel took 2.0 to 2.8 ms forward and backward where these take
    0.5 ms (128 tokens, 9 heads, 3 key-value heads).
    """
    if not (torch.is_grad_enabled() and (q.requires_grad or keys.requires_grad or values.requires_grad)):
        return torch.bmm(_shares(q, keys, mask), values)
    y: Tensor = _Attend.apply(q, keys, values, mask)  # type: ignore[no-untyped-call]  # torch leaves it bare
    return y


def attend_back(
    grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, shares: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dy (B, rows, e) to the gradients of q, keys and values of `attend`; no mask: every key is visible.

    `shares` (B, rows, T), each key's share in a row of y, is made again from q and keys unless it was kept.
    """
    if shares is None:
        shares = _shares(q, keys, mask)
    d_values = torch.bmm(shares.transpose(1, 2), grad)
    d_shares = torch.bmm(grad, values.transpose(1, 2))
    d_scores = torch.ops.aten._softmax_backward_data.out(d_shares, shares, -1, shares.dtype, grad_input=d_shares)
    scale = q.shape[-1] ** -0.5
    d_q = torch.baddbmm(q, d_scores, keys, beta=0, alpha=scale)  # beta=0: q gives its shape only
    d_keys = torch.baddbmm(keys, d_scores.transpose(1, 2), q, beta=0, alpha=scale)
    return d_q, d_keys, d_values


def _shares(q: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    scale = q.shape[-1] ** -0.5
    if mask is None:
        return torch.softmax(torch.bmm(q * scale, keys.transpose(1, 2)), dim=-1)
    return torch.softmax(torch.baddbmm(mask, q, keys.transpose(1, 2), alpha=scale), dim=-1)


def _rotated(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    return x * cos[:, None] + x.roll(x.shape[-1] // 2, -1) * signed_sin[:, None]


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = rms_scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        return rms_norm_back(grads[0], x, weight, scale), None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, signed_sin)
        return _rotated(x, cos, signed_sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, signed_sin = ctx.saved_tensors
        return rotate_back(grads[0], cos, signed_sin), None, None


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _gated(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return gated_silu_back(grads[0], gate_up)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        shares = _shares(q, keys, mask)
        ctx.save_for_backward(q, keys, values, shares)
        return torch.bmm(shares, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, keys, values, shares = ctx.saved_tensors
        return *attend_back(grads[0], q, keys, values, None, shares), None

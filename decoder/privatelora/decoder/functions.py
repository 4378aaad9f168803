"""Elementwise parts of the layer with a backward pass of their own: RMS norm, rotary embedding, gated SiLU.

Autograd would give the same gradients from its records of every step; these take half of the kernels and keep little
but their inputs. The layers of both ends call them. Weights and tables are frozen, so only the hidden states' gradients
are formed. Tried with torch 2.13, whose `silu_backward` is called by name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, computed in float32."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return F.rms_norm(x, weight.shape, weight, eps)
    y: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]  # torch leaves it bare
    return y


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary position embedding of x (n, heads, e).

    cos and signed_sin (n, e); the first half of signed_sin is negative, so that swapping the halves of x is enough.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _rotated(x, cos, signed_sin)
    y: Tensor = _Rotate.apply(x, cos, signed_sin)  # type: ignore[no-untyped-call]  # torch leaves it bare
    return y


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: (n, 2m) to (n, m)."""
    if not (torch.is_grad_enabled() and gate_up.requires_grad):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    y: Tensor = _GatedSilu.apply(gate_up)  # type: ignore[no-untyped-call]  # torch leaves it bare
    return y


def _rotated(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    return x * cos[:, None] + x.roll(x.shape[-1] // 2, -1) * signed_sin[:, None]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x * scale  # x / rms(x), float32
        g = grads[0] * weight.float()
        along = (g * unit).mean(-1, keepdim=True)
        return torch.addcmul(g, unit, along, value=-1).mul_(scale).to(x.dtype), None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, signed_sin)
        return _rotated(x, cos, signed_sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, signed_sin = ctx.saved_tensors
        g = grads[0]
        return g * cos[:, None] + (g * signed_sin[:, None]).roll(g.shape[-1] // 2, -1), None, None


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_up)
        d_gate, d_up = both.chunk(2, dim=-1)
        torch.mul(grads[0], F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=d_gate)
        return both

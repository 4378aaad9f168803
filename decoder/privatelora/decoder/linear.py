"""A frozen linear layer, run by oneDNN from a copy of its weight in oneDNN's own layout where the CPU has it.

`LayerWeights` is made of these, so is the device's LM head, and `layer.py` calls them. A token being decoded is bound
by how fast weights are read: on one core, bfloat16, `F.linear` got through 17 GB/s of row-major ones, and from the
packed copy it is 32. In float32 `F.linear` asks MKL, which on an AMD CPU took 1.6 to 2 times oneDNN's time.

The operators are the ones that torch.compile's CPU backend calls (torch 2.13); without them, `F.linear` it is. On that
CPU the numbers were `F.linear`'s own, bit for bit, at every shape of SmolLM2: in bfloat16 because both are oneDNN's, in
float32, from four rows on, by `CHAIN`; for fewer rows they differ by rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LAYOUT_ROWS = 128
"""Rows of x that the layout is made for. Any from 16 on were equally good from 1 row to 512; 1 was slower."""

CHAIN = 192
"""Columns of a float32 weight whose products are added up in one go, and then to the rest, as MKL does. In one go over
1536 columns the rounding error is twice as large, and a gradient of layer 0 was off by 1e-4 of its norm."""


class Linear:
    """y = x W^T + b, differentiable in x; W and b are frozen.

    weight : (out, in) as published; on a CPU a memory map of the file, which only `back` uses once it is packed.
    bias : (out,), or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        packs = weight.device.type == "cpu" and _can_pack(weight.dtype)
        self._packed = [_pack(part) for part in _cut(weight)] if packs else None

    def __call__(self, x: Tensor) -> Tensor:
        """x (n, in) to y (n, out)."""
        if self._packed is None:
            return F.linear(x, self.weight, self.bias)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return _onednn(x, self._packed, self.bias)
        y: Tensor = _Packed.apply(x, self, self._packed)  # type: ignore[no-untyped-call]  # torch leaves it bare
        return y

    def back(self, grad: Tensor) -> Tensor:
        """dL/dy (n, out) to dL/dx (n, in)."""
        return grad @ self.weight if self._packed is None else _onednn(grad, _cut(self.weight.T))


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Linear, packed: Sequence[Tensor]) -> Tensor:
        ctx.linear = linear
        return _onednn(x, packed, linear.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.linear.back(grads[0]), None, None


def _cut(weight: Tensor) -> Sequence[Tensor]:
    """The columns of a weight (out, in), in parts as `CHAIN` says."""
    return torch.split(weight, CHAIN, dim=1) if weight.dtype is torch.float32 else (weight,)


def _pack(part: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(part.contiguous(), LAYOUT_ROWS)
    return packed


def _onednn(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """x W^T + b; `parts` of W from `_cut`, packed or of any strides."""
    first, *others = parts
    columns = torch.split(x, CHAIN, dim=1) if others else (x,)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(columns[0], first, bias, "none", [], "")
    for x_part, part in zip(columns[1:], others, strict=True):
        y = torch.ops.mkldnn._linear_pointwise.binary(x_part, y, part, None, "add")
    return y


@cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch on this CPU has the operators for `dtype`."""
    try:
        one = torch.eye(2 * CHAIN, device="cpu").to(dtype)
        there, back = _onednn(one, [_pack(part) for part in _cut(one)]), _onednn(one, _cut(one.T))
        return torch.equal(there, one) and torch.equal(back, one)
    except (AttributeError, RuntimeError):  # no oneDNN in this build, or none for the dtype on this CPU
        return False

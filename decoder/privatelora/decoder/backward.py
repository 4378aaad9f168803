"""The backward pass of a frozen layer by hand, from saved rows: what a service trains through.

    forward                               kept                backward
    x   = normed(h)                                           dh  = dh + normed_back(layer, h, dx)
    u   = encode(x)                                           dx += encode_back(du)           (inline only)
    qkv = project(layer, x)                                   dx  = layer.qkv.back(dqkv)
    qkv = add_delta(qkv, v)                                   dv  = add_delta_back(dqkv)      (inline only)
    h, saved = finish_keeping(h, qkv)     Saved, n rows       dh, dqkv = finish_back(saved, dh)

Autograd's graph of a batch is one piece. What is kept here are plain tensors with a row for each row of the batch, so a
pass may go back with other sequences beside it than it went forward with: `Saved.of_rows` and `Saved.joined` regroup
them, the derivatives are those of `functions.py`, and nothing needs autograd. Whole sequences only: no KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from privatelora.decoder.config import ModelConfig
from privatelora.decoder.functions import (
    attend_back,
    gated_silu,
    gated_silu_back,
    rms_norm,
    rms_norm_back,
    rms_scale,
    rotate_back,
)
from privatelora.decoder.layer import InlineWeights, attention, fold_heads, rotated_heads, unfold_heads
from privatelora.decoder.ragged import Ragged
from privatelora.decoder.weights import LayerWeights


@dataclass(frozen=True)
class Saved:
    """What the backward pass of one layer needs, a row for each row of the batch.

    h (n, d) before the layer, qkv (n, q+k+v) with the adapter's delta, h_mid (n, d) after attention, gate_up (n, 2m)
    before SiLU. The last two are None where `finish_back` is to make them again. A row and layer of SmolLM2-135M in
    bfloat16 has 10,368 bytes with them; without them 3,072, and a backward pass of half as much time again. Attention's
    shares are always made again: 4% of the backward pass for 2,304 bytes at 128 tokens, and more with the length.
    """

    h: Tensor
    qkv: Tensor
    h_mid: Tensor | None = None
    gate_up: Tensor | None = None

    def of_rows(self, rows: slice) -> Saved:
        """The same of some rows: views, so that the whole is freed with the last of its parts."""
        if self.h_mid is None or self.gate_up is None:
            return Saved(self.h[rows], self.qkv[rows])
        return Saved(self.h[rows], self.qkv[rows], self.h_mid[rows], self.gate_up[rows])

    @classmethod
    def joined(cls, parts: Sequence[Saved]) -> Saved:
        """The same of several batches of one layer, end to end; what one of them lacks is made again for all."""
        if len(parts) == 1:
            return parts[0]
        h, qkv = torch.cat([part.h for part in parts]), torch.cat([part.qkv for part in parts])
        mids = [part.h_mid for part in parts if part.h_mid is not None]
        gates = [part.gate_up for part in parts if part.gate_up is not None]
        if len(mids) < len(parts) or len(gates) < len(parts):
            return cls(h, qkv)
        return cls(h, qkv, torch.cat(mids), torch.cat(gates))


def finish_keeping(
    config: ModelConfig, index: int, layer: LayerWeights, h: Tensor, qkv: Tensor, ragged: Ragged, recompute: bool
) -> tuple[Tensor, Saved]:
    """`layer.finish`, and what its backward pass needs: all of it, or with `recompute` what the rest follows from."""
    h_mid, gate_up = _to_gate_up(config, index, layer, h, qkv, ragged)
    saved = Saved(h, qkv) if recompute else Saved(h, qkv, h_mid, gate_up)
    return layer.down(gated_silu(gate_up)).add_(h_mid), saved


def finish_back(
    config: ModelConfig, index: int, layer: LayerWeights, saved: Saved, dh: Tensor, ragged: Ragged
) -> tuple[Tensor, Tensor]:
    """dL/dh after the layer to what dL/dh before it has from the residual stream, both (n, d), and dL/dqkv (n, q+k+v).

    `ragged` lays out the rows of `saved` and dh; they need not be the batch of the forward pass.
    """
    h_mid, gate_up = saved.h_mid, saved.gate_up
    if h_mid is None or gate_up is None:
        h_mid, gate_up = _to_gate_up(config, index, layer, saved.h, saved.qkv, ragged)
    d_gate_up = gated_silu_back(layer.down.back(dh), gate_up)  # (n, 2m)
    dx = layer.gate_up.back(d_gate_up)  # (n, d)
    dh = rms_norm_back(dx, h_mid, layer.post_norm, rms_scale(h_mid, config.norm_eps)).add_(dh)
    return dh, _attention_back(config, index, layer, saved.qkv, layer.o.back(dh), ragged)


def add_delta_back(config: ModelConfig, dqkv: Tensor, inline: InlineWeights) -> Tensor:
    """dL/dv (n, 3, r_up) of `layer.add_delta`, from dL/dqkv (n, q+k+v)."""
    sizes = [config.q_size, config.kv_size, config.kv_size]
    parts = zip(torch.split(dqkv, sizes, dim=-1), torch.split(inline.b, sizes), strict=True)
    return torch.stack([torch.mm(d_p, b_p) for d_p, b_p in parts], dim=1)


def encode_back(du: Tensor, inline: InlineWeights) -> Tensor:
    """dL/dx (n, d) of `layer.encode`, from dL/du (n, E, r_down)."""
    return du.transpose(1, 2).flatten(1) @ inline.a


def normed_back(config: ModelConfig, layer: LayerWeights, h: Tensor, dx: Tensor) -> Tensor:
    """dL/dx to dL/dh of `layer.normed`, all (n, d); the residual stream's part comes from `finish_back`."""
    return rms_norm_back(dx, h, layer.input_norm, rms_scale(h, config.norm_eps))


def _to_gate_up(
    config: ModelConfig, index: int, layer: LayerWeights, h: Tensor, qkv: Tensor, ragged: Ragged
) -> tuple[Tensor, Tensor]:
    """`layer.finish` up to the MLP's middle: h_mid (n, d) and gate_up (n, 2m)."""
    h = layer.o(attention(config, index, layer, qkv, ragged)).add_(h)
    return h, layer.gate_up(rms_norm(h, layer.post_norm, config.norm_eps))


def _attention_back(
    config: ModelConfig, index: int, layer: LayerWeights, qkv: Tensor, grad: Tensor, ragged: Ragged
) -> Tensor:
    """dL/d(attended) (n, H*e) to dL/dqkv (n, q+k+v) of `layer.attention`."""
    heads, kv_heads, e = config.num_heads, config.num_kv_heads, config.head_dim
    dqkv = torch.empty_like(qkv)
    d_heads = dqkv.view(-1, heads + 2 * kv_heads, e)
    rows = [group.count * group.length for group in ragged.groups]
    split = (torch.split(part, rows) for part in (*rotated_heads(config, layer, qkv, ragged), grad, d_heads))
    for group, *own in zip(ragged.groups, *split, strict=True):
        q, k, v, g, d = (part.view(group.count, group.length, -1, e) for part in own)  # (S, rows, ., e)
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (S, K, T, e)
        d_q, d_k, d_v = torch.split(d, [heads, kv_heads, kv_heads], dim=2)
        d_k, d_v = d_k.zero_().transpose(1, 2), d_v.zero_().transpose(1, 2)
        for block in ragged.blocks(group.first, config.windows[index]):
            seen = slice(block.first_key, block.last_key)
            d_folded, *d_seen = attend_back(
                fold_heads(g[:, block.rows], kv_heads),
                fold_heads(q[:, block.rows], kv_heads),
                k[:, :, seen].flatten(0, 1),
                v[:, :, seen].flatten(0, 1),
                block.mask,
            )
            count, length = group.count, block.rows.stop - block.rows.start
            d_q[:, block.rows] = unfold_heads(d_folded, count, length, kv_heads).flatten(2, 3)
            d_k[:, :, seen] += d_seen[0].view(count, kv_heads, -1, e)
            d_v[:, :, seen] += d_seen[1].view(count, kv_heads, -1, e)
    d_q_k = d_heads[:, : heads + kv_heads]
    d_q_k.copy_(rotate_back(d_q_k, ragged.cos, ragged.signed_sin))
    if layer.q_norm is not None and layer.k_norm is not None:
        before = qkv.view(d_heads.shape)
        for part, norm in ((slice(heads), layer.q_norm), (slice(heads, heads + kv_heads), layer.k_norm)):
            x = before[:, part]
            d_heads[:, part] = rms_norm_back(d_heads[:, part], x, norm, rms_scale(x, config.norm_eps))
    return dqkv

"""The decoder layer on plain tensors, in the steps between which an inline adapter acts.

    x   = normed(layer, h)
    u   = encode(x)               (inline only: goes to the device, which answers with v)
    qkv = project(layer, x)       needs no answer, so it is computed while the device's is on its way
    qkv = add_delta(qkv, v)       (inline only)
    h   = finish(layer, h, qkv)   rotary, attention, output projection, MLP

Both ends run this code, on different layers, for prefill, decode and training alike; autograd gives the backward pass.
Shapes: n rows of a ragged batch, d hidden, H query heads, K key-value heads, G = H / K, e head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from privatelora.decoder.config import ModelConfig
from privatelora.decoder.functions import gated_silu, rms_norm, rotate
from privatelora.decoder.linear import Linear
from privatelora.decoder.ragged import Block, Ragged
from privatelora.decoder.weights import LayerWeights

Lora = Mapping[str, tuple[Tensor, Tensor]]
"""LoRA of one layer: projection name (q, k, v, o, gate, up, down) -> A (r, in), and B (out, r) with the scale in it."""

ONE_MATMUL_ROWS = 16
"""Rows up to which every v_p meets all of B in one matmul, of which two thirds are thrown away: 28 us at one row, 65
for a matmul each; at 32 rows 65 against 78, at 512 several times as much (bfloat16, r = 64, one thread)."""


@dataclass(frozen=True)
class InlineWeights:
    """Frozen A and B of one inline layer at one session's ranks.

    a : (r_down * E, d), rows ordered by rank and then by encoder, so that a smaller rank is a prefix.
    b : (q + k + v, r_up), rows of q, k and v.
    """

    a: Tensor
    b: Tensor
    encoders: int


def normed(config: ModelConfig, layer: LayerWeights, h: Tensor) -> Tensor:
    """x (n, d), what a layer's q, k, v and u are made of, from hidden states h (n, d)."""
    return rms_norm(h, layer.input_norm, config.norm_eps)


def encode(x: Tensor, inline: InlineWeights) -> Tensor:
    """u = x A^T: (n, d) to (n, E, r_down)."""
    return F.linear(x, inline.a).view(x.shape[0], -1, inline.encoders).transpose(1, 2)


def project(layer: LayerWeights, x: Tensor, lora: Lora | None = None) -> Tensor:
    """q, k and v side by side: x (n, d) to (n, q+k+v)."""
    qkv = layer.qkv(x)
    return qkv + torch.cat([_lora(x, lora, name) for name in ("q", "k", "v")], dim=-1) if lora else qkv


def add_delta(config: ModelConfig, qkv: Tensor, v: Tensor, inline: InlineWeights) -> Tensor:
    """q, k, v += v_p B_p: qkv (n, q+k+v), v (n, 3, r_up)."""
    sizes = [config.q_size, config.kv_size, config.kv_size]
    if v.shape[0] <= ONE_MATMUL_ROWS:
        every = torch.split(F.linear(v.flatten(0, 1), inline.b), sizes, dim=-1)  # (3n, d_p) each
        return qkv + torch.cat([columns[p::3] for p, columns in enumerate(every)], dim=-1)
    parts = zip(torch.split(qkv, sizes, dim=-1), v.unbind(1), torch.split(inline.b, sizes), strict=True)
    return torch.cat([torch.addmm(part, v_p, b_p.T) for part, v_p, b_p in parts], dim=-1)


def finish(
    config: ModelConfig,
    index: int,
    layer: LayerWeights,
    h: Tensor,
    qkv: Tensor,
    ragged: Ragged,
    lora: Lora | None = None,
) -> Tensor:
    """The rest of a layer: h (n, d) and qkv (n, q+k+v) to the next layer's h (n, d); `index` is the layer's number."""
    attended = attention(config, index, layer, qkv, ragged)  # (n, H*e)
    h = h + _linear(attended, layer.o, lora, "o")
    x = rms_norm(h, layer.post_norm, config.norm_eps)
    gate_up = layer.gate_up(x)  # (n, 2m)
    if lora:
        gate_up = gate_up + torch.cat([_lora(x, lora, name) for name in ("gate", "up")], dim=-1)
    return h + _linear(gated_silu(gate_up), layer.down, lora, "down")


def run_layer(
    config: ModelConfig, index: int, layer: LayerWeights, h: Tensor, ragged: Ragged, lora: Lora | None = None
) -> Tensor:
    """A whole layer without an inline adapter: h (n, d) to h (n, d)."""
    qkv = project(layer, normed(config, layer, h), lora)
    return finish(config, index, layer, h, qkv, ragged, lora)


def attention(config: ModelConfig, index: int, layer: LayerWeights, qkv: Tensor, ragged: Ragged) -> Tensor:
    """Causal grouped-query attention of each sequence over itself and its cache: (n, q+k+v) to (n, H*e)."""
    n, heads, kv_heads = qkv.shape[0], config.num_heads, config.num_kv_heads
    q_k, v = torch.split(qkv, [config.q_size + config.kv_size, config.kv_size], dim=-1)
    q_k = q_k.view(n, heads + kv_heads, config.head_dim)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = torch.split(q_k, [heads, kv_heads], dim=1)
        q_k = torch.cat((rms_norm(q, layer.q_norm, config.norm_eps), rms_norm(k, layer.k_norm, config.norm_eps)), dim=1)
    q_k = rotate(q_k, ragged.cos, ragged.signed_sin)
    q, k = torch.split(q_k, [heads, kv_heads], dim=1)  # (n, H, e), (n, K, e)
    v = v.view(n, kv_heads, config.head_dim)
    rows = [group.count * group.length for group in ragged.groups]
    mixed = []
    for group, *own in zip(ragged.groups, *(torch.split(part, rows) for part in (q, k, v)), strict=True):
        q_s, k_s, v_s = (part.view(group.count, group.length, -1, config.head_dim) for part in own)  # (S, rows, ., e)
        keys, values = k_s.transpose(1, 2), v_s.transpose(1, 2)  # (S, K, T, e)
        if ragged.caches is not None:
            cached = ragged.caches[group.first].append(index, k_s[0], v_s[0], ragged.starts[group.first])
            keys, values = cached[0][None], cached[1][None]
        blocks = ragged.blocks(group.first, config.windows[index])
        queries = torch.split(q_s, [block.rows.stop - block.rows.start for block in blocks], dim=1)
        parts = [_attend(part, keys, values, block) for part, block in zip(queries, blocks, strict=True)]
        mixed.append((parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).flatten(0, 1))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _attend(q: Tensor, keys: Tensor, values: Tensor, block: Block) -> Tensor:
    """Attention of one block of S sequences: q (S, rows, H, e), keys and values (S, K, T, e) to (S, rows, H*e).

    Each group of query heads is folded into the query's length, so that keys are never copied per head. Plain matmuls
    for many rows: in bfloat16 on a CPU, torch's fused kernel took 2.0 to 2.8 ms forward and backward where these take
    0.5 ms (128 tokens, 9 heads, 3 key-value heads); for one row the fused kernel wins, 18 us against 40.
    """
    count, rows, heads, e = q.shape
    kv_heads = keys.shape[1]
    keys, values = keys[:, :, block.first_key : block.last_key], values[:, :, block.first_key : block.last_key]
    if rows == 1:
        folded = q.view(count, kv_heads, heads // kv_heads, e)
        return F.scaled_dot_product_attention(folded, keys, values).reshape(count, 1, heads * e)
    folded = q.view(count, rows, kv_heads, -1, e).permute(0, 2, 3, 1, 4).reshape(count * kv_heads, -1, e)
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)  # (S*K, keys, e)
    assert block.mask is not None  # a block of several rows always has one (Ragged._block)
    scores = torch.baddbmm(block.mask, folded, keys.transpose(1, 2), alpha=e**-0.5)  # (S*K, G*rows, keys)
    mixed = torch.bmm(torch.softmax(scores, dim=-1), values)  # (S*K, G*rows, e)
    return mixed.view(count, kv_heads, -1, rows, e).permute(0, 3, 1, 2, 4).reshape(count, rows, heads * e)


def _linear(x: Tensor, linear: Linear, lora: Lora | None, name: str) -> Tensor:
    y = linear(x)
    return y + _lora(x, lora, name) if lora else y


def _lora(x: Tensor, lora: Lora, name: str) -> Tensor:
    """x A^T B^T in the adapter's own dtype, returned in x's: (n, in) to (n, out)."""
    a, b = lora[name]
    return F.linear(F.linear(x.to(a.dtype), a), b).to(x.dtype)

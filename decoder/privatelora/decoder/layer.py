"""The decoder layer on plain tensors, in the steps between which an inline adapter acts.

    x   = normed(layer, h)
    u   = encode(x)               (inline only: goes to the device, which answers with v)
    qkv = project(layer, x)       needs no answer, so it is computed while the device's is on its way
    qkv = add_delta(qkv, v)       (inline only)
    h   = finish(layer, h, qkv)   rotary, attention, output projection, MLP

Both ends run this code, on different layers, for prefill, decode and training alike; autograd gives the backward pass,
and `backward.py` has it by hand for layers that train nothing themselves.
Shapes: n rows of a ragged batch, d hidden, H query heads, K key-value heads, G = H / K, e head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from privatelora.decoder import kernels
from privatelora.decoder.config import ModelConfig
from privatelora.decoder.functions import attend, gated_silu, rms_norm, rotate
from privatelora.decoder.kv import BLOCK
from privatelora.decoder.linear import Linear
from privatelora.decoder.ragged import Block, CachedTokens, Ragged
from privatelora.decoder.weights import LayerWeights

Lora = Mapping[str, tuple[Tensor, Tensor]]
"""LoRA of one layer: projection name (q, k, v, o, gate, up, down) -> A (r, in), and B (out, r) with the scale in it."""

COMPILED_DELTA_ROWS = 32
"""Rows up to which the compiled `kernels.add_delta` is used: 7 us against torch's 35 at one row, 63 against 98 at 32,
no gain at 64 (bfloat16, r = 64, one thread)."""


@dataclass(frozen=True, eq=False)
class InlineWeights:
    """Frozen A and B of one inline layer at one session's ranks.

    a : (r_down * E, d), rows ordered by rank and then by encoder, so that a smaller rank is a prefix.
    b : (q + k + v, r_up), rows of q, k and v.
    packed_b : b as `kernels.add_delta` reads it; None where that cannot be used.
    """

    a: Tensor
    b: Tensor
    encoders: int
    packed_b: Tensor | None = None


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
    """q, k, v += v_p B_p: qkv (n, q+k+v), v (n, 3, r_up); qkv itself may be changed."""
    if inline.packed_b is not None and v.shape[0] <= COMPILED_DELTA_ROWS:
        kernels.add_delta(qkv, v, inline.packed_b, config.q_size, config.kv_size)
        return qkv
    sizes = [config.q_size, config.kv_size, config.kv_size]
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
    tokens, window = ragged.tokens, config.windows[index]
    if tokens is not None and tokens.compiled:
        pool = tokens.pool
        return kernels.decode_attention(
            qkv, ragged.cos, ragged.signed_sin, layer.q_norm, layer.k_norm, config.norm_eps, pool.store,
            index - pool.layers.start, tokens.blocks, tokens.positions, window, config.num_heads, config.num_kv_heads,
        )  # fmt: skip
    q, k, v = rotated_heads(config, layer, qkv, ragged)
    if tokens is not None:
        return _attend_cached(q, k, v, tokens, index, window)
    rows = [group.count * group.length for group in ragged.groups]
    mixed = []
    for group, *own in zip(ragged.groups, *(torch.split(part, rows) for part in (q, k, v)), strict=True):
        q_s, k_s, v_s = (part.view(group.count, group.length, -1, config.head_dim) for part in own)  # (S, rows, ., e)
        keys, values = k_s.transpose(1, 2), v_s.transpose(1, 2)  # (S, K, T, e)
        if ragged.caches is not None:
            cached = ragged.caches[group.first].append(index, k_s[0], v_s[0], ragged.starts[group.first])
            keys, values = cached[0][None], cached[1][None]
        blocks = ragged.blocks(group.first, window)
        queries = torch.split(q_s, [block.rows.stop - block.rows.start for block in blocks], dim=1)
        parts = [_attend(part, keys, values, block) for part, block in zip(queries, blocks, strict=True)]
        mixed.append((parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).flatten(0, 1))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def rotated_heads(
    config: ModelConfig, layer: LayerWeights, qkv: Tensor, ragged: Ragged
) -> tuple[Tensor, Tensor, Tensor]:
    """q (n, H, e) and k (n, K, e), normed and rotated, and v (n, K, e), of qkv (n, q+k+v)."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    q_k, v = torch.split(qkv.view(qkv.shape[0], -1, config.head_dim), [heads + kv_heads, kv_heads], dim=1)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = torch.split(q_k, [heads, kv_heads], dim=1)
        q_k = torch.cat((rms_norm(q, layer.q_norm, config.norm_eps), rms_norm(k, layer.k_norm, config.norm_eps)), dim=1)
    q, k = torch.split(rotate(q_k, ragged.cos, ragged.signed_sin), [heads, kv_heads], dim=1)
    return q, k, v


def _attend_cached(q: Tensor, k: Tensor, v: Tensor, tokens: CachedTokens, index: int, window: int | None) -> Tensor:
    """`kernels.decode_attention` in torch, after norm and rotary, for a GPU or where nothing was compiled.

    q (n, H, e), k and v (n, K, e), which are cached first, to (n, H*e).
    """
    pool, (n, heads, e) = tokens.pool, q.shape
    slot, at = index - pool.layers.start, tokens.positions.long()
    block, inside = tokens.blocks.gather(1, (at // BLOCK)[:, None])[:, 0].long(), at % BLOCK
    pool.keys()[block, slot, :, :, inside] = k
    pool.values()[block, slot, :, inside] = v
    blocks = tokens.blocks.long()  # (n, m)
    keys = pool.keys()[blocks, slot].permute(0, 2, 3, 1, 4).flatten(3)  # (n, K, e, m * BLOCK)
    values = pool.values()[blocks, slot].transpose(1, 2).flatten(2, 3)  # (n, K, m * BLOCK, e)
    key = torch.arange(keys.shape[-1], device=at.device)
    hidden = key > at[:, None]  # (n, m * BLOCK)
    if window:
        hidden |= key <= at[:, None] - window
    scores = (q.view(n, pool.kv_heads, -1, e) @ keys * e**-0.5).masked_fill(hidden[:, None, None], float("-inf"))
    values = values.masked_fill(hidden[:, None, :, None], 0)  # another sequence's leavings, which need not be finite
    return (torch.softmax(scores, dim=-1) @ values).view(n, heads * e)


def _attend(q: Tensor, keys: Tensor, values: Tensor, block: Block) -> Tensor:
    """Attention of one block of S sequences: q (S, rows, H, e), keys and values (S, K, T, e) to (S, rows, H*e)."""
    count, rows, heads, e = q.shape
    kv_heads = keys.shape[1]
    keys, values = keys[:, :, block.first_key : block.last_key], values[:, :, block.first_key : block.last_key]
    mixed = attend(fold_heads(q, kv_heads), keys.flatten(0, 1), values.flatten(0, 1), block.mask)
    return unfold_heads(mixed, count, rows, kv_heads).reshape(count, rows, heads * e)


def fold_heads(q: Tensor, kv_heads: int) -> Tensor:
    """(S, rows, H, e) to (S*K, G*rows, e).

    Each group of query heads is folded into the query's length, so that keys are never copied per head.
    """
    count, rows, _, e = q.shape
    return q.view(count, rows, kv_heads, -1, e).permute(0, 2, 3, 1, 4).reshape(count * kv_heads, -1, e)


def unfold_heads(folded: Tensor, count: int, rows: int, kv_heads: int) -> Tensor:
    """Back from `fold_heads`: (S*K, G*rows, e) to (S, rows, K, G, e)."""
    return folded.view(count, kv_heads, -1, rows, folded.shape[-1]).permute(0, 3, 1, 2, 4)


def _linear(x: Tensor, linear: Linear, lora: Lora | None, name: str) -> Tensor:
    y = linear(x)
    return y + _lora(x, lora, name) if lora else y


def _lora(x: Tensor, lora: Lora, name: str) -> Tensor:
    """x A^T B^T in the adapter's own dtype, returned in x's: (n, in) to (n, out)."""
    a, b = lora[name]
    return F.linear(F.linear(x.to(a.dtype), a), b).to(x.dtype)

"""The `calibrated` kind of adapter set: directions that the language-model loss listens to, from public text alone.

    A_l   top eigenvectors of  sum over tokens of |dL/d(q,k,v)|^2 x x^T     (x = input_layernorm(h_l))
    B_l   for each of q, k, v: top eigenvectors of  sum of g g^T, g = dL/dq | dL/dk | dL/dv

(DESIGN section 2.) The text is the standard library's `pydoc_data.topics`, which every Python has; nothing of any user
takes part. Runs once, at a service's first start, and `sets.py` keeps the result.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from privatelora.cloud.sets import SetLayer
from privatelora.decoder.config import ModelConfig
from privatelora.decoder.functions import rms_norm
from privatelora.decoder.layer import finish, normed, project
from privatelora.decoder.ragged import Ragged
from privatelora.decoder.rotary import RotaryTables
from privatelora.decoder.weights import LayerWeights

WINDOWS, WINDOW_TOKENS = 24, 160  # four times the text was no better (DESIGN section 2)
WINDOWS_A_PASS = 4  # bounds memory: 640 tokens of activations at a time


def calibrated_set(
    config: ModelConfig,
    layers: Mapping[int, LayerWeights],
    embedding: Tensor,
    norm: Tensor,
    head: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    max_rank: int,
    progress: Callable[[float], None] = lambda done: None,
    seed: int = 0,
) -> dict[int, SetLayer]:
    """Compute A and B of every layer up to `max_rank`; `progress` is told the share that is done, 0..1.

    `seed` chooses other passages of the text; 0 takes its beginning.
    """
    windows = _public_windows(tokenizer, seed)  # (WINDOWS, WINDOW_TOKENS)
    tables = RotaryTables(config, dtype=embedding.dtype)
    sizes = [config.q_size, config.kv_size, config.kv_size]
    inputs = [torch.zeros(config.hidden_size, config.hidden_size) for _ in layers]
    outputs = [[torch.zeros(size, size) for size in sizes] for _ in layers]
    passes = torch.split(windows, WINDOWS_A_PASS)
    for done, batch in enumerate(passes):
        xs, grads = _gradients(config, layers, embedding, norm, head, tables, batch)
        for l, (x, g) in enumerate(zip(xs, grads, strict=True)):
            x, g = x.float(), g.float()  # (n, d), (n, q+k+v)
            inputs[l] += (x * g.square().sum(-1, keepdim=True)).T @ x
            for total, part in zip(outputs[l], torch.split(g, sizes, dim=-1), strict=True):
                total += part.T @ part
        progress(0.8 * (done + 1) / len(passes))
    found: dict[int, SetLayer] = {}
    for l in layers:
        a = _top_eigenvectors(inputs[l], max_rank)[None]  # (1, r, d)
        up = min(max_rank, config.kv_size)
        q, k, v = (_top_eigenvectors(total, up) for total in outputs[l])  # (r, d_p)
        found[l] = SetLayer(a, {"q": q, "k": k, "v": v})
        progress(0.8 + 0.2 * (l + 1) / len(layers))
    return found


def _public_windows(tokenizer: PreTrainedTokenizerBase, seed: int) -> Tensor:
    from pydoc_data.topics import topics

    wanted = WINDOWS * WINDOW_TOKENS
    names = sorted(topics)
    if seed:
        random.Random(seed).shuffle(names)
    text = "\n\n".join(topics[name] for name in names)
    tokens = tokenizer(text[: 16 * wanted], add_special_tokens=False)["input_ids"]
    tokens = (tokens * (1 + wanted // len(tokens)))[:wanted]  # a coarse tokenizer may need the text twice
    return torch.tensor(tokens).view(WINDOWS, WINDOW_TOKENS)


def _gradients(
    config: ModelConfig,
    layers: Mapping[int, LayerWeights],
    embedding: Tensor,
    norm: Tensor,
    head: Tensor,
    tables: RotaryTables,
    batch: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """Each layer's x (n, d) and dL/d(q|k|v) (n, q+k+v) for a batch of windows."""
    ragged = Ragged(config, tables, [batch.shape[1]] * batch.shape[0])
    h = embedding[batch.flatten()]
    xs, projected = [], []
    with torch.enable_grad():
        for l, layer in layers.items():
            x = normed(config, layer, h)
            qkv = project(layer, x)
            if not qkv.requires_grad:  # the first layer: nothing below it is trained
                qkv.requires_grad_()
            xs.append(x.detach())
            projected.append(qkv)
            h = finish(config, l, layer, h, qkv, ragged)
        logits = F.linear(rms_norm(h, norm, config.norm_eps), head)
        targets = torch.cat((batch[:, 1:], torch.full((batch.shape[0], 1), -100)), dim=1).flatten()
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
    return xs, list(torch.autograd.grad(loss, projected))


def _top_eigenvectors(matrix: Tensor, count: int) -> Tensor:
    """Rows are the eigenvectors of the largest eigenvalues of a symmetric matrix, largest first: (count, width)."""
    vectors: Tensor = torch.linalg.eigh(matrix.double()).eigenvectors  # columns, eigenvalues ascending
    return vectors.flip(-1)[:, :count].T.float().contiguous()

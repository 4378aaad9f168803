"""The backward pass by hand is autograd's, for every family, and does not depend on what lay beside a sequence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.support.fleet import MODELS
from tests.support.layers import TinyLayers
from torch import Tensor

from privatelora.decoder.backward import (
    Saved,
    add_delta_back,
    encode_back,
    finish_back,
    finish_keeping,
    normed_back,
)
from privatelora.decoder.config import ModelConfig
from privatelora.decoder.functions import (
    attend,
    attend_back,
    gated_silu,
    gated_silu_back,
    rms_norm,
    rms_norm_back,
    rms_scale,
    rotate,
    rotate_back,
)
from privatelora.decoder.layer import InlineWeights, add_delta, encode, finish, normed, project
from privatelora.decoder.ragged import Ragged

TOLERANCE = 1e-5  # of a gradient's norm, float32 through four layers
# Past every sliding window (24) and a block of queries (128), once by one row; a row alone; equal neighbours.
LENGTHS = (150, 37, 37, 129, 1, 2, 2, 2)
RANK = 7


def inline_weights(config: ModelConfig, encoders: int = 1) -> InlineWeights:
    a = torch.randn(RANK * encoders, config.hidden_size) / config.hidden_size**0.5
    return InlineWeights(a, torch.randn(config.q_size + 2 * config.kv_size, RANK) / RANK**0.5, encoders)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).norm() / wanted.norm()) < TOLERANCE


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_adapted_layers_are_autograds(
    load: Callable[[str], TinyLayers], name: str, recompute: bool
) -> None:
    model = load(name)
    config = model.config
    torch.manual_seed(0)
    ragged = model.ragged(*LENGTHS)
    start, grad = torch.randn(ragged.n, config.hidden_size), torch.randn(ragged.n, config.hidden_size)
    inline = {l: inline_weights(config, encoders=1 + 2 * (l % 2)) for l in model.layers}
    m = {l: torch.randn(weights.a.shape[0], 3 * RANK) / 8 for l, weights in inline.items()}

    def delta(layer: int, u: Tensor) -> Tensor:
        return (u.flatten(1) @ m[layer]).view(ragged.n, 3, RANK)

    first = start.clone().requires_grad_()
    h, deltas = first, []
    for l, layer in model.layers.items():
        x = normed(config, layer, h)
        deltas.append(delta(l, encode(x, inline[l])))
        h = finish(config, l, layer, h, add_delta(config, project(layer, x), deltas[-1], inline[l]), ragged)
    d_first, *d_deltas = torch.autograd.grad(h, (first, *deltas), grad)
    wanted = h.detach()

    with torch.inference_mode():
        h, dh, kept = start, grad, []
        for l, layer in model.layers.items():
            x = normed(config, layer, h)
            qkv = add_delta(config, project(layer, x), delta(l, encode(x, inline[l])), inline[l])
            h, saved = finish_keeping(config, l, layer, h, qkv, ragged, recompute)
            kept.append(saved)
        assert_close(h, wanted)
        for l, layer in reversed(model.layers.items()):
            saved = kept.pop()
            dh, dqkv = finish_back(config, l, layer, saved, dh, ragged)
            dv = add_delta_back(config, dqkv, inline[l])
            assert_close(dv, d_deltas[l])
            du = (dv.flatten(1) @ m[l].T).view(ragged.n, inline[l].encoders, RANK)
            dx = layer.qkv.back(dqkv) + encode_back(du, inline[l])
            dh = dh + normed_back(config, layer, saved.h, dx)
        assert_close(dh, d_first)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_made_again_is_what_was_not_kept(load: Callable[[str], TinyLayers], name: str) -> None:
    """Bit for bit, so that a service may choose by its memory alone."""
    model = load(name)
    ragged = model.ragged(*LENGTHS)
    results = [layer_there_and_back(model, 1, ragged, recompute) for recompute in (False, True)]
    assert all(torch.equal(kept, made) for kept, made in zip(*results, strict=True))


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", MODELS)
def test_batches_merge_and_split_between_forward_and_backward(
    load: Callable[[str], TinyLayers], name: str, recompute: bool
) -> None:
    model = load(name)
    config, last = model.config, model.config.num_layers - 1
    layer = model.layers[last]
    torch.manual_seed(1)
    lengths = (40, 40, 140)
    sequences = [torch.randn(length, config.hidden_size) for length in lengths]
    grads = [torch.randn_like(h) for h in sequences]

    def there(h: Tensor, *lengths: int) -> Saved:
        qkv = project(layer, normed(config, layer, h))
        return finish_keeping(config, last, layer, h, qkv, model.ragged(*lengths), recompute)[1]

    def back(saved: Saved, dh: Tensor, *lengths: int) -> Tensor:
        return torch.cat(finish_back(config, last, layer, saved, dh, model.ragged(*lengths)), dim=1)

    with torch.inference_mode():
        alone = [there(h, h.shape[0]) for h in sequences]
        wanted = torch.cat(
            [back(saved, dh, dh.shape[0]) for saved, dh in zip(alone, grads, strict=True)]
        )  # (n, d + q+k+v)
        merged = there(torch.cat(sequences), *lengths)
        assert_close(back(merged, torch.cat(grads), *lengths), wanted)
        assert_close(back(Saved.joined(alone), torch.cat(grads), *lengths), wanted)
        starts = (0, 40, 80)
        parts = [merged.of_rows(slice(at, at + n)) for at, n in zip(starts, lengths, strict=True)]
        split = [back(saved, dh, dh.shape[0]) for saved, dh in zip(parts, grads, strict=True)]
        assert_close(torch.cat(split), wanted)
        others = Saved.joined([Saved(parts[2].h, parts[2].qkv), parts[0]])  # one of them has nothing more
        regrouped = back(others, torch.cat((grads[2], grads[0])), lengths[2], lengths[0])
        assert_close(regrouped, torch.cat((wanted[80:], wanted[:40])))


def test_every_tensor_that_is_kept_has_the_rows_of_the_batch(load: Callable[[str], TinyLayers]) -> None:
    model = load("qwen3")
    for recompute in (False, True):
        with torch.inference_mode():
            h = torch.randn(9, model.config.hidden_size)
            qkv = project(model.layers[0], normed(model.config, model.layers[0], h))
            ragged = model.ragged(4, 5)
            _, saved = finish_keeping(model.config, 0, model.layers[0], h, qkv, ragged, recompute)
        kept = [tensor for tensor in vars(saved).values() if tensor is not None]
        assert [tensor.shape[0] for tensor in kept] == [9] * (2 if recompute else 4)


def layer_there_and_back(
    model: TinyLayers, index: int, ragged: Ragged, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    config, layer = model.config, model.layers[index]
    torch.manual_seed(2)
    h, grad = torch.randn(2, ragged.n, config.hidden_size)
    with torch.inference_mode():
        qkv = project(layer, normed(config, layer, h))
        out, saved = finish_keeping(config, index, layer, h, qkv, ragged, recompute)
        return out, *finish_back(config, index, layer, saved, grad, ragged)


def test_each_formula_is_the_derivative_that_torch_finds_itself() -> None:
    """Of the plain expression, since what autograd calls for our functions are these formulas."""
    torch.manual_seed(3)
    x, weight, eps = torch.randn(5, 3, 8), torch.rand(8) + 0.5, 1e-5
    check(lambda x: F.rms_norm(x, (8,), weight, eps), lambda x: rms_norm(x, weight, eps),
          lambda g, x: rms_norm_back(g, x, weight, rms_scale(x, eps)), x)  # fmt: skip

    cos, sin = torch.randn(2, 5, 8)
    half = torch.cat((-torch.ones(4), torch.ones(4)))
    check(lambda x: x * cos[:, None] + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin[:, None],
          lambda x: rotate(x, cos, sin * half), lambda g, x: rotate_back(g, cos, sin * half), x)  # fmt: skip

    gate_up = torch.randn(5, 12)
    check(lambda x: x[:, :6] * torch.sigmoid(x[:, :6]) * x[:, 6:], gated_silu, gated_silu_back, gate_up)

    q, keys, values = torch.randn(2, 6, 8), torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    mask = torch.zeros(6, 4).masked_fill_(torch.rand(6, 4) < 0.3, float("-inf"))
    check(lambda q, k, v: torch.softmax(q @ k.mT / 8**0.5 + mask, -1) @ v, lambda q, k, v: attend(q, k, v, mask),
          lambda g, q, k, v: attend_back(g, q, k, v, mask), q, keys, values)  # fmt: skip
    check(lambda q, k, v: torch.softmax(q @ k.mT / 8**0.5, -1) @ v, None,
          lambda g, q, k, v: attend_back(g, q, k, v, None), q, keys, values)  # fmt: skip


def check(
    plain: Callable[..., Tensor],
    ours: Callable[..., Tensor] | None,
    back: Callable[..., Tensor | tuple[Tensor, ...]],
    *inputs: Tensor,
) -> None:
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = plain(*leaves)
    grad = torch.randn_like(y)
    wanted = torch.autograd.grad(y, leaves, grad)
    by_hand = back(grad, *inputs)
    results = [by_hand if isinstance(by_hand, tuple) else (by_hand,)]
    if ours is not None:
        assert_close(ours(*inputs), y.detach())
        results.append(torch.autograd.grad(ours(*leaves), leaves, grad))
    for found in results:
        for one, theirs in zip(found, wanted, strict=True):
            assert_close(one, theirs)

"""The compiled steps are layer.py's: attention for any heads, positions, windows and blocks, the norm, the delta."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from privatelora.decoder import kernels, layer
from privatelora.decoder.functions import rms_norm, rotate
from privatelora.decoder.kernels import BLOCK, add_delta, available, decode_attention, pack_b
from privatelora.protocol.errors import ServiceError

POSITIONS = (0, 15, 16, 500, 131)
LAYERS, SLOT, EPS = 2, 1, 1e-6
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}

compiled = pytest.mark.skipif(not available(torch.float32, "cpu"), reason="no compiled kernels (compiler, AVX2)")


class Sizes(NamedTuple):
    """What `layer.add_delta` reads of a ModelConfig."""

    q_size: int
    kv_size: int


@dataclass(frozen=True)
class Case:
    """One call; the pool's blocks are dealt to the sequences in scrambled order, and all of it is filled."""

    qkv: Tensor
    cos: Tensor
    signed_sin: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    pool: Tensor
    blocks: Tensor
    positions: Tensor
    window: int | None
    heads: int
    kv_heads: int

    def run(self) -> Tensor:
        return decode_attention(
            self.qkv,
            self.cos,
            self.signed_sin,
            self.q_norm,
            self.k_norm,
            EPS,
            self.pool,
            SLOT,
            self.blocks,
            self.positions,
            self.window,
            self.heads,
            self.kv_heads,
        )


def case(
    dtype: torch.dtype = torch.float32,
    heads: int = 9,
    kv_heads: int = 3,
    e: int = 64,
    window: int | None = None,
    normed: bool = False,
    positions: tuple[int, ...] = POSITIONS,
) -> Case:
    torch.manual_seed(heads + e)
    n, m = len(positions), max(positions) // BLOCK + 1
    angles = torch.tensor(positions)[:, None] * torch.logspace(0, -3, e // 2)
    sin = angles.sin().to(dtype)
    return Case(
        qkv=torch.randn(n, (heads + 2 * kv_heads) * e).to(dtype),
        cos=angles.cos().repeat(1, 2).to(dtype),
        signed_sin=torch.cat((-sin, sin), dim=1),
        q_norm=(0.5 + torch.rand(e)).to(dtype) if normed else None,
        k_norm=(0.5 + torch.rand(e)).to(dtype) if normed else None,
        pool=torch.randn(n * m + 2, LAYERS, 2, kv_heads, e * BLOCK).to(dtype),
        blocks=torch.randperm(n * m + 2)[: n * m].view(n, m).to(torch.int32),
        positions=torch.tensor(positions, dtype=torch.int32),
        window=window,
        heads=heads,
        kv_heads=kv_heads,
    )


def with_torch(given: Case) -> tuple[Tensor, Tensor]:
    """What the call should return, in float64 from q, k and v as rounded, and the pool that it should leave."""
    n, heads, kv_heads, e = len(given.qkv), given.heads, given.kv_heads, given.cos.shape[1]
    q, k, v = given.qkv.view(n, -1, e).split([heads, kv_heads, kv_heads], dim=1)
    if given.q_norm is not None and given.k_norm is not None:
        q, k = rms_norm(q, given.q_norm, EPS), rms_norm(k, given.k_norm, EPS)
    q, k = rotate(q, given.cos, given.signed_sin), rotate(k, given.cos, given.signed_sin)
    pool = given.pool.clone()
    mixed = []
    for i, position in enumerate(given.positions.tolist()):
        block = pool[int(given.blocks[i, position // BLOCK]), SLOT]
        block[0].view(kv_heads, e, BLOCK)[:, :, position % BLOCK] = k[i]
        block[1].view(kv_heads, BLOCK, e)[:, position % BLOCK] = v[i]
        own = pool[given.blocks[i].long(), SLOT]  # (m, 2, K, e * 16)
        keys = own[:, 0].reshape(-1, kv_heads, e, BLOCK).permute(1, 0, 3, 2).flatten(1, 2)  # (K, m * 16, e)
        values = own[:, 1].reshape(-1, kv_heads, BLOCK, e).transpose(0, 1).flatten(1, 2)
        first = max(0, position - given.window + 1) if given.window else 0
        seen = slice(first, position + 1)
        folded = q[i].view(kv_heads, heads // kv_heads, e).double()
        mixed.append(F.scaled_dot_product_attention(folded, keys[:, seen].double(), values[:, seen].double()).flatten())
    return torch.stack(mixed), pool


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of a row, relative to the row."""
    return float(((ours.double() - theirs.double()).norm(dim=-1) / theirs.double().norm(dim=-1)).max())


@compiled
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "e"), [(9, 3, 64), (14, 2, 64), (4, 4, 24), (10, 5, 24), (8, 1, 128), (3, 3, 128)]
)
@pytest.mark.parametrize(("window", "normed"), [(None, False), (None, True), (1, False), (20, True), (128, False)])
def test_attention_and_what_it_writes_are_torchs(
    dtype: torch.dtype, heads: int, kv_heads: int, e: int, window: int | None, normed: bool
) -> None:
    given = case(dtype, heads, kv_heads, e, window, normed)
    before, (wanted, pool) = given.pool.clone(), with_torch(given)
    assert error(given.run(), wanted) < TOLERANCE[dtype]
    torch.testing.assert_close(given.pool, pool, rtol=2**-7 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)
    written, expected = given.pool != before, pool != before
    assert not torch.any(written & ~expected)  # nothing but the new keys and values
    if dtype is torch.bfloat16:  # rounded where torch rounds: other numbers only where its norm's sum is one off
        assert (given.pool != pool).sum() <= 0.01 * expected.sum()


@compiled
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    together, apart = case(dtype, normed=True), case(dtype, normed=True)
    rows = together.run()
    for i in range(len(rows)):
        own = slice(i, i + 1)
        alone = replace(
            apart,
            qkv=apart.qkv[own],
            cos=apart.cos[own],
            signed_sin=apart.signed_sin[own],
            blocks=apart.blocks[own, : int(apart.positions[i]) // BLOCK + 1].contiguous(),
            positions=apart.positions[own],
        )
        assert torch.equal(alone.run(), rows[own])
    assert torch.equal(together.pool, apart.pool)


@compiled
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [16, 17, 50])
def test_what_threads_share_is_what_one_does_alone(n: int, dtype: torch.dtype) -> None:
    alone, shared = (case(dtype, positions=tuple(range(n))) for _ in range(2))
    qkv, v, b = torch.randn(n, 960).to(dtype), torch.randn(n, 3, 64).to(dtype), pack_b(torch.randn(960, 64).to(dtype))
    deltas = [qkv.clone(), qkv.clone()]
    before = torch.get_num_threads()
    rows = []
    try:
        for threads, given, delta in zip((1, 3), (alone, shared), deltas, strict=True):
            torch.set_num_threads(threads)
            rows.append(given.run())
            add_delta(delta, v, b, 576, 192)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*rows)
    assert torch.equal(alone.pool, shared.pool)
    assert torch.equal(*deltas)
    assert not torch.equal(deltas[0], qkv)


@compiled
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux lists a process's threads")
def test_torchs_own_threads_stay_when_fewer_of_them_have_a_part() -> None:
    given, threads = case(torch.bfloat16, positions=tuple(range(16))), Path("/proc/self/task")
    qkv, v, b = (torch.randn(shape).bfloat16() for shape in ((16, 960), (16, 3, 64), (960, 64)))
    large, before = torch.ones(512, 512), torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        large + large  # has torch make its team
        time.sleep(0.05)  # in which those of a larger one end
        team = set(threads.iterdir())
        given.run()  # by two of the five
        add_delta(qkv, v, pack_b(b), 576, 192)
        large + large
        time.sleep(0.05)
        assert team <= set(threads.iterdir())
    finally:
        torch.set_num_threads(before)


@compiled
def test_what_lies_unused_in_the_pool_is_not_read() -> None:
    """Tokens after the new one or before the window may hold anything, blocks before the window may be given away."""
    clean = case(window=20)
    wanted, _ = with_torch(clean)
    dirty = replace(clean, pool=clean.pool.clone(), blocks=clean.blocks.clone())
    for i, position in enumerate(clean.positions.tolist()):
        first = max(0, position - 19)
        own = clean.pool[clean.blocks[i].long(), SLOT]
        hidden = torch.full_like(own, float("nan"))
        keys, values = own[:, 0].view(-1, 3, 64, 16), own[:, 1].view(-1, 3, 16, 64)
        for token in range(first, position):
            hidden[token // 16, 0].view(3, 64, 16)[:, :, token % 16] = keys[token // 16, :, :, token % 16]
            hidden[token // 16, 1].view(3, 16, 64)[:, token % 16] = values[token // 16, :, token % 16]
        dirty.pool[clean.blocks[i].long(), SLOT] = hidden
        dirty.blocks[i, : first // BLOCK] = -1
    assert error(dirty.run(), wanted) < TOLERANCE[torch.float32]


@compiled
def test_large_scores_and_nan_are_torchs() -> None:
    given = case(positions=(40, 40))
    given.qkv.mul_(30)  # one key has all the weight: the others' exponentials are 0
    given.qkv[1, 0] = float("nan")
    wanted, _ = with_torch(given)
    out = given.run()
    assert error(out[:1], wanted[:1]) < 1e-3  # a score of 10,000 has a rounding of 5e-4
    assert torch.equal(out[1].isnan(), wanted[1].isnan())
    assert out[1].isnan().sum() == 64


@compiled
@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("qkv", torch.zeros(5, 64)),
        ("qkv", torch.zeros(5, 15 * 64, dtype=torch.bfloat16)),
        ("qkv", torch.zeros(15 * 64, 5).T),
        ("cos", torch.zeros(4, 64)),
        ("blocks", torch.zeros(5, 32, dtype=torch.int64)),
        ("blocks", torch.full((5, 32), 10**6, dtype=torch.int32)),
        ("blocks", torch.zeros(5, 2, dtype=torch.int32)),
        ("positions", torch.full((5,), -1, dtype=torch.int32)),
        ("kv_heads", 2),
        ("heads", 8),
        ("window", -1),
    ],
)
def test_what_would_touch_foreign_memory_is_refused_and_nothing_is_written(part: str, value: Tensor | int) -> None:
    given = replace(case(), **{part: value})
    before = given.pool.clone()
    with pytest.raises(ServiceError, match="decode_attention"):
        given.run()
    assert torch.equal(given.pool, before)


@compiled
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "d"), [(1, 576), (7, 50), (64, 1024)])
def test_the_norm_is_torchs(n: int, d: int, dtype: torch.dtype) -> None:
    x, weight = (3 * torch.randn(n, d)).to(dtype), torch.rand(d).to(dtype)
    ours, theirs = kernels.rms_norm(x, weight, EPS), rms_norm(x, weight, EPS)
    torch.testing.assert_close(ours, theirs, rtol=2**-7 if dtype is torch.bfloat16 else 1e-6, atol=0)
    assert torch.equal(kernels.rms_norm(x[:1], weight, EPS), ours[:1])


@compiled
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("r", [64, 7])
@pytest.mark.parametrize("n", [1, 6, 33])
def test_the_delta_is_layers_rounded_once_and_each_rows_own(n: int, r: int, dtype: torch.dtype) -> None:
    q_size, kv_size = 96, 48
    qkv, v, b = torch.randn(n, 192).to(dtype), torch.randn(n, 3, r).to(dtype), torch.randn(192, 64).to(dtype)
    parts = zip(v.double().unbind(1), b[:, :r].double().split([q_size, kv_size, kv_size]), strict=True)
    wanted = qkv.double() + torch.cat([v_p @ b_p.T for v_p, b_p in parts], dim=1)
    packed = pack_b(b)[:, :r]
    ours, alone = qkv.clone(), qkv[-1:].clone()
    add_delta(ours, v, packed, q_size, kv_size)
    add_delta(alone, v[-1:], packed, q_size, kv_size)
    assert error(ours, wanted) < TOLERANCE[dtype]
    assert torch.equal(alone, ours[-1:])
    sizes, inline = Sizes(q_size, kv_size), layer.InlineWeights(b, b[:, :r], 1)
    layers = layer.add_delta(sizes, qkv, v, inline)  # type: ignore[arg-type]  # all that it reads of a config
    assert error(ours, layers) < 2 * TOLERANCE[dtype]


@compiled
def test_norms_and_deltas_of_other_shapes_are_refused() -> None:
    with pytest.raises(ServiceError, match="rms_norm"):
        kernels.rms_norm(torch.zeros(2, 8), torch.zeros(9), EPS)
    with pytest.raises(ServiceError, match="rms_norm"):
        kernels.rms_norm(torch.zeros(8, 2).T, torch.zeros(8), EPS)
    qkv, packed = torch.zeros(2, 192), torch.zeros(12, 8, 16)
    for v, b in ((torch.zeros(2, 3, 9), packed), (torch.zeros(2, 3, 8), packed[:11]), (torch.zeros(1, 3, 8), packed)):
        with pytest.raises(ServiceError, match="add_delta"):
            add_delta(qkv, v, b, 96, 48)
    with pytest.raises(ServiceError, match="add_delta"):
        add_delta(qkv, torch.zeros(2, 3, 8), packed, 100, 46)


def test_other_dtypes_and_devices_are_not_for_it() -> None:
    assert not available(torch.float16, "cpu")
    assert not available(torch.float32, "cuda")


def test_without_its_library_or_with_that_of_another_source_it_is_not_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, source = kernels.SOURCE.with_name("libkernels.so"), tmp_path / "kernels.c"
    monkeypatch.setattr(kernels, "SOURCE", source)
    assert not available(torch.float32, "cpu")
    with pytest.raises(ServiceError, match="available"):
        case().run()
    if built.exists():
        shutil.copy(built, tmp_path)
        source.write_text("/* edited since */")
        kernels._library.cache_clear()
        assert not available(torch.float32, "cpu")

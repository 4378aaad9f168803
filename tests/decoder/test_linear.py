"""A frozen linear layer is torch's own, whichever way it is run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from privatelora.decoder import linear
from privatelora.decoder.linear import Linear

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@pytest.fixture(params=["as this CPU can", "without the packed path"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without the packed path":
        monkeypatch.setattr(linear, "_can_pack", lambda dtype: False)


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_values_and_gradients_are_torchs(rows: int, biased: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    weight = torch.randn(50, 434, dtype=dtype)
    bias = torch.randn(50, dtype=dtype) if biased else None
    frozen = Linear(weight, bias)
    x = torch.randn(rows, 434, dtype=dtype)
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    with torch.inference_mode():
        assert error(frozen(x), wanted) < TOLERANCE[dtype]
    leaf = x.clone().requires_grad_()
    y = frozen(leaf)
    assert error(y.detach(), wanted) < TOLERANCE[dtype]
    seeds = [torch.randn(rows, 50, dtype=dtype), torch.ones(()).to(dtype).expand(rows, 50)]
    for grad in (*seeds, torch.randn(50, rows, dtype=dtype).T):  # also of odd strides
        (found,) = torch.autograd.grad(y, leaf, grad, retain_graph=True)
        assert error(found, grad.double() @ weight.double()) < TOLERANCE[dtype]
        assert error(frozen.back(grad), grad.double() @ weight.double()) < TOLERANCE[dtype]


def test_a_sliced_input_is_read_as_it_lies() -> None:
    weight, wide = torch.randn(8, 6), torch.randn(10, 20)
    assert error(Linear(weight)(wide[::2, 3:9]), F.linear(wide[::2, 3:9], weight)) < 1e-6


def test_a_layer_made_in_inference_mode_serves_and_one_in_use_is_not_changed() -> None:
    weight = torch.randn(16, 8)
    kept = weight.clone()
    with torch.inference_mode():
        frozen = Linear(weight)
        assert frozen(torch.ones(1, 8)).shape == (1, 16)
    assert torch.equal(weight, kept)
    assert frozen(torch.ones(2, 8, requires_grad=True)).requires_grad

"""The default loss is autograd's cross-entropy: bitwise the same gradient in one block, to rounding in several."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.support.reference import difference
from torch import Tensor

from privatelora.device import losses
from privatelora.device.losses import HeadCrossEntropy

VOCABULARY, WIDTH = 301, 64


@pytest.mark.parametrize("rows", [1, 6, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_give_autograds_loss_and_gradient(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "BLOCK_BYTES", 6 * 4 * VOCABULARY)  # blocks of 6 rows
    head, x, labels = problem(rows, dtype)
    loss = HeadCrossEntropy(head)
    with torch.inference_mode():
        scored = loss.total(x, labels)
    for _ in range(2):  # what one pass leaves in the buffers does not show in the next
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        mean = loss.mean(ours, labels)
        wanted = F.cross_entropy(F.linear(theirs, head).float(), labels)
        (2 * mean).backward()  # by a power of two, so exactly
        (2 * wanted).backward()
        assert float(mean.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
        assert ours.grad is not None
        assert theirs.grad is not None
        if rows <= 6 or dtype is torch.bfloat16:
            assert torch.equal(ours.grad, theirs.grad)
        assert difference(ours.grad, theirs.grad) < 1e-6
        assert scored == pytest.approx(rows * float(wanted.detach()), rel=1e-6)


def test_an_interrupted_pass_does_not_show_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    head, x, labels = problem(5, torch.float32)
    loss = HeadCrossEntropy(head)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "_log_softmax_backward_data", interrupt)  # a Ctrl-C at the one moment where it matters
        loss.mean(x.clone().requires_grad_(), labels)
    other = (labels + 1) % VOCABULARY
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss.mean(ours, other).backward()
    F.cross_entropy(F.linear(theirs, head), other).backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


def interrupt(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


def problem(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Head (vocab, d), hidden states (rows, d) and labels (rows,), some of them likely."""
    generator = torch.Generator().manual_seed(rows)
    head = torch.randn(VOCABULARY, WIDTH, generator=generator) / 4
    labels = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    x = torch.randn(rows, WIDTH, generator=generator) + head[labels]
    return head.to(dtype), x.to(dtype), labels

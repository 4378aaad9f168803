"""The default loss: cross-entropy of the LM head's logits, from hidden states, a block of rows at a time.

The logits of a batch are the largest tensors of a device by far (512 tokens of a 49,152-word vocabulary: 100 MB in
float32, three times over with their log-softmax and gradient), and fresh memory for them costs more than the matmuls.
Here one block's lie in buffers that are kept, and the gradient of the hidden states is formed on the way. `split.py`
uses it wherever the owner gave no loss of their own. The operations are autograd's, and within a block so is their
rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_BYTES = 24 << 20
"""Of one float32 buffer: 128 rows of 49,152 words. 512 rows forward and backward, bfloat16, beside other work: 215 ms,
391 ms through autograd at once."""


class HeadCrossEntropy:
    """Nats of labels under a frozen LM head, (vocab, d); one pass at a time."""

    def __init__(self, head: Tensor) -> None:
        self.head = head
        self._rows = max(1, BLOCK_BYTES // (4 * len(head)))
        self._buffers: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def mean(self, x: Tensor, labels: Tensor, of: int | None = None) -> Tensor:
        """Mean nats of labels (n,) under logits x head^T, differentiable in x (n, d).

        Where these are some of `of` labels, it is their share of the mean over all of those.
        """
        gradient, of = torch.empty_like(x), of or len(x)
        nats = self._nats(x.detach(), labels, gradient, of) / of
        loss: Tensor = _Differentiated.apply(x, nats, gradient)  # type: ignore[no-untyped-call]  # torch leaves it bare
        return loss

    def total(self, x: Tensor, labels: Tensor) -> float:
        """Sum of nats of labels (n,) under logits x head^T."""
        return float(self._nats(x, labels))

    @torch.no_grad()
    def _nats(self, x: Tensor, labels: Tensor, gradient: Tensor | None = None, of: int = 1) -> Tensor:
        """Sum of nats; `gradient` receives that of their share of a mean over `of` labels, in x."""
        nats = torch.zeros(())
        for first in range(0, len(x), self._rows):
            rows = slice(first, first + self._rows)
            wanted = labels[rows]
            raw, logits, log_p, seed = (buffer[: len(wanted)] for buffer in self._kept(x.dtype))
            torch.mm(x[rows], self.head.T, out=raw)  # (block, vocab)
            if logits.dtype is not raw.dtype:
                logits.copy_(raw)
            torch.log_softmax(logits, dim=-1, out=log_p)
            nats += F.nll_loss(log_p, wanted, reduction="sum")
            if gradient is None:
                continue
            try:
                seed.scatter_(1, wanted[:, None], -1 / of)  # dL/d log_p, zero elsewhere
                torch._log_softmax_backward_data(seed, log_p, -1, torch.float32, out=logits)  # as in torch 2.13
            finally:  # an interrupted pass leaves zeros as well
                seed.scatter_(1, wanted[:, None], 0.0)
            if logits.dtype is not raw.dtype:
                raw.copy_(logits)
            torch.mm(raw, self.head, out=gradient[rows])
        return nats

    @torch.inference_mode(False)  # scoring makes them as well, and training writes to them
    def _kept(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits as the head gives them and in float32 (the same buffer if it gives that), log-softmax, and zeros."""
        if self._buffers is None:
            shape = self._rows, len(self.head)
            raw = torch.empty(shape, dtype=dtype)
            logits = raw if dtype is torch.float32 else torch.empty(shape)
            self._buffers = raw, logits, torch.empty(shape), torch.zeros(shape)
        return self._buffers


class _Differentiated(torch.autograd.Function):
    """A value whose gradient in x was computed beside it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient * grads[0].to(ctx.gradient.dtype), None, None

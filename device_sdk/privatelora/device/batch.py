"""A training or scoring batch: examples laid end to end as rows, as every pass takes them.

From `data.Example`s; `session.py` embeds its tokens, sends its spans, and computes the loss of its labelled rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from privatelora.device.data import IGNORE, Example
from privatelora.device.exchange import Span
from privatelora.protocol.errors import ConfigurationError, DataError


@dataclass(frozen=True)
class Batch:
    """Examples laid end to end, as every pass takes them."""

    tokens: Tensor  # (n,)
    lengths: tuple[int, ...]
    rows: Tensor  # (n_o,) rows that have a label
    labels: Tensor  # (n_o,)
    keys: tuple[bytes, ...]  # of each sequence's tokens, for the cache of hidden states

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Batch:
        if not examples:
            raise DataError("a batch needs one example or more")
        tokens = torch.cat([torch.from_numpy(example.tokens) for example in examples])
        labels = torch.cat([torch.from_numpy(example.labels) for example in examples])
        rows = (labels != IGNORE).nonzero()[:, 0]
        keys = tuple(example.tokens.tobytes() for example in examples)
        return cls(tokens, tuple(len(example.tokens) for example in examples), rows, labels[rows], keys)

    @classmethod
    def packed(cls, examples: Sequence[Example], batch_size: int, max_tokens: int) -> Iterator[Batch]:
        """All examples in order, as many a batch as `batch_size` and the service's largest step allow."""
        if batch_size < 1:
            raise ConfigurationError(f"batch_size {batch_size} must be 1 or more")
        group: list[Example] = []
        for example in examples:
            tokens = sum(len(other.tokens) for other in group) + len(example.tokens)
            if group and (len(group) == batch_size or tokens > max_tokens):
                yield cls.of(group)
                group = []
            group.append(example)
        yield cls.of(group)

    def spans(self) -> list[Span]:
        return [Span(number, 0, length) for number, length in enumerate(self.lengths)]

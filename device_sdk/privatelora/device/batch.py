"""A training or scoring batch: examples laid end to end as rows, as every pass takes them.

From `data.Example`s; `split.py` cuts it into micro-batches, embeds their tokens, sends their spans, and computes the
loss of their labelled rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from privatelora.device.data import IGNORE, Example
from privatelora.device.stream import Span
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

    def cut(self, count: int) -> list[Batch]:
        """At most `count` micro-batches of whole sequences in order, about equal in tokens."""
        if count < 2:
            return [self]
        ends = list(accumulate(self.lengths))
        part = [
            int((end - n / 2) * count / ends[-1]) for n, end in zip(self.lengths, ends, strict=True)
        ]  # by its middle
        firsts = [i for i in range(len(part)) if i == 0 or part[i] != part[i - 1]]
        return [self._of_sequences(first, end) for first, end in pairwise([*firsts, len(part)])]

    def _of_sequences(self, first: int, end: int) -> Batch:
        """The sequences from number `first` to before number `end`."""
        begin, stop = sum(self.lengths[:first]), sum(self.lengths[:end])
        inside = (self.rows >= begin) & (self.rows < stop)
        return Batch(
            self.tokens[begin:stop],
            self.lengths[first:end],
            self.rows[inside] - begin,
            self.labels[inside],
            self.keys[first:end],
        )

    def spans(self) -> list[Span]:
        return [Span(number, 0, length) for number, length in enumerate(self.lengths)]

"""Gradients of several micro-batches, added up as they come.

`split.py` adds what each stream found; `session.py` gets the sums once all passes are whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class GradientSum:
    """Sums by parameter name, each over the streams in their order.

    Streams run side by side and the network decides which is ahead; added as they come, the same step done again would
    differ in its rounding. So what comes early is kept until its turn, a layer or two as a rule.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    _added: dict[str, int] = field(default_factory=dict)  # how many streams a sum holds
    _early: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def add(self, stream: int, gradients: Mapping[str, Tensor]) -> None:
        """Take what stream number `stream`, from 0, found for some parameters; once for each parameter."""
        for name, gradient in gradients.items():
            early = self._early.setdefault(name, {})
            early[stream] = gradient
            while (turn := self._added.get(name, 0)) in early:
                due = early.pop(turn)
                self.sums[name] = self.sums[name] + due if name in self.sums else due
                self._added[name] = turn + 1

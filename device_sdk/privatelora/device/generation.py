"""Choosing tokens and turning them into text: temperature and top-p sampling, stop strings, incremental decoding.

Plain functions over logits and ids; `session.py` runs the model. Nothing here touches the network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from privatelora.protocol.errors import ConfigurationError

UNFINISHED = "\ufffd"  # a tokenizer's mark for bytes that are not yet a whole character, one or one a byte


class Sampler:
    """Picks the next token from logits: greedy at temperature 0, else top-p sampling with a seed of its own."""

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
            raise ConfigurationError(f"temperature {temperature} must be 0 or more, and top_p {top_p} in (0, 1]")
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def pick(self, logits: Tensor) -> int:
        """Next token id for logits (vocab,)."""
        if self.temperature == 0:
            return int(logits.argmax())
        # below 0, so that a temperature close to 0 gives minus infinity and not NaN
        probabilities = torch.softmax((logits - logits.max()) / self.temperature, dim=-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            beyond = ordered.cumsum(0) - ordered >= self.top_p  # the first that reaches top_p stays
            probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered.masked_fill(beyond, 0.0))
        return int(torch.multinomial(probabilities, 1, generator=self.generator))


def pieces(tokens: Iterator[int], tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> Iterator[str]:
    """Text of `tokens` as it grows, up to the first stop string; holds back what may become one."""
    ids: list[int] = []
    shown = 0
    for token in tokens:
        ids.append(token)
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        ends = [at for at in (text.find(s) for s in stop) if at >= 0]
        if ends:
            yield text[shown : min(ends)]
            return
        whole = text.rstrip(UNFINISHED)
        safe = len(whole) - max((_overlap(whole, s) for s in stop), default=0)
        if safe > shown:
            yield text[shown:safe]
            shown = safe
    rest = str(tokenizer.decode(ids, skip_special_tokens=True))[shown:] if ids else ""
    if rest:
        yield rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)

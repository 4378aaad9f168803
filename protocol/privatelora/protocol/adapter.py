"""What an adapter set and a session's adapter are: `ModelShape` and `AdapterSpec`.

The service publishes sets of frozen A and B; a session names a set and ranks up to the set's, smaller ranks being
prefixes. Both ends derive every exchanged shape, and the byte accounting its formula, from these two.
"""

from __future__ import annotations

from dataclasses import dataclass

from privatelora.protocol.errors import ConfigurationError

KINDS = ("calibrated", "random")
PROJECTIONS = ("q", "k", "v")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that the wire depends on."""

    hidden: int
    layers: int
    q: int
    k: int
    v: int

    @property
    def qkv(self) -> int:
        return self.q + self.k + self.v


@dataclass(frozen=True)
class AdapterSpec:
    """Kind and ranks of one session's inline adapter.

    Parameters
    ----------
    kind : `calibrated` (one encoder a layer) or `random` (the paper: one encoder a projection).
    rank_down : rows of A used, the width of what comes down (the paper's rC2D).
    rank_up : rows of each B used, the width of what goes up (the paper's rD2C).
    """

    kind: str = "calibrated"
    rank_down: int = 64
    rank_up: int = 64

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigurationError(f"adapter kind {self.kind!r} is unknown; use one of {', '.join(KINDS)}")
        if self.rank_down < 1 or self.rank_up < 1:
            raise ConfigurationError(f"ranks must be 1 or more, not {self.rank_down} down and {self.rank_up} up")

    @property
    def encoders(self) -> int:
        """E of DESIGN section 2: encoders of x per layer."""
        return len(PROJECTIONS) if self.kind == "random" else 1

    def encoded_shape(self, n: int) -> tuple[int, int, int]:
        """Shape of `u` for n tokens: (n, E, r_down)."""
        return n, self.encoders, self.rank_down

    def delta_shape(self, n: int) -> tuple[int, int, int]:
        """Shape of `v` for n tokens: (n, 3, r_up)."""
        return n, len(PROJECTIONS), self.rank_up

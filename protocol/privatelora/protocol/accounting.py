"""Wire cost, exactly: the formula of DESIGN section 3 in elements and bytes, and the reductions that follow from it.

The device adds up what the formula says for every pass it makes (`forward_traffic`, `backward_traffic`) and, apart from
that, counts the payload bytes that really cross its socket; a report shows both, and a test holds them equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from privatelora.protocol.adapter import AdapterSpec, ModelShape
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.placement import Placement

PAPER_SHAPES = {
    "llama2-7b": ModelShape(hidden=4096, layers=32, q=4096, k=4096, v=4096),
    "llama2-13b": ModelShape(hidden=5120, layers=40, q=5120, k=5120, v=5120),
    "llama-33b": ModelShape(hidden=6656, layers=60, q=6656, k=6656, v=6656),
}
PAPER_SPEC = AdapterSpec("random", 128, 128)
DEFAULT_SPEC = AdapterSpec()


@dataclass(frozen=True)
class Traffic:
    """Bytes (or elements) that go from device to service, and from service to device."""

    up: int = 0
    down: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.up + other.up, self.down + other.down)

    @property
    def total(self) -> int:
        return self.up + self.down


def forward_traffic(
    shape: ModelShape, placement: Placement, spec: AdapterSpec, n_f: int, n_o: int, dtype: WireDtype | None = None
) -> Traffic:
    """Cost of one forward pass over `n_f` tokens of which the device needs `n_o` outputs.

    Elements, or with a `dtype` bytes. Where the device holds last layers it needs all of h_{L-last}, so n_o is n_f.
    """
    n_o = n_f if placement.last else n_o
    size = _size_of(dtype)
    inline = len(placement.inline)
    return Traffic(
        up=size((n_f, shape.hidden)) + inline * size(spec.delta_shape(n_f)),
        down=inline * size(spec.encoded_shape(n_f)) + size((n_o, shape.hidden)),
    )


def backward_traffic(
    shape: ModelShape, placement: Placement, spec: AdapterSpec, n_f: int, n_o: int, dtype: WireDtype | None = None
) -> Traffic:
    """Cost of one backward pass; nothing where nothing below the device's last layers is trained."""
    if not placement.sends_gradient:
        return Traffic()
    n_o = n_f if placement.last else n_o
    size = _size_of(dtype)
    inline = len(placement.inline)
    # the lowest inline layer needs no dL/du unless something below it trains
    answered = max(0, inline - 1 + placement.trains_first) if inline else 0
    return Traffic(
        up=size((n_o, shape.hidden)) + answered * size(spec.encoded_shape(n_f)),
        down=inline * size(spec.delta_shape(n_f)) + (size((n_f, shape.hidden)) if placement.trains_first else 0),
    )


def device_lora_elements(shape: ModelShape, layers: int) -> int:
    """Elements a token of the baseline: LoRA on q, k, v of `layers` layers held on the device, full activations."""
    return layers * (shape.hidden + shape.qkv)


def exchange_reduction(shape: ModelShape, spec: AdapterSpec) -> float:
    """Share of the baseline's per-layer exchange that this adapter saves, for a model of this shape (0..1)."""
    exchanged = spec.encoders * spec.rank_down + 3 * spec.rank_up
    return 1 - exchanged / device_lora_elements(shape, 1)


def reduction_by_shape() -> dict[str, dict[str, float]]:
    """`exchange_reduction` for the paper's models, with the paper's adapter and with ours."""
    return {
        name: {"paper": exchange_reduction(shape, PAPER_SPEC), "default": exchange_reduction(shape, DEFAULT_SPEC)}
        for name, shape in PAPER_SHAPES.items()
    }


def _size_of(dtype: WireDtype | None) -> Callable[[tuple[int, ...]], int]:
    return math.prod if dtype is None else dtype.nbytes

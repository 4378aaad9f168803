"""The tensor bytes that cross the socket are the formula's, to the byte (DESIGN section 3, in plain numbers).

`count` is what the device's socket carried, `expected` what the device's own accounting says of the same passes; both
are held against a third sum, made here from the lengths of the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from tests.split.common import MIXED
from tests.support.fleet import DEPTH, Fleet

from privatelora.device import DeviceSession
from privatelora.device.connection import Connection
from privatelora.device.data import IGNORE, Dataset, Example
from privatelora.protocol.frames import Frame, Kind, Phase

D = 64  # hidden size of the tiny models
R_DOWN, R_UP = 12, 8
LENGTHS = (9, 5, 14, 3)  # tokens of the examples
LABELS = (4, 2, 6, 1)  # of which so many carry a label
N, N_LABELLED = 31, 13
BATCH = 3
PROMPT, NEW = "A prompt of 23 tokens..", 6

Size = Callable[[int, int], int]
"""rows and width of a tensor to its bytes"""
SIZES: dict[str, Size] = {
    "float32": lambda rows, width: 4 * rows * width,
    "bfloat16": lambda rows, width: 2 * rows * width,
    "float16": lambda rows, width: 2 * rows * width,
    "int8": lambda rows, width: rows * width + 4 * rows,  # and one float32 scale a row
}

# placement -> first layers trained, last layers on the device, inline layers
PLACEMENTS: dict[str, tuple[bool, bool, int]] = {
    "paper": (False, False, DEPTH),
    "inline=1+4": (False, False, 2),
    "first=1,inline=2+4": (True, False, 2),
    MIXED: (True, True, 2),
    "first=1,last=1,inline=2+4,train_first=no": (False, True, 2),
    "one-trip": (True, True, 0),
    "first=2,last=2,train_first=no": (False, True, 0),
    "last=3": (False, True, 0),
    "first=1,last=0": (True, False, 0),
}
NEVER_SENDS = [name for name, (trains_first, _, inline) in PLACEMENTS.items() if not trains_first and not inline]
CASES = [
    *((placement, "calibrated", wire_dtype) for placement in PLACEMENTS for wire_dtype in SIZES),
    *((placement, "random", wire_dtype) for placement in ("paper", MIXED) for wire_dtype in ("float32", "int8")),
]


@pytest.mark.parametrize(("placement", "adapter", "wire_dtype"), CASES)
def test_counted_bytes_equal_the_formula(
    fleet: Fleet, sent: list[Frame], placement: str, adapter: str, wire_dtype: str
) -> None:
    cost = Cost(SIZES[wire_dtype], *PLACEMENTS[placement], encoders=3 if adapter == "random" else 1)
    with open_session(fleet, placement=placement, adapter=adapter, wire_dtype=wire_dtype) as me:
        report = me.finetune(examples(), epochs=1, batch_size=BATCH, learning_rate=1e-3)
        trained = counted(me)
        assert trained == cost.forward(N, N_LABELLED) + cost.backward(N, N_LABELLED)
        assert trained == Bytes(report.bytes_up, report.bytes_down)

        me.evaluate(examples(), batch_size=BATCH)
        scored = counted(me)
        assert scored - trained == cost.forward(N, N_LABELLED)

        me.generate(PROMPT, max_new_tokens=NEW)
        passes = sum(frame.kind is Kind.HIDDEN and frame.phase is Phase.GENERATE for frame in sent)
        assert 1 <= passes <= NEW
        tokens = len(PROMPT) + passes - 1  # the whole prompt, then each token but the last
        assert counted(me) - scored == cost.forward(tokens, passes)


@pytest.mark.parametrize("placement", NEVER_SENDS)
def test_no_gradient_is_sent_and_later_epochs_are_offline(fleet: Fleet, sent: list[Frame], placement: str) -> None:
    cost = Cost(SIZES["float32"], *PLACEMENTS[placement], encoders=1)
    with open_session(fleet, placement=placement) as me:
        after_step: list[Bytes] = []
        me.finetune(
            examples(),
            epochs=3,
            batch_size=BATCH,
            learning_rate=1e-3,
            callbacks=[lambda step: after_step.append(Bytes(step.bytes_up, step.bytes_down))],
        )
        assert after_step[1] == cost.forward(N, N_LABELLED)  # the first epoch has two batches
        assert after_step[2:] == [after_step[1]] * 4
        assert not [frame.kind for frame in sent if frame.kind in (Kind.GRAD_HIDDEN, Kind.GRAD_ENCODED)]


@dataclass(frozen=True)
class Bytes:
    """Payload from device to service, and back."""

    up: int
    down: int

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.up + other.up, self.down + other.down)

    def __sub__(self, other: Bytes) -> Bytes:
        return Bytes(self.up - other.up, self.down - other.down)


@dataclass(frozen=True)
class Cost:
    """The table of DESIGN section 3; linear in the tokens, so that an epoch costs the same however it is batched."""

    size: Size
    trains_first: bool
    holds_last: bool
    inline: int  # |S|
    encoders: int  # E

    def forward(self, n_f: int, n_o: int) -> Bytes:
        n_o = n_f if self.holds_last else n_o
        return Bytes(
            up=self.size(n_f, D) + self.inline * self.size(3 * n_f, R_UP),
            down=self.inline * self.size(self.encoders * n_f, R_DOWN) + self.size(n_o, D),
        )

    def backward(self, n_f: int, n_o: int) -> Bytes:
        if not self.inline and not self.trains_first:
            return Bytes(0, 0)
        n_o = n_f if self.holds_last else n_o
        answered = max(0, self.inline - 1 + self.trains_first) if self.inline else 0
        return Bytes(
            up=self.size(n_o, D) + answered * self.size(self.encoders * n_f, R_DOWN),
            down=self.inline * self.size(3 * n_f, R_UP) + self.trains_first * self.size(n_f, D),
        )


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Frame]:
    """Every frame that a device of this process sends."""
    frames: list[Frame] = []
    send = Connection.send
    monkeypatch.setattr(Connection, "send", lambda self, frame: (frames.append(frame), send(self, frame))[1])
    return frames


def open_session(fleet: Fleet, **settings: Any) -> DeviceSession:
    return fleet.session("llama", rank=(R_DOWN, R_UP), **settings)


def examples() -> Dataset:
    """Sequences of `LENGTHS` tokens whose last `LABELS` are learned."""
    made = []
    for length, labelled in zip(LENGTHS, LABELS, strict=True):
        tokens = np.arange(length) * 7 % 200 + 4 + labelled
        labels = np.append(tokens[1:], IGNORE)
        labels[: length - 1 - labelled] = IGNORE
        made.append(Example(tokens, labels))
    return Dataset(tuple(made), 0)


def counted(me: DeviceSession) -> Bytes:
    """What crossed the socket so far, which is what the device expected."""
    count, expected = me.remote.count, me.remote.expected
    assert (count.payload_up, count.payload_down) == (expected.up, expected.down)
    return Bytes(count.payload_up, count.payload_down)

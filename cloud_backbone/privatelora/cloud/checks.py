"""What a frame that begins a pass may ask for: its spans, its tensor, and which rows of the result it wants back.

`session.py` calls these before a pass takes anything; each raises the `ProtocolError` that ends the session.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from privatelora.cloud.passes import Way
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.errors import ProtocolError
from privatelora.protocol.frames import Frame, Phase, Selection
from privatelora.protocol.placement import Placement


def check_spans(
    sequences: Sequence[int],
    starts: Sequence[int],
    lengths: Sequence[int],
    held: Mapping[int, int],
    busy: Collection[int],
    context: int,
) -> None:
    """Spans must begin where the sequences end that are `held`, stay within the context, and be in no other pass."""
    if not sequences or len(set(sequences)) != len(sequences) or min(lengths) < 1:
        raise ProtocolError("a pass needs one span or more, of different sequences and of one token or more each")
    for sequence, start, length in zip(sequences, starts, lengths, strict=True):
        tokens = held.get(sequence, 0)
        if start != tokens:
            raise ProtocolError(f"sequence {sequence} starts at {start}, where {tokens} tokens are held")
        if start + length > context:
            raise ProtocolError(
                f"sequence {sequence} would reach {start + length} tokens; the model's context is {context}"
            )
        if sequence in busy:
            raise ProtocolError(f"sequence {sequence} is under way in another pass; wait for its result")


def check_tensor(frame: Frame, dtype: WireDtype, shape: tuple[int, ...]) -> None:
    """The frame must carry the session's element type, in the shape that is due."""
    if frame.dtype is not dtype or frame.shape != shape:
        raise ProtocolError(
            f"{frame.kind.name} came as {frame.dtype.name} of shape {frame.shape}; {dtype.name} of shape {shape} is due"
        )


def selected_rows(frame: Frame, lengths: Sequence[int], placement: Placement) -> torch.Tensor | None:
    """Rows of the result that the device asked for, (n_o,); None for all of them."""
    if frame.selection is Selection.ALL and not len(frame.outputs):
        return None
    if placement.last:
        raise ProtocolError("the device holds the last layers, which need every row; use Selection.ALL")
    if frame.selection is Selection.LAST and not len(frame.outputs):
        return torch.tensor(lengths).cumsum(0) - 1
    outputs = frame.outputs.astype(np.int64)
    if not len(outputs) or outputs[-1] >= sum(lengths) or bool((np.diff(outputs) <= 0).any()):
        raise ProtocolError("listed outputs must be ascending row numbers of this batch, one or more")
    return torch.from_numpy(outputs)


def way_of(phase: Phase, single: bool) -> Way:
    """What a pass of this phase is for; `single`: it has one token a sequence."""
    if phase is Phase.GENERATE:
        return Way.DECODE if single else Way.PREFILL
    return Way.SCORE if phase is Phase.SCORE else Way.TRAIN

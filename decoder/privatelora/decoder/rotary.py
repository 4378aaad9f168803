"""Rotary position tables: cosines and sines per position, from transformers' own frequency initialisers.

`RotaryTables` belongs to one model on one torch device; every ragged batch asks it for the rows of its positions, and
`functions.rotate` applies them. Only rope types with fixed frequencies come here (`config.ROPE_KEYS`), so that a row
once made, and a key once rotated and cached, stays right however long the sequence grows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from privatelora.decoder.config import ModelConfig, build_hf_config

SMALLEST_TABLE = 256  # positions in a new table: one growth serves a short session


class RotaryTables:
    """Rows of the rotary tables of one model, grown in powers of two as positions ask for them.

    Sessions share it: growth replaces both tables at once, so a thread that reads meanwhile has the whole old pair.
    """

    def __init__(
        self, config: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self._tables = rotary_tables(config, SMALLEST_TABLE, self.device, dtype)

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, both (n, head_dim), of positions (n,) of an integer dtype; the caller bounds the positions."""
        cos, sin = self._tables
        longest = int(positions.max()) + 1 if positions.numel() else 0
        if longest > cos.shape[0]:
            grown = rotary_tables(self.config, 1 << (longest - 1).bit_length(), self.device, self.dtype)
            self._tables = cos, sin = grown
        at = positions.to(self.device)
        return cos[at], sin[at]


def rotary_tables(
    config: ModelConfig, length: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin, both (length, head_dim), of positions 0 to length - 1.

    Computed in float32 and cast at the end, as transformers' LlamaRotaryEmbedding does (5.23,
    models/llama/modeling_llama.py; the other families' modules are the same), `attention_scaling` of yarn included.
    """
    hf = build_hf_config(config.hf)
    kind = hf.rope_parameters["rope_type"]
    initialise: Callable[..., tuple[Tensor, float]] = LlamaRotaryEmbedding.compute_default_rope_parameters
    if kind != "default":
        initialise = ROPE_INIT_FUNCTIONS[kind]
    inv_freq, attention_scaling = initialise(hf)  # (head_dim / 2,)
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angles = positions[:, None] * inv_freq.to(device=device, dtype=torch.float32)  # (length, head_dim / 2)
    angles = torch.cat((angles, angles), dim=-1)  # (length, head_dim)
    return (angles.cos() * attention_scaling).to(dtype), (angles.sin() * attention_scaling).to(dtype)
